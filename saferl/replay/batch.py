"""A batch of transitions, as samplers give it and agents learn from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from saferl.rng import MemberRandom


class Batch(NamedTuple):
    """Transitions in the agent's units, each with leading axes ``[M, B]``."""

    observations: Tensor  # [M, B, O], or pixels [M, B, C, H, W] uint8
    actions: Tensor  # [M, B, A] in [-1, 1], or [M, B] int64
    rewards: Tensor  # [M, B]
    costs: Tensor | None  # [M, B] in user units; None where the data have no costs
    next_observations: Tensor  # as observations
    terminals: Tensor  # [M, B], 1 where bootstrapping stops
    extras: Mapping[str, Tensor] = {}  # what the agent asked for (`saferl.replay.extras`), by name

    def tensors(self) -> list[Tensor]:
        """All tensors of the batch, in a fixed order."""
        fields: Any = self[:-1]
        return [*(field for field in fields if field is not None), *self.extras.values()]

    def rows(self, start: int, stop: int) -> Batch:
        """The rows from ``start`` to ``stop`` of each member."""
        return self.map(lambda field: field[:, start:stop])

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """``change`` of each field that is there."""
        fields: Any = (None if field is None else change(field) for field in self[:-1])
        return Batch._make([*fields, {name: change(f) for name, f in self.extras.items()}])

    @staticmethod
    def concatenate(batches: Sequence[Batch], axis: int) -> Batch:
        """Batches along the axis of members (0) or of rows (1)."""
        if len(batches) == 1:
            return batches[0]
        fields: Any = zip(*(batch[:-1] for batch in batches))
        extras = {
            name: torch.cat([batch.extras[name] for batch in batches], axis)
            for name in batches[0].extras
        }
        joined: Any = (None if f[0] is None else torch.cat(f, axis) for f in fields)
        return Batch._make([*joined, extras])


class Sampler(Protocol):
    """What an engine draws from: a dataset's rows, rows that members gathered, or both."""

    @property
    def device(self) -> torch.device:
        """Where batches are."""

    @property
    def on_device(self) -> bool:
        """Whether the rows are there too, as a CUDA graph needs them."""

    @property
    def streams_of_random(self) -> Sequence[MemberRandom]:
        """All random streams that `sample` draws from."""

    def sample(self, rows: int) -> Batch:
        """A batch ``[M, rows]``."""

    def state_dict(self) -> dict[str, Tensor]: ...

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...
