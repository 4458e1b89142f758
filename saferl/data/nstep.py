"""Transitions over n steps, for agents that bootstrap from n-step returns."""

from __future__ import annotations

import numpy as np

from saferl.data.dataset import Dataset
from saferl.data.frames import take


def n_step(dataset: Dataset, n: int, discount: float) -> Dataset:
    """Rows (s_t, a_t, Σ_{i<n} γ^i r_{t+i}, s_{t+n}), so that targets bootstrap with γ^n.

    None crosses an episode's end: a terminal within the n steps ends the sum and makes the row
    terminal, and rows whose episode is cut off sooner than n steps later are left out. Costs are
    summed as rewards are. Only for sampling: rows are no longer steps of episodes, so what is
    computed over episodes has to be taken from the dataset itself.
    """
    total = len(dataset)
    ends = dataset.terminals | dataset.timeouts
    last = np.arange(total)
    sums = {"rewards": dataset.rewards.astype(np.float64)}
    if dataset.costs is not None:
        sums["costs"] = dataset.costs.astype(np.float64)
    raw = {name: column.copy() for name, column in sums.items()}
    for step in range(1, n):
        goes_on = ~ends[last]
        goes_on &= last + 1 < total
        last = last + goes_on
        for name, column in sums.items():
            column += discount**step * raw[name][last] * goes_on
    whole = last - np.arange(total) == n - 1
    kept = np.flatnonzero(whole | dataset.terminals[last])
    last = last[kept]
    return Dataset(
        take(dataset.observations, kept),
        dataset.actions[kept],
        sums["rewards"][kept].astype(np.float32),
        dataset.terminals[last],
        dataset.timeouts[last],
        take(dataset.next_observations, last),
        sums["costs"][kept].astype(np.float32) if "costs" in sums else None,
        dataset.card.noted(f"{n}-step transitions, discount {discount:g}"),
        dataset.problems,
    )
