"""CPQ: Constraints Penalized Q-learning (Xu, Zhan and Zhu 2022, arXiv 2107.09003).

Actions unlike the logged ones are made to look costly, and whatever looks too costly is worth
nothing. This is variant (i) of the three that are known under this name: the paper's, with a VAE.
The form below is recalled from the paper, not checked against its text; the constants are OSRL's.
With q the limit as a discounted budget (`saferl.safety.limits.convert`), n actions ã_j ~ π(·|s) for
each row, a' ~ π(·|s'), targets Q̄, Q̄c (Polyak averages), one update is, in order:

    1. L_E  = mean (decode(s, μ + ς ε) - a)² - β ½ mean (1 + log ς² - μ² - ς²)       step VAE
    2. L_Q  = Σ_e mean (Q_e(s, a) - y)²                                              step Q
       y    = r + γ (1 - terminal) 1[max_e Q̄c_e(s', a') ≤ q] min_e Q̄_e(s', a')
       D_j  = KL(encode(s, ã_j) ‖ N(0, 1)),   O = {ã_j: D_j ≥ the batch's quantile ω of D}
       h_e  = mean of Qc_e(s, ã) over O       with the gradient of Qc_e
    3. L_Qc = Σ_e mean (Qc_e(s, a) - y_c)² - α Σ_e (h_e - θ q)                       step Qc
       y_c  = c + γ_c (1 - terminal) max_e Q̄c_e(s', a')
       log α ← clip(log α + lr α (θ q - mean_e h_e), ±5)
    4. L_π  = -mean 1[max_e Qc_e(s, p) ≤ q] min_e Q_e(s, p),   p ~ π(·|s)            step π
       Q̄, Q̄c ← τ (Q, Qc) + (1 - τ) (Q̄, Q̄c)

So Qc is pushed up on O until its mean there is θ q, above what the indicators let pass.

Not in OSRL, whose version (iii) differs in what follows:
- h has a gradient. OSRL forms it without one, so that α changes no parameter at all;
- the ã_j are actions, in [-1, 1]. OSRL scores and values Gaussian draws before their tanh;
- costs take the larger network (OSRL: the smaller), and terminals end their bootstrapping too.
Ours, where neither source decides: a' is the same in y and y_c, every network is pushed up by
itself, α starts at ``alpha``. OSRL's behaviour is not offered as a switch.

An action that looks unsafe is worth 0, so rewards should be 0 or more (``reward_shift``): where
they are negative, 0 is a bonus. If no action of a batch looks safe, π receives no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from saferl.data.dataset import Dataset
from saferl.errors import SaferlError
from saferl.nn import VAE, QEnsemble, TanhGaussianActor, polyak
from saferl.replay import Batch
from saferl.rng import MemberRandom

from .shared.agent import Metrics
from .shared.constraint import CostCritic, costs_of
from .shared.limited import Limited, LimitedConfig

LOG_ALPHA = 5.0  # largest |log α|


@dataclass(frozen=True)
class CPQConfig(LimitedConfig):
    """Defaults: OSRL's."""

    vae_hidden: tuple[int, ...] = (400, 400)  # of the VAE's encoder and of its decoder
    actor_lr: float = 1e-4
    critic_lr: float = 1e-3
    vae_lr: float = 1e-3
    alpha: float = 1.0  # first α, weight of the push on Qc
    alpha_lr: float = 1e-4  # rate of log α per update
    samples: int = 10  # n, actions per row of which some count as unlike the data's
    ood_quantile: float = 0.75  # ω: the share of them that does not
    ood_cost: float = 1.5  # θ, in budgets q: what Qc is pushed up to
    kl_weight: float = 0.5  # β of the VAE's divergence
    cost_discount: float = 0.99  # γ_c, per environment step
    tau: float = 0.005  # Polyak rate of the targets per update


class CPQ(Limited[CPQConfig]):
    Config = CPQConfig
    per_member = frozenset({"cost_limit", "cost_discount", "discount", "alpha", "ood_cost"})

    def build(self, init: MemberRandom) -> None:
        c, o, a = self.config, self.spec.observation_dim, self.spec.action_dim
        if not 0 <= c.ood_quantile < 1:
            raise SaferlError(f"ood_quantile lies between 0 and below 1, got {c.ood_quantile:g}")
        starts = self.column("alpha")
        if not all(math.exp(-LOG_ALPHA) <= start <= math.exp(LOG_ALPHA) for start in starts):
            raise SaferlError(f"alpha lies between exp(-5) and exp(5), got {c.alpha}")
        self.budget, self.unit = self.limits("discounted")  # q; a cost of 1 per episode
        self.actor = TanhGaussianActor(init, o, a, c.hidden)
        self.vae = VAE(init, o, a, c.vae_hidden)
        self.critic = QEnsemble(init, o, a, c.hidden, 2)
        self.cost_critic = CostCritic(init, o, a, c.hidden)
        self.critic_target = self.target_of(self.critic)
        self.log_alpha = nn.Parameter(
            torch.tensor([math.log(start) for start in starts], device=self.device),
            requires_grad=False,
        )
        self.actor_optimizer = self.adam(self.actor, lr=c.actor_lr)
        self.vae_optimizer = self.adam(self.vae, lr=c.vae_lr)
        self.critic_optimizer = self.adam(self.critic, lr=c.critic_lr)
        self.cost_optimizer = self.adam(self.cost_critic.online, lr=c.critic_lr)

    def fit(self, dataset: Dataset, say: Callable[[str], None]) -> None:
        """Say what each limit is to the losses, and warn of negative rewards."""
        super().fit(dataset, say)
        lowest = float(self.spec.rewards(dataset.rewards).min())
        if lowest < 0:
            say(
                f"warning: training rewards go down to {lowest:g}, but CPQ gives an action that "
                "looks unsafe the value 0, which is better: shift them with reward_shift"
            )

    def learn(self, batch: Batch) -> Metrics:
        c = self.config
        s, a, costs = batch.observations, batch.actions, costs_of(batch)
        budget = self.budget[:, None]
        decoded, mean, log_std = self.vae(s, a, self.random.normal(a.shape[1], self.vae.latent_dim))
        error = (decoded - a).square().mean((1, 2))
        vae_loss = error + c.kl_weight * self.vae.divergence(mean, log_std).mean((1, 2))
        self.minimise(self.vae_optimizer, vae_loss)

        with torch.no_grad():
            next_observations = batch.next_observations
            next_actions = self.actor.sample(next_observations, self.random)
            next_q = self.critic_target(next_observations, next_actions).amin(1)
            next_cost = self.cost_critic.target(next_observations, next_actions).amax(1)
            not_done = 1 - batch.terminals
            target = batch.rewards + self.scalar("discount") * not_done * next_q * (
                next_cost <= budget
            )
            cost_target = costs + self.scalar("cost_discount") * not_done * next_cost
        q = self.critic(s, a)
        critic_loss = (q - target[:, None]).square().mean(-1).sum(1)
        self.minimise(self.critic_optimizer, critic_loss)

        actions, unlike = self.unlike(s)
        ood_cost = self.cost_critic.online.many(s, actions)  # [M, E, B, n]
        ood_cost = (ood_cost * unlike[:, None]).sum((2, 3)) / unlike.sum((1, 2))[:, None]
        goal = (self.scalar("ood_cost", 0) * self.budget)[:, None]
        alpha = self.log_alpha.exp()
        cost_error = self.cost_critic.loss(batch, cost_target)
        cost_loss = cost_error - alpha * (ood_cost - goal).sum(1)
        self.minimise(self.cost_optimizer, cost_loss)
        with torch.no_grad():
            step = c.alpha_lr * alpha * (goal - ood_cost).mean(1)
            self.log_alpha.add_(step).clamp_(-LOG_ALPHA, LOG_ALPHA)

        proposed = self.actor.sample(s, self.random)
        value = self.critic(s, proposed, frozen=True).amin(1)
        with torch.no_grad():
            cost = self.cost_critic(s, proposed)
            safe = (cost <= budget).to(value)
        actor_loss = -(safe * value).mean(-1)
        self.minimise(self.actor_optimizer, actor_loss)
        polyak(self.critic_target, self.critic, c.tau)
        self.cost_critic.follow(c.tau)
        return {
            "vae_loss": vae_loss.detach(),
            "critic_loss": critic_loss.detach(),
            "cost_critic_loss": cost_error.detach(),
            "actor_loss": actor_loss.detach(),
            "q": q.detach().mean((1, 2)),
            "alpha": alpha,
            "ood_cost": ood_cost.detach().mean(1) / self.unit,
            "safe_share": safe.mean(-1),
            "cost_estimate": cost.mean(-1) / self.unit,
        }

    @torch.no_grad()
    def unlike(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """n actions of the policy per state, ``[M, B, n, A]``, and 1 where one is in O, or 0."""
        rows, n = observations.shape[1], self.config.samples
        repeated = observations.repeat_interleave(n, 1)
        actions = self.actor.sample(repeated, self.random)
        divergence = self.vae.divergence(*self.vae.encode(repeated, actions)).sum(-1)
        rank = math.ceil(round(self.config.ood_quantile * (rows * n - 1), 6))
        threshold = divergence.sort(-1).values[:, rank, None]
        unlike = (divergence >= threshold).to(divergence)
        return actions.unflatten(1, (rows, n)), unlike.unflatten(1, (rows, n))
