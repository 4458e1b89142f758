"""BC-Safe: behaviour cloning of the logged episodes that keep the cost limit.

With C_i and R_i the undiscounted cost and return of the whole episode that row i is from, L the
member's limit and R_L what the best ``best_fraction`` of the episodes that keep L return at least
(-∞ at 1, the default), the rows

    {i: C_i ≤ L and R_i ≥ R_L}

are cloned as `saferl.agents.bc` does, with π(s) = tanh f(s):

    L_π = mean (π(s) - a)²            over rows and action components

A comparator of the DSRL benchmark (Liu et al. 2023, arXiv 2306.09303): a deterministic tanh
perceptron, squared error, Adam at 1e-3. Each member draws from the rows of its own limit.

Deviations: none known at ``best_fraction`` 1; observations, where they are standardised, are by the
statistics of the whole dataset. Below 1 it is %BC (Chen et al. 2021, arXiv 2106.01345) among
the episodes that keep the limit, which is ours: among those are failed ones that cost nothing
because they achieve nothing. DSRL's other filters (risky, boundary, frontier, multi-task) are not
here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from saferl.data.dataset import Dataset
from saferl.errors import SaferlError
from saferl.safety.limits import check_limit, no_costs

from .bc import BC, check_fraction
from .shared.config import AgentConfig, member_values


@dataclass(frozen=True)
class BCSafeConfig(AgentConfig):
    """Defaults: OSRL's."""

    batch_size: int = 512
    lr: float = 1e-3
    cost_limit: float = 10.0  # largest undiscounted cost of an episode that is cloned; inf: all
    best_fraction: float = 1.0  # share of those episodes that is cloned, highest return first


class BCSafe(BC):
    Config = BCSafeConfig
    per_member = frozenset({"cost_limit", "best_fraction"})
    needs_costs: ClassVar[bool] = True

    @classmethod
    def prepare(cls, dataset: Dataset, config: Any) -> Dataset:
        """The dataset, of which `rows` says who clones what.

        Raises:
            SaferlError: no costs, a bad limit or fraction, or a limit that no episode keeps.
        """
        for fraction in member_values(config, "best_fraction"):
            check_fraction(fraction)
        least = min(check_limit(v, infinite=True) for v in member_values(config, "cost_limit"))
        if dataset.costs is None:
            raise SaferlError(no_costs(dataset.card.id))
        if not len(dataset.episodes):
            raise SaferlError(
                f"{dataset.card.id} has no complete episode, so none keeps a cost limit: mark "
                "where episodes end with terminals or timeouts"
            )
        lowest = _costs(dataset).min()
        if lowest > np.float32(least):
            raise SaferlError(
                f"no episode of {dataset.card.id} costs {least:g} or less: the lowest cost of one "
                f"is {lowest:g}, so pass a cost_limit of at least that"
            )
        return dataset

    def rows(self, dataset: Dataset) -> Sequence[np.ndarray]:
        """The rows that each member clones; never those of a fragment, which has no cost yet."""
        found = {which: dataset.rows_of(kept) for which, kept in self._kept(dataset).items()}
        return [found[which] for which in self._which()]

    def fit(self, dataset: Dataset, say: Callable[[str], None]) -> None:
        """Say how much is cloned."""
        lengths = dataset.episode_lengths()
        for (limit, fraction), kept in self._kept(dataset).items():
            best = "" if fraction == 1 else f", best {fraction:.0%}"
            say(
                f"cost limit {limit:g}{best}: clones {len(kept)} episodes, "
                f"{lengths[kept].sum()} rows"
            )

    def _which(self) -> list[tuple[float, float]]:
        return list(zip(self.column("cost_limit"), self.column("best_fraction")))

    def _kept(self, dataset: Dataset) -> dict[tuple[float, float], np.ndarray]:
        """Numbers of the episodes that are cloned under each limit and fraction."""
        costs, returns = _costs(dataset), np.asarray(dataset.episode_returns(), np.float32)
        found = {}
        for limit, fraction in dict.fromkeys(self._which()):
            within = costs <= np.float32(limit)
            count = max(1, math.floor(fraction * within.sum()))
            least = np.sort(returns[within])[-count]
            found[limit, fraction] = np.flatnonzero(within & (returns >= least))
        return found


def _costs(dataset: Any) -> np.ndarray:
    """Of complete episodes, in float32: ten steps of 0.1 cost no more than 1."""
    return np.asarray(dataset.episode_costs(), np.float32)
