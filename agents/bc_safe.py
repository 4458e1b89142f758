"""BC-Safe: behaviour cloning of the logged episodes that keep the cost limit.

With C_i the undiscounted cost of the whole episode that row i is from, L the member's limit and
π(s) = tanh f(s):

    w_i = 1[C_i ≤ L]
    L_π = Σ_i w_i mean_j (π(s_i)_j - a_ij)² / max(Σ_i w_i, 1)            over rows, components j

A comparator of the DSRL benchmark (Liu et al. 2023, arXiv 2306.09303): a deterministic tanh
perceptron, squared error, Adam at 1e-3. All members share one buffer, so each leaves out by w what
its own limit does not let pass. Given how many rows of a batch pass, they are a uniform sample of
the filtered data, so the gradient is that of cloning those alone with smaller batches; and a member
does not depend on the limits of those beside it, as it would if the buffer were filtered.

Deviations: none known. DSRL's other filters (risky, boundary, frontier, multi-task) are not here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from saferl.data.buffer import Batch
from saferl.errors import SaferlError
from saferl.safety.limits import check_limit, no_costs

from .base import AgentConfig, Metrics, per_member
from .bc import BC
from .costs import costs_of


@dataclass(frozen=True)
class BCSafeConfig(AgentConfig):
    """Defaults: OSRL's."""

    batch_size: int = 512
    lr: float = 1e-3
    cost_limit: float = 10.0  # largest undiscounted cost of an episode that is cloned; inf: all


class BCSafe(BC):
    Config = BCSafeConfig
    variants = frozenset({"cost_limit"})
    needs_costs: ClassVar[bool] = True

    @classmethod
    def prepare(cls, dataset: Any, config: BCSafeConfig) -> Any:
        """The complete episodes; the cost of a row becomes that of its whole episode.

        A trailing fragment without an end has no cost to compare and is left out.

        Raises:
            SaferlError: no costs, a bad limit, or one that no episode keeps.
        """
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
        rows = np.repeat(costs, dataset.episode_lengths())
        return dataset.subset(episodes=len(costs)).with_costs(rows)

    def fit(self, dataset: Any, say: Callable[[str], None]) -> None:
        """Say how much of the data each limit lets pass."""
        first = dataset.episodes[:, 0]
        for limit in dict.fromkeys(_limits(self.config)):
            within = dataset.costs <= np.float32(limit)
            say(
                f"cost limit {limit:g}: clones {within[first].sum()} of {len(first)} episodes, "
                f"{within.mean():.0%} of the rows"
            )

    def learn(self, batch: Batch) -> Metrics:
        within = (costs_of(batch) <= self.scalar("cost_limit")).to(batch.actions)
        error = (self.actor(batch.observations) - batch.actions).square().mean(-1)
        loss = (within * error).sum(-1) / within.sum(-1).clamp_min(1)
        self.minimise(self.actor_optimizer, loss)
        return {"actor_loss": loss.detach(), "kept_share": within.mean(-1)}


def _limits(config: BCSafeConfig) -> list[float]:
    return [check_limit(value, infinite=True) for value in per_member(config, "cost_limit")]
