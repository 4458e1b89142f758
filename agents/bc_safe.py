"""BC-Safe: behaviour cloning of the logged episodes that keep the cost limit.

With C_i and R_i the undiscounted cost and return of the whole episode that row i is from, L the
member's limit, R_L what the best ``best_fraction`` of the episodes that keep L return at least
(-∞ at 1, the default) and π(s) = tanh f(s):

    w_i = 1[C_i ≤ L] 1[R_i ≥ R_L]
    L_π = Σ_i w_i mean_j (π(s_i)_j - a_ij)² / max(Σ_i w_i, 1)            over rows, components j

A comparator of the DSRL benchmark (Liu et al. 2023, arXiv 2306.09303): a deterministic tanh
perceptron, squared error, Adam at 1e-3. Members that differ by their seed alone share a buffer of
what their limit lets pass, and w is 1 throughout. Where limits differ the buffer has what the
largest lets pass, and each member leaves out by w what its own does not. Given how many rows of a
batch pass, they are a uniform sample of the filtered data, so the gradient is that of cloning those
alone with smaller batches; but which rows a member draws depends on the limits beside it.

Deviations: none known at ``best_fraction`` 1. Below it is %BC (Chen et al. 2021, arXiv 2106.01345)
among the episodes that keep the limit, which is ours: among those are failed ones that cost nothing
because they achieve nothing. DSRL's other filters (risky, boundary, frontier, multi-task) are not
here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from saferl.data.buffer import Batch
from saferl.errors import SaferlError
from saferl.rng import MemberRandom
from saferl.safety.limits import check_limit, no_costs

from .base import AgentConfig, Metrics, per_member
from .bc import BC, check_fraction
from .costs import costs_of


@dataclass(frozen=True)
class BCSafeConfig(AgentConfig):
    """Defaults: OSRL's."""

    batch_size: int = 512
    lr: float = 1e-3
    cost_limit: float = 10.0  # largest undiscounted cost of an episode that is cloned; inf: all
    best_fraction: float = 1.0  # share of those episodes that is cloned, highest return first


class BCSafe(BC):
    Config = BCSafeConfig
    variants = frozenset({"cost_limit", "best_fraction"})
    needs_costs: ClassVar[bool] = True

    @classmethod
    def prepare(cls, dataset: Any, config: BCSafeConfig) -> Any:
        """The complete episodes; cost and reward of a row become those of its whole episode.

        A trailing fragment without an end has no cost to compare and is left out.

        Raises:
            SaferlError: no costs, a bad limit or fraction, or a limit that no episode keeps.
        """
        for fraction in per_member(config, "best_fraction"):
            check_fraction(fraction)
        if dataset.costs is None:
            raise SaferlError(no_costs(dataset.card.id))
        limits = _limits(config)
        if not len(dataset.episodes):
            raise SaferlError(
                f"{dataset.card.id} has no complete episode, so none keeps a cost limit: mark "
                "where episodes end with terminals or timeouts"
            )
        costs = dataset.episode_costs().astype(np.float32)  # as the buffer will hold them
        if costs.min() > np.float32(min(limits)):
            raise SaferlError(
                f"no episode of {dataset.card.id} costs {min(limits):g} or less: the lowest cost "
                f"of one is {costs.min():g}, so pass a cost_limit of at least that"
            )
        returns = dataset.episode_returns().astype(np.float32)
        keep = costs <= np.float32(max(limits))
        if _alike(config):
            fraction = per_member(config, "best_fraction")[0]
            keep &= returns >= least_return(returns[keep], fraction)
        lengths = dataset.episode_lengths()[keep]
        rows = dataset.subset(episodes=np.flatnonzero(keep))
        rows = rows.with_costs(np.repeat(costs[keep], lengths))
        return rows.with_rewards(np.repeat(returns[keep], lengths))

    def build(self, init: MemberRandom) -> None:
        super().build(init)
        # R_L, a parameter so that it goes with its member when members are taken apart.
        least = torch.full((self.members,), torch.finfo().min, device=self.device)
        self.least_return = nn.Parameter(least, requires_grad=False)

    def fit(self, dataset: Any, say: Callable[[str], None]) -> None:
        """Find R_L of each member, and say how much it clones."""
        first = dataset.episodes[:, 0]
        rewards = self.spec.rewards(dataset.rewards)
        told = {}
        pairs = zip(self.column("cost_limit"), self.column("best_fraction"))
        for member, (limit, fraction) in enumerate(pairs):
            within = dataset.costs <= np.float32(limit)
            if fraction < 1:
                # Where all members clone the same, `prepare` has left out the rest.
                share = 1.0 if _alike(self.config) else fraction
                least = least_return(rewards[first][within[first]], share)
                self.least_return[member] = float(least)
                within &= rewards >= least
            best = "" if fraction == 1 else f", best {fraction:.0%}"
            told[limit, fraction] = (
                f"cost limit {limit:g}{best}: clones {within[first].sum()} episodes, "
                f"{within.sum()} rows"
            )
        for line in told.values():
            say(line)

    def learn(self, batch: Batch) -> Metrics:
        within = costs_of(batch) <= self.scalar("cost_limit")
        within = (within & (batch.rewards >= self.least_return[:, None])).to(batch.actions)
        error = (self.actor(batch.observations) - batch.actions).square().mean(-1)
        loss = (within * error).sum(-1) / within.sum(-1).clamp_min(1)
        self.minimise(self.actor_optimizer, loss)
        return {"actor_loss": loss.detach(), "kept_share": within.mean(-1)}


def _limits(config: BCSafeConfig) -> list[float]:
    return [check_limit(value, infinite=True) for value in per_member(config, "cost_limit")]


def _alike(config: BCSafeConfig) -> bool:
    """Whether all members clone the same."""
    return all(
        not isinstance(value, (list, tuple)) or len(set(value)) == 1
        for value in (config.cost_limit, config.best_fraction)
    )


def least_return(returns: np.ndarray, fraction: float) -> np.floating:
    """What the best ``fraction`` of the episodes, and one at least, return at least."""
    return np.sort(returns)[::-1][max(1, math.floor(fraction * len(returns))) - 1]
