"""COptiDICE (Lee et al. 2022, arXiv 2204.08957): cloning by corrected stationary distributions.

No action outside the data is ever valued. w(s, a) is the ratio of the occupancy that is sought to
the data's; it maximises reward less an f-divergence from the data under a limit on cost, and the
policy clones with weights w. f is the soft χ²: f(x) = x (log x - 1) + 1 below 1, ½ (x - 1)² above,
so f'⁻¹(y) = e^y below 0, y + 1 above. With networks ν and χ, multipliers λ = min(e^l, 1000) and
τ = e^t + 1e-6, s_0 a first observation of a logged episode, drawn apart from the batch, ĉ = L / T
the limit per step, all at the values before the update, [·] a constant and mean over the batch:

    e       = r - [λ] c + γ (1 - terminal) ν(s') - ν(s)
    w       = f'⁻¹(e / α)
    L_ν     = (1 - γ) mean ν(s_0) + mean (w e - α f(w))                 gradient through w and ν(s')
    ℓ       = (1 - γ) χ(s_0) + [w] (c + γ (1 - terminal) χ(s') - χ(s))
    u       = B softmax(ℓ / [τ]);   K = mean u log u;   Ĉ = mean u w c
    L_χτ    = mean u ℓ + τ (ε - [K])                                    gradient through u
    L_λ     = λ (ĉ - [Ĉ])
    G_v     = g mean relu(‖∇v(x)‖ - 5)²,   x = z s_0 + (1 - z) s,   z ~ U(0, 1),   v = ν, χ
    step ν, χ, l, t on L_ν + L_χτ + L_λ + G_ν + G_χ;   step π on -mean [w] log π(a|s)

Ĉ is an upper estimate of the cost of a step under w: u leans to the rows that make it larger, as
far as ε lets it. λ rises while Ĉ is above ĉ. Losses, constants and the first values l = t = 0 are
those of the authors' code (google-deepmind/constrained_optidice).

The limit. Ĉ is a mean over an occupancy scaled by 1 - γ, that is, a cost per step: time-outs
bootstrap, so the occupancy goes on for ever, and spending L every T steps is L / T. OSRL compares
the same number with the *discounted budget*, some 1 / (1 - γ) times larger, which never binds.

Deviations from the authors' code: π is the tanh of one Gaussian, fitted and executed on the same
side of the tanh (theirs: a mixture of five on a residual network; OSRL fits a Gaussian to actions
and executes its tanh), with log σ of at least -5; ν and χ have no layer normalisation and the sizes
of the other comparators here; policies come from the current weights, not from a periodic copy. The
gradient ∇v is written out, exactly, so that no second derivative of a graph is needed.
OSRL's behaviour is not offered as a switch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from saferl.data.dataset import Dataset
from saferl.errors import SaferlError
from saferl.nn import MLP, TanhGaussianActor, VEnsemble
from saferl.nn.data_buffers import DataBuffers
from saferl.replay import Batch
from saferl.rng import MemberRandom

from .shared.agent import Metrics
from .shared.constraint import costs_of
from .shared.limited import Limited, LimitedConfig

STEEP = 5.0  # slope of ν and χ from which the penalty counts


SMALLEST = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class COptiDICEConfig(LimitedConfig):
    """Defaults: the authors'; layer sizes and the scale of rewards are OSRL's."""

    batch_size: int = 1024
    discount: float = 0.995  # γ, of rewards and of costs
    lr: float = 3e-4  # of ν, χ, λ and τ
    actor_lr: float = 3e-4
    alpha: float = 0.01  # weight of the divergence from the data, in units of the scaled reward
    overestimation: float = 0.01  # ε, nats that the upper estimate of cost may lean away from w
    gradient_penalty: float = 1e-5  # g


class Starts(DataBuffers):
    """First observations of the logged episodes, in the agent's units; all members share them."""

    # Tensors once there are data, None before.
    rows: Any

    def __init__(self):
        super().__init__()
        self.declare("rows")  # [N, O]

    def sample(self, random: MemberRandom, count: int) -> Tensor:
        """``[M, count, O]``, uniformly with replacement."""
        if self.rows is None:
            raise SaferlError(
                "coptidice needs the first observations of the logged episodes: call "
                "agent.fit(dataset, print) before the first update"
            )
        return self.rows[random.integers(len(self.rows), count)]


class COptiDICE(Limited[COptiDICEConfig]):
    Config = COptiDICEConfig
    per_member = frozenset({"cost_limit", "discount", "alpha", "overestimation"})
    discount_of_costs = "discount"
    shared: ClassVar[frozenset[str]] = frozenset({"starts."})  # without a member axis

    def build(self, init: MemberRandom) -> None:
        c, o, a = self.config, self.spec.observation_dim, self.spec.action_dim
        alphas = self.column("alpha")
        if not min(alphas) > 0:
            raise SaferlError(f"alpha is a number above 0, got {min(alphas):g}")
        self.allowed, self.unit = self.limits("step")  # ĉ; a cost of 1 per episode
        self.actor = TanhGaussianActor(init, o, a, c.hidden, log_std_min=-5.0)
        self.nu = VEnsemble(init, o, c.hidden)
        self.chi = VEnsemble(init, o, c.hidden)
        self.log_lambda = nn.Parameter(torch.zeros(self.members, device=self.device))
        self.log_tau = nn.Parameter(torch.zeros(self.members, device=self.device))
        self.starts = Starts()
        self.actor_optimizer = self.adam(self.actor, lr=c.actor_lr)
        parameters = self.nu, self.chi, self.log_lambda, self.log_tau
        self.optimizer = self.adam(*parameters, lr=c.lr)

    def fit(self, dataset: Dataset, say: Callable[[str], None]) -> None:
        """Keep the first observations of the episodes, a trailing fragment's among them."""
        super().fit(dataset, say)
        first = dataset.episodes[:, 0].tolist()
        if dataset.fragment is not None:
            first.append(dataset.fragment[0])
        rows = self.spec.observations(dataset.observations[first])
        self.starts.rows = torch.tensor(rows, dtype=self.log_tau.dtype, device=self.device)

    def learn(self, batch: Batch) -> Metrics:
        c = self.config
        s, costs = batch.observations, costs_of(batch)
        start = self.starts.sample(self.random, s.shape[1])
        mix = self.random.uniform(s.shape[1], 1)
        between = mix * start + (1 - mix) * s
        gamma, alpha = self.scalar("discount"), self.scalar("alpha")
        discount = gamma * (1 - batch.terminals)
        price = self.log_lambda.exp().clamp_max(1e3)
        tau = self.log_tau.exp() + 1e-6

        e = batch.rewards - price.detach()[:, None] * costs
        e = e + discount * self.nu(batch.next_observations)[:, 0] - self.nu(s)[:, 0]
        y = e / alpha
        below = y.clamp_max(0).exp()
        w = torch.where(y < 0, below, y + 1)
        divergence = torch.where(y < 0, below * (y - 1) + 1, 0.5 * y.square())
        nu_start = (1 - gamma) * self.nu(start)[:, 0]
        nu_loss = (nu_start + w * e - alpha * divergence).mean(-1)

        w = w.detach()
        flow = costs + discount * self.chi(batch.next_observations)[:, 0] - self.chi(s)[:, 0]
        ell = (1 - gamma) * self.chi(start)[:, 0] + w * flow
        log_u = (ell / tau.detach()[:, None]).log_softmax(-1) + math.log(ell.shape[1])
        u = log_u.exp()
        lean = (u * log_u).mean(-1).detach()
        cost = (u * w * costs).mean(-1).detach()
        slack = self.scalar("overestimation", 0) - lean
        chi_loss = (u * ell).mean(-1)

        steepness = sum(self.steepness(v.mlp, between) for v in (self.nu, self.chi))
        dual = tau * slack + price * (self.allowed - cost)
        loss = nu_loss + chi_loss + dual + c.gradient_penalty * steepness
        self.minimise(self.optimizer, loss)

        log_prob = self.actor.log_prob(s, batch.actions)
        actor_loss = -(w * log_prob).mean(-1)
        self.minimise(self.actor_optimizer, actor_loss)
        return {
            "nu_loss": nu_loss.detach(),
            "chi_loss": chi_loss.detach(),
            "actor_loss": actor_loss.detach(),
            "weight": w.mean(-1),
            # Rows that count: 1 if all weigh the same, 1 / B if a single one does, 0 if none.
            "effective_share": w.mean(-1).square() / w.square().mean(-1).clamp_min(SMALLEST),
            "multiplier": price.detach(),
            "temperature": tau.detach(),
            "lean": lean,
            "cost_estimate": cost / self.unit,
        }

    @staticmethod
    def steepness(mlp: MLP, observations: Tensor) -> Tensor:
        """mean relu(‖∇v‖ - 5)² ``[M]`` of a scalar perceptron at ``[M, B, O]``."""
        slope = input_gradient(mlp, observations)
        norm = (slope.square().sum(-1) + 1e-12).sqrt()  # the root of 0 has no gradient
        return (norm - STEEP).relu().square().mean(-1)


def input_gradient(mlp: MLP, x: Tensor) -> Tensor:
    """∇v at ``x`` ``[M, B, in]`` of each member's scalar perceptron, differentiable in its weights.

    A ReLU perceptron is linear around almost every input: its gradient is the product of its
    weights with the rows of units that are off left out.
    """
    weights = [weight[:, 0] for weight in mlp.weights]
    on = []
    for weight, bias in zip(weights[:-1], mlp.biases):
        x = torch.baddbmm(bias[:, 0], x, weight).relu()
        on.append((x > 0).to(x))
    slope = weights[-1].mT  # [M, 1, H]
    for weight, mask in zip(reversed(weights[:-1]), reversed(on)):
        slope = (slope * mask) @ weight.mT
    return slope
