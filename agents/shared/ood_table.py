"""Precomputed table of a guardian's out-of-distribution flags."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saferl.data.dataset import Dataset
from saferl.nn.data_buffers import DataBuffers
from saferl.nn.search import distinct_rows, row_keys
from saferl.safety.guardians import Guardian
from saferl.safety.guardians.fitting import flat

MAX_TABLE = 200_000
"""Most pairs of state and action that are tabulated before training."""


class OODTable(DataBuffers):
    """A guardian, and a table of its flags of every action in the states of a dataset.

    With more than `MAX_TABLE` pairs there is no table, and the guardian is called each time. A
    state is found by the hash of its row. A state that is not in the table is out of distribution.
    Everything learnt is in buffers.
    """

    # Tensors once there are data, None before.
    keys: Any
    multipliers: Any
    flagged: Any

    guardian: Any  # a calibrated `Guardian`, or None

    def __init__(self, guardian: Guardian | None):
        super().__init__()
        self.guardian = guardian
        self.declare("keys", "multipliers", "flagged")

    @torch.no_grad()
    def fill(
        self, dataset: Dataset, actions: int, seen: Callable[[np.ndarray], np.ndarray] = flat
    ) -> Tensor | None:
        """Make the table for ``actions``, their number, where the pairs are few enough.

        Args:
            seen: observations to the rows ``[N, O]`` that states will be asked for by.

        Returns:
            The raw states ``[U, O]`` of the table, None where there is none.
        """
        both = [flat(part) for part in (dataset.observations, dataset.next_observations)]
        rows = torch.from_numpy(np.concatenate([seen(part) for part in both])).to(self.device)
        keys, first, _, multipliers = distinct_rows(rows)
        if len(keys) * actions > MAX_TABLE:
            return None
        states = torch.from_numpy(np.concatenate(both)).to(self.device)[first]
        self.keys, self.multipliers = keys, multipliers
        self.flagged = self.guardian.is_ood(states[:, None], torch.arange(actions).to(keys.device))
        return states

    def _row(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the table, and whether they are those of the states."""
        keys = row_keys(observations, self.multipliers)
        found = torch.searchsorted(self.keys, keys).clamp_max(len(self.keys) - 1)
        return found, self.keys[found] == keys

    def ood(self, observations: Tensor, actions: Tensor) -> Tensor:
        """``[M, B]`` 0/1 of observations ``[M, B, O]`` and actions; 0 without a guardian.

        Observations are raw, or with a table what ``seen`` made of them.
        """
        if self.guardian is None:
            return observations.new_zeros(observations.shape[:2])
        if self.flagged is None:
            return self.guardian.is_ood(observations, actions).to(observations.dtype)
        row, known = self._row(observations)
        return (self.flagged[row, actions] | ~known).to(observations.dtype)
