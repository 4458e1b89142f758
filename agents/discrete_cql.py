"""Conservative Q-Learning (Kumar et al. 2020, arXiv 2006.04779), discrete actions.

Double DQN with the penalty in closed form. For every critic e, a* = arg max_a mean_e Q_e(s', a):

    y_e     = r + γ (1 - terminal) Q̄_e(s', a*)
    gap_e   = mean [logsumexp_a Q_e(s, ·) - Q_e(s, a)]        ≥ 0, = mean -log softmax(Q_e)[a]
    L_Q     = Σ_e mean huber_κ(y_e - Q_e(s, a)) + w Σ_e gap_e
    Q̄      ← τ Q + (1 - τ) Q̄ each update;  τ = 0: Q̄ ← Q every target_interval updates

with huber_κ(u) = ½u² for |u| ≤ κ, else κ(|u| - ½κ). With ``quantiles`` = K > 0 the critic is
QR-DQN's (Dabney et al. 2017, arXiv 1710.10044): θ_i are quantiles at τ_i = (i + ½)/K, Q is their
mean (in the gap and in a* too), θ̄ the targets' at (s', a*), and the first term becomes

    mean Σ_i 1/K Σ_j |τ_i - 1(u_ij < 0)| huber_κ(u_ij) / κ,   u_ij = r + γ (1 - terminal) θ̄_j - θ_i

Variants of Yan et al. (NeurIPS 2025, arXiv 2505.16242): with a guardian g(s, a) ∈ {0, 1} of the
data (1: not supported), C = ``ood_value``, and the most frequent action of an episode its class,

    GCQL    Q̄_e(s', a*) in y_e is C where g(s', a*) = 1                              ``guardian``
    CCQL    episodes re-sampled, each class to the mean class size                   ``balance``
    GCCQL   both

Deviations:
- the official Atari code takes a* from the targets; ``double=false`` does that;
- a small perceptron replaces the convolutions, and Adam has torch's ε (1e-8);
- the default target is a Polyak average: hard copies every 2000 to 8000 updates suit runs of
  millions of updates.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from saferl.data.dataset import Dataset
from saferl.nn import DiscreteQEnsemble, polyak
from saferl.replay import Batch
from saferl.rng import MemberRandom
from saferl.runs.settings import parse_options
from saferl.safety.guardians.fitting import fit_guardian, guardian_for, split

from .shared.agent import Agent, AgentConfig, Metrics
from .shared.ood_table import OODTable


@dataclass(frozen=True)
class DiscreteCQLConfig(AgentConfig):
    """Defaults: ours, for vector observations; docs/agents/discrete_cql.md has the published."""

    normalize_observations: bool = True
    lr: float = 3e-4
    critics: int = 1  # ensemble size E
    weight: float = 1.0  # w of the penalty; 4.0 was used for the smallest Atari data
    double: bool = True  # the online critics choose a*; False: the targets do
    quantiles: int = 0  # K of QR-DQN; 0 learns expected values alone
    huber: float = 1.0  # κ, in units of Q
    tau: float = 0.005  # Polyak rate of the targets per update; 0: copy them instead
    target_interval: int = 8000  # updates between copies where tau = 0
    guardian: str = "none"  # g: a name of make_guardian; its fields are as in ogsrl
    guardian_options: str = ""  # of make_guardian, as in "bandwidth=0.15 scaling=minmax"
    levels: tuple[int, ...] = ()  # of the factors of an action; none: actions have no order
    alpha: float = 0.1  # share of supported steps that g may flag
    calibration: float = 0.2  # share of episodes kept aside for alpha
    ood_value: float = -25.0  # C, in units of Q
    balance: bool = False  # re-sample episodes by their most frequent action


class DiscreteCQL(Agent[DiscreteCQLConfig]):
    Config = DiscreteCQLConfig
    discrete = True
    renamed_state: ClassVar[dict[str, str]] = {
        "answers.outside": "ood_table.flagged",
        "answers": "ood_table",
    }
    per_member = frozenset({"weight", "discount", "ood_value"})
    shared = frozenset({"ood_table."})
    ood_table: Any = None  # `OODTable` of g, None without a guardian

    @classmethod
    def prepare(cls, dataset: Dataset, config: Any) -> Dataset:
        """All of the dataset, or its episodes re-sampled."""
        dataset = super().prepare(dataset, config)
        return balanced(dataset) if config.balance else dataset

    def build(self, init: MemberRandom) -> None:
        c, o, n = self.config, self.spec.observation_dim, self.spec.action_dim
        self.actor = DiscreteQEnsemble(init, o, n, c.hidden, c.critics, c.quantiles)
        self.critic_target = self.target_of(self.actor)
        self.critic_optimizer = self.adam(self.actor, lr=c.lr)
        count = max(1, c.quantiles)
        self.midpoints = ((torch.arange(count) + 0.5) / count).to(self.device)
        if c.guardian != "none":
            settings = parse_options(c.guardian_options)
            self.ood_table = OODTable(guardian_for(c.guardian, self.spec, c.levels, **settings))
            mean = self.spec.observation_mean or (0.0,) * o
            std = self.spec.observation_std or (1.0,) * o
            self._mean, self._std = torch.tensor((mean, std), device=self.device)

    @property
    def guardian(self) -> Any:
        """g, calibrated once the agent is fitted."""
        return None if self.ood_table is None else self.ood_table.guardian

    def fit(self, dataset: Dataset, say: Callable[[str], None]) -> None:
        """Fit the guardian to the episodes that are trained on, each counted once.

        Raises:
            SaferlError: fewer than two different episodes; data that the guardian refuses.
        """
        super().fit(dataset, say)
        if self.ood_table is None:
            return
        c = self.config
        train, held = split(without_repeats(dataset) if c.balance else dataset, c.calibration)
        fit_guardian(self.guardian, train, held, c.alpha, say)
        self.ood_table.fill(dataset, self.spec.action_dim, self.spec.observations)

    def _is_ood(self, observations: Tensor, actions: Tensor) -> Tensor:
        """g ``[M, B]`` of normalised observations ``[M, B, O]`` and actions ``[M, B]``."""
        if self.ood_table.flagged is None:  # no table: the guardian reads raw observations
            observations = observations * self._std + self._mean
        return self.ood_table.ood(observations, actions)

    @staticmethod
    def _taken(distribution: Tensor, actions: Tensor) -> Tensor:
        """``[M, E, B, actions, K]`` at actions ``[M, B]`` to ``[M, E, B, K]``."""
        index = actions[:, None, :, None, None].expand(*distribution.shape[:3], 1, 1)
        return distribution.take_along_dim(index, 3).squeeze(3)

    def update_key(self, update: int) -> bool:
        """Whether the targets are copied, where they are not averaged."""
        return not self.config.tau and update % self.config.target_interval == 0

    def learn(self, batch: Batch) -> Metrics:
        c = self.config
        with torch.no_grad():
            next_q = self.critic_target.distribution(batch.next_observations)
            chooser = self.actor if c.double else self.critic_target
            best = chooser.mode(batch.next_observations)
            next_taken = self._taken(next_q, best)
            if self.ood_table is not None:
                ood = self._is_ood(batch.next_observations, best)
                refused = self.scalar("ood_value", axes=3)
                next_taken = torch.where(ood[:, None, :, None] > 0, refused, next_taken)
            discount = (self.scalar("discount") * (1 - batch.terminals))[:, None, :, None]
            target = batch.rewards[:, None, :, None] + discount * next_taken

        distribution = self.actor.distribution(batch.observations)
        taken = self._taken(distribution, batch.actions)  # [M, E, B, K]
        bellman = self._bellman(taken, target).mean(-1).sum(1)
        values, q = distribution.mean(-1), taken.mean(-1)
        gap = (values.logsumexp(-1) - q).mean(-1)  # [M, E]
        loss = bellman + (self.scalar("weight") * gap).sum(1)
        self.minimise(self.critic_optimizer, loss)
        if c.tau:
            polyak(self.critic_target, self.actor, c.tau)
        elif self.key:
            polyak(self.critic_target, self.actor, 1.0)
        metrics = {
            "critic_loss": bellman.detach(),
            "gap": gap.detach().mean(1),
            "q": q.detach().mean((1, 2)),
        }
        return metrics | ({} if self.ood_table is None else {"ood_rate": ood.mean(1)})

    def _bellman(self, taken: Tensor, target: Tensor) -> Tensor:
        """The loss of each row, ``[M, E, B]``, from predictions and targets ``[M, E, B, K]``."""
        c = self.config
        if not c.quantiles:
            return F.huber_loss(taken, target, reduction="none", delta=c.huber).squeeze(-1)
        error = target[..., None, :] - taken[..., None]  # u_ij: i predicted, j target
        side = (self.midpoints[:, None] - (error.detach() < 0).float()).abs()
        huber = F.huber_loss(error, torch.zeros_like(error), reduction="none", delta=c.huber)
        return (side * huber / c.huber).mean(-1).sum(-1)


def balanced(dataset: Any) -> Any:
    """Episodes re-sampled so that every class has the mean class size.

    The class of an episode is its most frequent action (the lowest of several). Small classes are
    drawn from with replacement, large ones without. The same for every member and run.
    """
    labels = np.array([np.bincount(dataset.actions[a:b]).argmax() for a, b in dataset.episodes])
    classes = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    size, random = max(1, round(len(labels) / len(classes))), np.random.default_rng(0)
    drawn = [random.choice(those, size, replace=len(those) < size) for those in classes]
    return dataset.subset(episodes=np.sort(np.concatenate(drawn)))


def without_repeats(dataset: Any) -> Any:
    """The episodes that differ from the one before: what `balanced` drew, once."""

    def rows(span: np.ndarray) -> tuple[np.ndarray, ...]:
        part = slice(*span)
        return dataset.observations[part], dataset.actions[part], dataset.next_observations[part]

    pairs = itertools.pairwise(dataset.episodes)
    fresh = [True, *(not all(map(np.array_equal, rows(a), rows(b))) for a, b in pairs)]
    return dataset.subset(episodes=np.flatnonzero(fresh))
