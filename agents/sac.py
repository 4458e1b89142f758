"""Soft Actor-Critic (Haarnoja et al. 2018, arXiv 1812.05905) and what its relatives share.

One update takes K = ``inner_steps`` critic steps, each on a batch of its own. With noise-free
targets Q̄ (Polyak average), a' ~ π(·|s'), p ~ π(·|s), H̄ = ``target_entropy`` · dim(a), Z the critics
of the target (all E of them, or ``target_critics`` drawn anew for each step), a step is, in order:

    y       = r - κ c + γ (1 - terminal) [min_{e ∈ Z} Q̄_e(s', a') - α log π(a'|s')]
              without ``entropy_backup`` the last term is 0
    L_Q     = Σ_e mean (Q_e(s, a) - y)²                                    step Q
    L_π     = mean [α log π(p|s) - min_e Q_e(s, p)]                        step π; or mean_e
    L_α     = -log α · mean (log π(p|s) + H̄)                               step log α
    Q̄      ← τ Q + (1 - τ) Q̄

From pixels, s and s' are features of shifted images (agents/shared/pixels.py): L_Q moves their
encoder, and the actor's step sees it after that, without a gradient.

π and α are stepped with every critic step, or once per update, after the last, on its batch or on
all rows of the update (``actor_steps``).

κ (``cost_penalty``) is ours: a fixed price per unit of cost, 0 by default. With one κ per member,
one run gives behaviours from fast and costly to slow and safe. Under a limit (``cost_limit``, ours)
L_π has P = (Q - ρ k Qc) / (1 + ρ) in place of Q, with Qc, k and the multiplier ρ of
agents/shared/constraint.py:

    L_Qc = Σ_e mean (Qc_e(s, a) - y_c)²     before L_Q, same a';  step ρ on J = mean Qc(s, p) last
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saferl.data.dataset import Dataset
from saferl.errors import SaferlError, unknown
from saferl.nn import QEnsemble, TanhGaussianActor, orthogonal, polyak, torch_default, xavier
from saferl.replay import Batch
from saferl.rng import MemberRandom
from saferl.safety.limits import no_costs

from .shared.agent import Metrics
from .shared.config import at_least, member_values
from .shared.constraint import CostConfig, CostLimited
from .shared.online import OnlineConfig
from .shared.pixels import PixelAgent, PixelConfig

ACTOR_STEPS = ("each", "last", "all")
ACTOR_VALUES = ("min", "mean")
INITS = {"torch": torch_default, "xavier": xavier(), "orthogonal": orthogonal()}


@dataclass(frozen=True)
class SACConfig(CostConfig, OnlineConfig, PixelConfig):
    """Defaults: the authors' second version; where there is a dataset, it is half of each batch."""

    inner_steps: int = 1  # K, critic steps per update, each on a batch of its own
    fresh_batches: bool = True  # False: all critic steps of an update see one batch
    critic_hidden: tuple[int, ...] = ()  # units of each critic's hidden layers; empty: as hidden
    actor_lr: float = 3e-4
    critic_lr: float = 3e-4
    temperature_lr: float = 3e-4
    initial_temperature: float = 1.0  # α at the start
    target_entropy: float = -1.0  # H̄ per action component, nats
    tau: float = 0.005  # Polyak rate of the target critics per critic step
    critics: int = 2  # ensemble size E
    target_critics: int = 0  # critics Z whose least is the target, drawn for each step; 0: all
    target_replacement: bool = False  # whether one of Z may be drawn twice
    actor_value: str = "min"  # of the ensemble in the actor's loss; or mean
    actor_steps: str = "each"  # with every critic step; last, all: once per update, on those rows
    entropy_backup: bool = True  # -α log π(a'|s') in the target
    actor_layer_norm: bool = False
    critic_layer_norm: bool = False
    init: str = "torch"  # of all layers; or xavier, orthogonal
    log_std_min: float = -5.0  # lower clip of log σ
    scale_log_std: bool = False  # trained m and c in log σ = m f(s) + c, as CQL's actor has them
    cost_penalty: float = 0.0  # κ, reward units per unit of cost

    def __post_init__(self):
        super().__post_init__()
        for name, known in (("actor_steps", ACTOR_STEPS), ("actor_value", ACTOR_VALUES),
                            ("init", INITS)):  # fmt: skip
            if getattr(self, name) not in known:
                raise unknown(name, getattr(self, name), known)
        at_least(self, "inner_steps", 1)
        if not 0 <= self.target_critics <= self.critics or self.critics < 1:
            raise SaferlError(
                f"the target takes target_critics = {self.target_critics} of critics = "
                f"{self.critics}: give 1 or more critics, and 0 (all) to as many for the target"
            )

    @property
    def critic_steps(self) -> int:
        return self.inner_steps


class SAC(CostLimited[SACConfig], PixelAgent[SACConfig]):
    Config = SACConfig
    online = True
    needs_dataset = False
    pixels = None
    per_member = frozenset(
        {"discount", "cost_penalty", "cost_limit", "cost_discount", "multiplier_lr"}
        | {"exploration_budget"}
    )

    @classmethod
    def prepare(cls, dataset: Dataset, config: Any) -> Dataset:
        """All of the dataset.

        Raises:
            SaferlError: it has no costs, and a limit or a price for them is set.
        """
        if any(member_values(config, "cost_penalty")) and dataset.costs is None:
            raise SaferlError(no_costs(dataset.card.id, "a cost_penalty"))
        return super().prepare(dataset, config)

    def build(self, init: MemberRandom) -> None:
        c, o, a = self.config, self.inputs, self.spec.action_dim
        fill = INITS[c.init]
        actor = TanhGaussianActor(
            init, o, a, c.hidden, c.log_std_min, final_init=fill, scale_log_std=c.scale_log_std,
            layer_norm=c.actor_layer_norm, hidden_init=fill,
        )  # fmt: skip
        hidden = c.critic_hidden or c.hidden
        critic = QEnsemble(init, o, a, hidden, c.critics, c.critic_layer_norm, fill, fill)
        self.actor, self.critic = self.behind_pixels(init, actor, critic)
        self.critic_target = self.target_of(self.critic)
        start = torch.full((self.members,), float(c.initial_temperature)).log()
        self.log_temperature = nn.Parameter(start.to(self.device))
        self.actor_optimizer = self.adam(*self.moved_by_actor(), lr=c.actor_lr)
        self.critic_optimizer = self.adam(*self.moved_by_critics(), lr=c.critic_lr)
        self.temperature_optimizer = self.adam(self.log_temperature, lr=c.temperature_lr)
        if self.spec.image and any(map(math.isfinite, self.column("cost_limit"))):
            raise SaferlError(
                "a cost_limit is kept from vectors only: leave it out, or price costs with "
                "cost_penalty"
            )
        self.build_costs(init, hidden, c.critic_lr)

    def uses_costs(self) -> bool:
        return self.constraint is not None or any(self.column("cost_penalty"))

    @property
    def batch_rows(self) -> int:
        return self.config.batch_size * (
            self.config.inner_steps if self.config.fresh_batches else 1
        )

    def learn(self, batch: Batch) -> Metrics:
        return self.inner_loop(batch)

    def inner_loop(self, batch: Batch) -> Metrics:
        """The K critic steps of an update, and the actor's; the mean of each metric."""
        c, last = self.config, self.config.inner_steps - 1
        sums: dict[str, list[Tensor]] = {}
        for k, part in enumerate(self.parts(batch)):
            metrics, q = self.step_critics(part)
            if c.actor_steps == "each" or k == last:
                metrics |= self.step_actor(batch if c.actor_steps == "all" else part, q)
            self.follow(c.tau)
            for name, value in metrics.items():
                sums.setdefault(name, []).append(value)
        return {n: v[0] if len(v) == 1 else torch.stack(v).mean(0) for n, v in sums.items()}

    def follow(self, rate: float) -> None:
        """Move the targets towards the critics, after each critic step."""
        polyak(self.critic_target, self.critic, rate)
        if self.constraint is not None:
            self.cost_critic.follow(rate)

    def parts(self, batch: Batch) -> Iterator[Batch]:
        """The K batches of an update, which are all the same without ``fresh_batches``."""
        k, rows = self.config.inner_steps, self.config.batch_size
        for i in range(k):
            yield batch.rows(i * rows, (i + 1) * rows) if self.batch_rows > rows else batch

    def temperature(self) -> Tensor:
        """α ``[M, 1]``, a constant."""
        return self.log_temperature.detach().exp()[:, None]

    def noise(self, batch: Batch) -> Tensor:
        return self.random.normal(batch.rewards.shape[1], self.spec.action_dim)

    def step_critics(self, batch: Batch) -> tuple[Metrics, Tensor]:
        """Step Q, and Qc under a limit; metrics, and Q_e(s, a) ``[M, E, B]`` before the step."""
        batch = self.seen(batch)
        target, next_actions = self.target(batch)
        metrics = {}
        if self.constraint is not None:
            _, metrics["cost_critic_loss"] = self.learn_costs(batch, next_actions)
        loss, q = self.critic_loss(batch, target)
        self.minimise(self.critic_optimizer, loss)
        return metrics | {"critic_loss": loss.detach(), "q": q.mean((1, 2))}, q

    def critic_loss(self, batch: Batch, target: Tensor) -> tuple[Tensor, Tensor]:
        """L_Q ``[M]``, and Q_e(s, a) ``[M, E, B]`` without a gradient."""
        q = self.critic(batch.observations, batch.actions)
        return (q - target[:, None]).square().mean(-1).sum(1), q.detach()

    @torch.no_grad()
    def target(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """y ``[M, B]``, and the actions a' ``[M, B, A]`` at s' that it values."""
        c = self.config
        mean, log_std = self.actor(batch.next_observations)
        actions, log_prob = TanhGaussianActor.squash(mean, log_std, self.noise(batch))
        q = self.critic_target(batch.next_observations, actions)
        if 0 < c.target_critics < c.critics:
            if c.target_replacement:
                chosen = self.random.integers(c.critics, c.target_critics)
            else:
                chosen = self.random.uniform(c.critics).topk(c.target_critics).indices
            q = q.gather(1, chosen[..., None].expand(-1, -1, q.shape[-1]))
        next_q = q.amin(1)
        if c.entropy_backup:
            next_q = next_q - self.temperature() * log_prob
        rewards = batch.rewards
        if batch.costs is not None:
            rewards = rewards - self.scalar("cost_penalty") * batch.costs
        discounted = self.scalar("discount") * (1 - batch.terminals)
        return rewards + discounted * next_q, actions

    def step_actor(self, batch: Batch, q: Tensor) -> Metrics:
        """Step π, log α and, under a limit, ρ. ``q``: Q_e(s, a) of a batch, the unit of costs."""
        temperature = self.temperature()
        loss, entropy, cost = self.actor_loss(self.seen_by_actor(batch), q)
        self.minimise(self.actor_optimizer, loss)
        target = self.config.target_entropy * self.spec.action_dim
        self.minimise(self.temperature_optimizer, self.log_temperature * (entropy - target))
        metrics = {
            "actor_loss": loss.detach(),
            "entropy": entropy,
            "temperature": temperature[:, 0],
        }
        if self.constraint is not None:
            metrics |= self.constraint.step(cost)
        return metrics

    def actor_loss(self, batch: Batch, q: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """L_π, and without a gradient the policy's entropy and under a limit J, each ``[M]``."""
        observations, cost = batch.observations, None
        mean, log_std = self.actor(observations)
        actions, log_prob = TanhGaussianActor.squash(mean, log_std, self.noise(batch))
        values = self.critic(observations, actions, frozen=True)
        value = values.amin(1) if self.config.actor_value == "min" else values.mean(1)
        if self.constraint is not None:
            cost = self.cost_critic(observations, actions)
            of_value, of_cost = self.constraint.weights(q[:, 0])
            value = of_value * value - of_cost * cost
            cost = cost.detach().mean(-1)
        loss = (self.temperature() * log_prob - value).mean(-1)
        return loss, -log_prob.detach().mean(-1), cost
