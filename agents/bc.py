"""Behaviour cloning: supervised learning of the logged actions.

Continuous actions, π(s) = tanh f(s):

    L_π = mean (π(s) - a)²            over rows and action components

Discrete actions, p = softmax f(s):

    L_π = mean [-log p(a|s)]

``best_fraction`` < 1 trains on the episodes of highest return alone ("%BC", Chen et al. 2021,
arXiv 2106.01345): the first baseline to run where some logged episodes are good from start to end.

Deviations: episodes end where the dataset says so; CORL's any_percent_bc ends them at terminals and
after 1000 steps. A trailing fragment without an end has no return and is kept only by fraction 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from saferl.data.dataset import Dataset
from saferl.errors import SaferlError
from saferl.nn import CategoricalActor, DeterministicActor
from saferl.replay import Batch
from saferl.rng import MemberRandom

from .shared.agent import Agent, AgentConfig, Metrics


@dataclass(frozen=True)
class BCConfig(AgentConfig):
    """Defaults: CORL's any_percent_bc with all episodes."""

    normalize_observations: bool = True
    lr: float = 3e-4
    best_fraction: float = 1.0  # share of complete episodes kept, highest undiscounted return first


class _Cloning(Agent[Any]):
    Config: ClassVar[type[Any]] = BCConfig

    @classmethod
    def prepare(cls, dataset: Dataset, config: Any) -> Dataset:
        """The best ``config.best_fraction`` of the dataset's complete episodes (at least one)."""
        fraction = check_fraction(config.best_fraction)
        if fraction == 1:
            return dataset
        returns = np.asarray(dataset.episode_returns())
        keep = max(1, math.floor(fraction * len(returns)))
        best = np.argsort(-returns, kind="stable")[:keep]
        return dataset.subset(episodes=np.sort(best))

    def build(self, init: MemberRandom) -> None:
        actor = CategoricalActor if self.discrete else DeterministicActor
        sizes = self.spec.observation_dim, self.spec.action_dim, self.config.hidden
        self.actor = actor(init, *sizes)
        self.actor_optimizer = self.adam(self.actor, lr=self.config.lr)


class BC(_Cloning):
    """Continuous actions."""

    def learn(self, batch: Batch) -> Metrics:
        loss = (self.actor(batch.observations) - batch.actions).square().mean((1, 2))
        self.minimise(self.actor_optimizer, loss)
        return {"actor_loss": loss.detach()}


class DiscreteBC(_Cloning):
    """Discrete actions."""

    discrete = True

    def learn(self, batch: Batch) -> Metrics:
        log_prob = self.actor(batch.observations)
        loss = -log_prob.gather(-1, batch.actions[..., None]).mean((1, 2))
        self.minimise(self.actor_optimizer, loss)
        agree = (log_prob.detach().argmax(-1) == batch.actions).float().mean(-1)
        return {"actor_loss": loss.detach(), "agreement": agree}


def check_fraction(fraction: float) -> float:
    """A share of episodes.

    Raises:
        SaferlError: it is not above 0 and at most 1.
    """
    if not 0 < fraction <= 1:
        raise SaferlError(f"best_fraction = {fraction} is not in (0, 1]: 0.1 keeps a tenth")
    return fraction
