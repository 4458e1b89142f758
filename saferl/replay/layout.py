"""How a transition lies in one row of floats, and the way back to a batch."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor

from saferl.errors import SaferlError
from saferl.replay.batch import Batch
from saferl.replay.extras import Extra
from saferl.spec import Spec


class RowLayout:
    """observation | action | reward | cost | terminal | next observation | extras.

    Pixels lie elsewhere (`saferl.replay.frames`): their rows hold no observations.

    Args:
        spec: maps raw arrays to the agent's units. costs: whether rows carry a cost.
        extras: further columns.
    """

    def __init__(self, spec: Spec, costs: bool = True, extras: tuple[Extra, ...] = ()):
        self.spec, self.costs, self.extras = spec, costs, tuple(extras)
        actions = 1 if spec.discrete else spec.action_dim
        numbers = 0 if spec.image else spec.observation_dim
        names = ("observations", "actions", "rewards", "costs", "terminals", "next_observations")
        widths = [numbers, actions, 1, int(costs), 1, numbers]
        widths += [extra.width(spec) for extra in self.extras]
        stops = np.cumsum([0, *widths]).tolist()
        spans = [slice(*span) for span in pairwise(stops)]
        self.columns: dict[str, slice] = dict(zip(names, spans))
        self.extra_columns: list[slice] = spans[len(names) :]
        self.width: int = stops[-1]

    @property
    def all_extras(self) -> slice:
        """The columns of all extras together."""
        return slice(self.columns["next_observations"].stop, self.width)

    def encode(
        self,
        observations: Any,
        actions: Any,
        rewards: Any,
        next_observations: Any,
        terminals: Any,
        costs: Any = None,
        extras: np.ndarray | None = None,
    ) -> np.ndarray:
        """Raw arrays of n transitions as rows ``[n, width]``; extras ``[n, …]`` or 0 where None."""
        if self.costs and costs is None:
            raise SaferlError("this buffer holds costs, but the added rows have none")
        at, spec = self.columns, self.spec
        block = np.empty((len(rewards), self.width), np.float32)
        if not spec.image:
            block[:, at["observations"]] = spec.observations(np.asarray(observations))
            block[:, at["next_observations"]] = spec.observations(np.asarray(next_observations))
        block[:, at["actions"]] = spec.actions(np.asarray(actions))
        block[:, at["rewards"].start] = spec.rewards(np.asarray(rewards))
        if self.costs:
            block[:, at["costs"].start] = costs
        block[:, at["terminals"].start] = terminals
        if self.extras:
            block[:, self.all_extras] = 0.0 if extras is None else extras
        return block

    def decode(self, rows: Tensor) -> Batch:
        """Rows ``[…, width]`` as a batch; extras that need other rows are not in it."""
        at, spec = self.columns, self.spec
        actions = rows[..., at["actions"]]
        extras: dict[str, Tensor] = {}
        for extra, span in zip(self.extras, self.extra_columns):
            extras |= extra.fields(rows[..., span], spec)
        return Batch(
            observations=rows[..., at["observations"]],
            actions=actions.squeeze(-1).long() if spec.discrete else actions,
            rewards=rows[..., at["rewards"].start],
            costs=rows[..., at["costs"].start] if self.costs else None,
            next_observations=rows[..., at["next_observations"]],
            terminals=rows[..., at["terminals"].start],
            extras=extras,
        )
