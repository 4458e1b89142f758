"""What actor-critics under a cost limit share: the limit, a cost critic and the multiplier.

With c the cost of a step, T the steps of an episode (``Spec.horizon``), γ_c the discount of costs
and d the limit L as a discounted budget (`saferl.safety.limits.convert`):

    y_c  = c + γ_c (1 - terminal) max_e Q̄c_e(s', a')       timeouts bootstrap, terminals do not
    L_Qc = Σ_e mean (Qc_e(s, a) - y_c)²
    J    = mean max_e Qc_e(s, π(s))                         over the rows of a batch
    e    = (J - d) / (|J| + d)                              what moves the multiplier ρ
    P    = (Q - ρ k max_e Qc_e) / (1 + ρ),   k = mean |Q(s, a)| / (c̄ Σ_{t<T} γ_c^t)

The largest of the ensemble is the pessimistic one for costs. c̄ is the mean cost of a logged step,
a running mean over the batches, and 0 / 0 counts as 0 in k.

Gains of the multiplier have no unit: e lies in [-1, 1] and is tanh(½ log(J / d)), so twice the
budget weighs as much as half of it, at every limit (0 included) and in every unit of cost; and k
states costs in the critic's unit of reward, so at ρ = 1 the cost that the data spend on average
weighs as much as their whole return, whatever the scale of either.

J averages over logged states, not over those that π visits: it is above π's own cost where the data
dwell in costly states that π would leave, and below it where π goes to costlier ones than the data.
It also stands for T steps, so of episodes that terminate earlier it says too much. Whether a limit
is met is for the evaluation to say.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from saferl.data.dataset import Dataset
from saferl.errors import SaferlError
from saferl.nn import QEnsemble, polyak
from saferl.replay import Batch
from saferl.rng import MemberRandom
from saferl.safety.limits import check_limit, convert, no_costs, relative_excess
from saferl.safety.multipliers import Multipliers

from .agent import Agent
from .config import AgentConfig, member_values

Weights = tuple[Tensor, Tensor]  # of Q and of Qc in P, each [M, 1]


@dataclass(frozen=True)
class CostConfig(AgentConfig):
    """Fields of agents that may be held to a limit."""

    cost_limit: float = math.inf  # expected undiscounted cost per episode; inf: no limit
    cost_discount: float = 0.99  # γ_c, per environment step, below 1
    multiplier: str = "gradient"  # how ρ moves: gradient, softplus or pid
    multiplier_lr: float = 1e-3  # rate of ρ per actor update; pid: gain of the integral
    multiplier_kp: float = 0.1  # pid: gain of the excess
    multiplier_kd: float = 0.001  # pid: gain of its rise
    multiplier_max: float = 100.0  # upper bound of ρ


CostConfigT = TypeVar("CostConfigT", bound=CostConfig)


class CostCritic(nn.Module):
    """Ensemble of critics of the discounted cost and their target; the largest one counts."""

    def __init__(
        self,
        init: MemberRandom,
        observation_dim: int,
        action_dim: int,
        hidden: tuple[int, ...],
        ensemble: int = 2,
    ):
        super().__init__()
        self.online = QEnsemble(init, observation_dim, action_dim, hidden, ensemble)
        self.target = Agent.target_of(self.online)

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        """max_e Qc_e, ``[M, B, O], [M, B, A]`` to ``[M, B]``."""
        return self.online(observations, actions, frozen=True).amax(1)

    @torch.no_grad()
    def backup(
        self, batch: Batch, discount: float | Tensor, next_actions: Tensor, online: bool = False
    ) -> Tensor:
        """c + γ_c (1 - terminal) max_e Qc_e(s', a'), ``[M, B]``; target's unless ``online``."""
        critic = self.online if online else self.target
        next_cost = critic(batch.next_observations, next_actions).amax(1)
        return batch.costs + discount * (1 - batch.terminals) * next_cost

    def loss(self, batch: Batch, backup: Tensor) -> Tensor:
        """Σ_e mean (Qc_e(s, a) - y_c)², ``[M]``."""
        q = self.online(batch.observations, batch.actions)
        return (q - backup[:, None]).square().mean(-1).sum(1)

    def follow(self, rate: float) -> None:
        """Move the target towards the critic."""
        polyak(self.target, self.online, rate)


class Constraint(nn.Module):
    """A limit on the expected cost of an episode for each member, and its multiplier ρ.

    A member without a limit (inf) has ρ = 0 throughout.

    Args:
        config: a `CostConfig`, whose numbers may hold one value per member.
        horizon: T, steps of an episode.

    Raises:
        SaferlError: a bad limit, discount, gain or kind; no horizon.
    """

    episode: Tensor
    steps: Tensor
    budget: Tensor
    cost_mean: Tensor
    batches: Tensor

    def __init__(self, config: CostConfig, members: int, horizon: int):
        super().__init__()

        def column(name: str) -> list[float]:
            return member_values(config, name, members)

        limits = [check_limit(limit, infinite=True) for limit in column("cost_limit")]
        for discount in column("cost_discount"):
            if not 0 <= discount < 1:
                raise SaferlError(f"cost_discount lies between 0 and below 1, got {discount:g}")
        # A cost of 1 per episode and of 1 per step as a critic sees them, [M].
        episode, step = (
            torch.tensor(
                [
                    convert(1.0, "discounted", horizon=horizon, discount=discount, unit=unit)
                    for discount in column("cost_discount")
                ]
            )
            for unit in ("episode", "step")
        )
        self.register_buffer("episode", episode, persistent=False)
        self.register_buffer("steps", step, persistent=False)  # Σ_{t<T} γ_c^t
        self.register_buffer("budget", torch.tensor(limits) * episode, persistent=False)  # d
        self.register_buffer("cost_mean", torch.zeros(members))  # c̄
        self.register_buffer("batches", torch.zeros(members))
        self.multipliers = Multipliers(
            members,
            kind=config.multiplier,
            lr=torch.tensor(column("multiplier_lr")),
            kp=torch.tensor(column("multiplier_kp")),
            kd=torch.tensor(column("multiplier_kd")),
            maximum=torch.tensor(column("multiplier_max")),
        )

    @torch.no_grad()
    def observe(self, costs: Tensor) -> None:
        """Take the costs ``[M, B]`` of a batch into c̄."""
        self.batches.add_(1)
        self.cost_mean.add_((costs.mean(-1) - self.cost_mean) / self.batches)

    def multiplier(self) -> Tensor:
        """ρ, ``[M]``."""
        return self.multipliers.value()[:, 0].masked_fill(self.budget.isinf(), 0.0)

    @torch.no_grad()
    def weights(self, q: Tensor) -> Weights:
        """1 / (1 + ρ) and ρ k / (1 + ρ), each ``[M, 1]``; ``q`` is Q(s, a), ``[M, B]``."""
        rho = self.multiplier()
        spent = self.cost_mean * self.steps
        k = (q.abs().mean(-1) / spent).masked_fill(spent <= 0, 0.0)
        return (1 / (1 + rho))[:, None], (rho * k / (1 + rho))[:, None]

    def excess(self, cost: Tensor) -> Tensor:
        """e of estimates J ``[M]`` of the discounted cost; -1 where there is no limit."""
        return relative_excess(cost, self.budget)

    @torch.no_grad()
    def step(self, cost: Tensor) -> dict[str, Tensor]:
        """Move ρ by the excess of J ``[M]``.

        Returns metrics ``[M]``: ``multiplier`` after the step, ``cost_estimate`` (J in the user's
        unit, per episode) and ``cost_excess`` (e).
        """
        excess = self.excess(cost)
        self.multipliers.update(excess[:, None])
        return {
            "multiplier": self.multiplier(),
            "cost_estimate": cost / self.episode,
            "cost_excess": excess,
        }


class CostLimited(Agent[CostConfigT]):
    """An agent that takes a ``cost_limit``.

    ``self.constraint`` is None where no member has a limit: then there is no cost critic either,
    and no random number is drawn for one.
    """

    constraint: Any = None  # a `Constraint`
    cost_critic: CostCritic
    cost_optimizer: torch.optim.Adam

    @classmethod
    def prepare(cls, dataset: Dataset, config: Any) -> Dataset:
        """All of the dataset.

        Raises:
            SaferlError: it has no costs and a limit is set.
        """
        if _limits(config) and dataset.costs is None:
            raise SaferlError(no_costs(dataset.card.id))
        return super().prepare(dataset, config)

    def build_costs(self, init: MemberRandom, hidden: tuple[int, ...], lr: float) -> None:
        """Make `constraint`, `cost_critic` and its optimiser where a limit is set.

        Call it last in ``build``: without a limit ``init`` is not drawn from.
        """
        if not _limits(self.config):
            return
        spec = self.spec
        self.constraint = Constraint(self.config, self.members, spec.horizon)
        self.cost_critic = CostCritic(init, spec.observation_dim, spec.action_dim, hidden)
        self.cost_optimizer = self.adam(self.cost_critic.online, lr=lr)

    def cost_backup(self, batch: Batch, next_actions: Tensor) -> Tensor:
        """y_c ``[M, B]``."""
        return self.cost_critic.backup(batch, self.scalar("cost_discount"), next_actions)

    def learn_costs(self, batch: Batch, next_actions: Tensor) -> tuple[Tensor, Tensor]:
        """Step the cost critic, and take the costs into c̄.

        Args:
            next_actions: a' ``[M, B, A]``, the policy's at s'.

        Returns:
            y_c ``[M, B]`` and the loss ``[M]``.
        """
        self.constraint.observe(costs_of(batch))
        backup = self.cost_backup(batch, next_actions)
        loss = self.cost_critic.loss(batch, backup)
        self.minimise(self.cost_optimizer, loss)
        return backup, loss.detach()


def costs_of(batch: Batch) -> Tensor:
    """The costs ``[M, B]`` of a batch.

    Raises:
        SaferlError: it has none.
    """
    if batch.costs is None:
        raise SaferlError(no_costs("the batch"))
    return batch.costs


def _limits(config: CostConfig) -> list[float]:
    """The finite limits of the members, checked."""
    checked = [check_limit(v, infinite=True) for v in member_values(config, "cost_limit")]
    return [limit for limit in checked if limit < math.inf]
