"""Replay buffers: transitions on the device, in the agent's units, sampled there.

One row holds a whole transition (`saferl.replay.layout`), so a batch is one gather and its fields
are views of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saferl.data.dataset import Dataset
from saferl.replay.batch import Batch
from saferl.replay.extras import Extra, of_dataset
from saferl.replay.layout import RowLayout
from saferl.replay.memory import allocate
from saferl.rng import MemberRandom, Stream
from saferl.spec import Spec

CHUNK = 65536  # rows transformed at a time, so that filling needs no full-size temporary
Say = Callable[[str], None]


def silent(line: str) -> None:
    """Takes a line for the user and prints nothing."""


class SharedBuffer:
    """Rows that all members share: uniform sampling with replacement, one stream per member.

    Subclasses hold the rows. All members draw from all rows unless `restrict` says from which.
    """

    rows: Tensor

    def __init__(
        self, layout: RowLayout, capacity: int, seeds: Sequence[int], device: torch.device | str
    ):
        self.layout, self.spec, self.costs = layout, layout.spec, layout.costs
        self.capacity = int(capacity)
        self.device = torch.device(device)
        self.members = len(seeds)
        self.random = MemberRandom(seeds, device, Stream.DATASET_ROWS)
        self.size = self.cursor = 0
        self._tables: list[Tensor] | None = None

    @property
    def on_device(self) -> bool:
        return self.rows.device == self.device

    @property
    def streams_of_random(self) -> Sequence[MemberRandom]:
        return (self.random,)

    @property
    def nbytes(self) -> int:
        """Bytes that all rows take."""
        raise NotImplementedError

    def gather(self, index: Tensor) -> Batch:
        """The rows at ``index`` ``[M, B]``."""
        raise NotImplementedError

    def restrict(self, rows: Sequence[np.ndarray] | None) -> None:
        """Let member i draw from ``rows[i]`` alone, numbers of rows; None: from all.

        Members that are given one and the same array share its memory.
        """
        if rows is None:
            self._tables = None
            return
        distinct = {id(own): torch.as_tensor(own, device=self.device) for own in rows}
        self._tables = [distinct[id(own)] for own in rows]

    def sample(self, rows: int) -> Batch:
        """A batch ``[M, rows]`` drawn uniformly with replacement."""
        if self._tables is not None:
            return self.sample_of(range(self.members), rows)
        return self.gather(self.random.integers(self.size, rows))

    def sample_of(self, members: Sequence[int], rows: int) -> Batch:
        """A batch ``[len(members), rows]`` of some members, whose streams alone move."""
        if self._tables is None:
            return self.gather(self.random.pick(members, [self.size] * len(members), rows))
        tables = [self._tables[member] for member in members]
        index = self.random.pick(members, [len(table) for table in tables], rows)
        return self.gather(torch.stack([t[own] for t, own in zip(tables, index)]))

    def state_dict(self) -> dict[str, Tensor]:
        """The sampler's state, without the rows."""
        return {
            "random": self.random.state_dict()["state"],
            "size": torch.tensor(self.size),
            "cursor": torch.tensor(self.cursor),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.random.load_state_dict({"state": state["random"]})


class ReplayBuffer(SharedBuffer):
    """Transitions of vectors that all members share; the oldest are overwritten.

    Args:
        spec: maps raw arrays to the agent's units as they enter.
        capacity: rows.
        seeds: one per member.
        costs: whether rows carry a cost.
        extras: further columns (`saferl.replay.extras`).
        memory_map: a file that holds the rows instead of memory; batches are moved to the device.
        say: receives the line that states the memory need before it is allocated.

    Raises:
        SaferlError: the rows do not fit into the memory that is free.
    """

    def __init__(
        self,
        spec: Spec,
        capacity: int,
        seeds: Sequence[int],
        device: torch.device | str = "cpu",
        costs: bool = True,
        extras: tuple[Extra, ...] = (),
        memory_map: str | Path | None = None,
        say: Say = silent,
    ):
        super().__init__(RowLayout(spec, costs, extras), capacity, seeds, device)
        shape = (self.capacity, self.layout.width)
        self.rows = allocate(shape, torch.float32, self.device, memory_map, say)

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes

    @classmethod
    def from_dataset(
        cls,
        dataset: Dataset,
        spec: Spec,
        seeds: Sequence[int],
        device: torch.device | str = "cpu",
        extras: tuple[Extra, ...] = (),
        memory_map: str | Path | None = None,
        say: Say = silent,
    ) -> ReplayBuffer:
        """A full buffer that holds every transition of a `Dataset`."""
        costs = dataset.costs is not None
        buffer = cls(spec, len(dataset), seeds, device, costs, extras, memory_map, say)
        columns = extra_columns(extras, dataset, spec)
        for start in range(0, len(dataset), CHUNK):
            part = slice(start, start + CHUNK)
            buffer.extend(
                dataset.observations[part],
                dataset.actions[part],
                dataset.rewards[part],
                dataset.next_observations[part],
                dataset.terminals[part],
                None if dataset.costs is None else dataset.costs[part],
                None if columns is None else columns[part],
            )
        return buffer

    def extend(
        self,
        observations: Any,
        actions: Any,
        rewards: Any,
        next_observations: Any,
        terminals: Any,
        costs: Any = None,
        extras: np.ndarray | None = None,
    ) -> None:
        """Append raw numpy rows ``[N, …]``; ``extras`` ``[N, …]`` as the layout stores them."""
        block = self.layout.encode(
            observations, actions, rewards, next_observations, terminals, costs, extras
        )
        n = len(block)
        rows = torch.from_numpy(block).to(self.rows.device)
        index = (self.cursor + np.arange(n)) % self.capacity
        self.rows.index_copy_(0, torch.from_numpy(index).to(rows.device), rows)
        self.cursor = (self.cursor + n) % self.capacity
        self.size = min(self.size + n, self.capacity)

    def gather(self, index: Tensor) -> Batch:
        batch, rows = take(self.layout, self.rows, index, self.device)

        def back(length: int) -> tuple[Batch, Tensor]:
            steps = torch.arange(length - 1, -1, -1, device=index.device)
            earlier = (index[..., None] - steps).clamp_min(0)
            found, _ = take(self.layout, self.rows, earlier, self.device)
            return found, torch.ones(earlier.shape, device=self.device)

        return with_windows(self.layout, batch, rows, back)


class OnlineBuffer:
    """Rows of each member's own, in the order in which they happened; the oldest are overwritten.

    Arguments as for `ReplayBuffer`; ``capacity`` is per member. Members may hold different numbers
    of rows. Beside the rows it keeps where episodes end, so that they can become a `Dataset`.

    Attributes:
        sizes: rows of each member, ``[M]``.
        ends: whether a row is the last of its episode, ``[M, capacity]``, for whichever reason.
    """

    def __init__(
        self,
        spec: Spec,
        capacity: int,
        seeds: Sequence[int],
        device: torch.device | str = "cpu",
        costs: bool = True,
        extras: tuple[Extra, ...] = (),
    ):
        self.layout = RowLayout(spec, costs, extras)
        self.spec, self.costs, self.capacity = spec, costs, int(capacity)
        self.device = torch.device(device)
        self.members = len(seeds)
        self.random = MemberRandom(seeds, device, Stream.OWN_ROWS)
        shape = (self.members * self.capacity, self.layout.width)
        self.rows = allocate(shape, torch.float32, self.device, None, silent)
        self.added = np.zeros(self.members, np.int64)  # rows so far, overwritten ones included
        self.ends = np.zeros((self.members, self.capacity), bool)
        self._steps = np.zeros(self.members, np.int64)  # rows of the running episode

    @property
    def on_device(self) -> bool:
        return True

    @property
    def streams_of_random(self) -> Sequence[MemberRandom]:
        return (self.random,)

    @property
    def sizes(self) -> np.ndarray:
        return np.minimum(self.added, self.capacity)

    @property
    def nbytes(self) -> int:
        """Bytes that all rows take."""
        return self.rows.nbytes

    def append(
        self,
        members: np.ndarray,
        ends: np.ndarray,
        observations: Any,
        actions: Any,
        rewards: Any,
        next_observations: Any,
        terminals: Any,
        costs: Any = None,
    ) -> None:
        """One row for each of ``members``: raw arrays ``[len(members), …]``."""
        block = self.layout.encode(
            observations, actions, rewards, next_observations, terminals, costs
        )
        if self.layout.extras:
            at = self.layout.columns
            own = block[:, at["actions"]], block[:, at["rewards"].start], self._steps[members]
            block[:, self.layout.all_extras] = np.concatenate(
                [extra.of_running(*own) for extra in self.layout.extras], 1
            )
        at_row = self.added[members] % self.capacity
        where = torch.from_numpy(members * self.capacity + at_row).to(self.rows.device)
        self.rows.index_copy_(0, where, torch.from_numpy(block).to(self.rows.device))
        self.ends[members, at_row] = ends
        self.added[members] += 1
        self._steps[members] = np.where(ends, 0, self._steps[members] + 1)

    def cut(self, member: int) -> None:
        """Mark the member's last row as the last of its episode."""
        if self.added[member]:
            self.ends[member, (self.added[member] - 1) % self.capacity] = True
        self._steps[member] = 0

    def finish_episode(self, member: int, rows: int) -> None:
        """Compute the extras of the member's last ``rows`` rows, a whole episode."""
        if not self.layout.extras:
            return
        last = int(self.added[member])
        index = np.arange(max(last - rows, last - self.capacity), last) % self.capacity
        where = torch.from_numpy(member * self.capacity + index).to(self.rows.device)
        block, at = self.rows[where].cpu().numpy(), self.layout.columns
        actions, rewards = block[:, at["actions"]], block[:, at["rewards"].start]
        found = [extra.of_episode(actions, rewards, True) for extra in self.layout.extras]
        values = torch.from_numpy(np.concatenate(found, 1).astype(np.float32))
        self.rows[where, self.layout.all_extras] = values.to(self.rows.device)

    def sample(self, rows: int) -> Batch:
        """A batch ``[M, rows]``, drawn uniformly with replacement from each member's own rows."""
        return self.sample_of(range(self.members), rows)

    def sample_of(self, members: Sequence[int], rows: int) -> Batch:
        """A batch ``[len(members), rows]`` of some members, whose streams alone move."""
        sizes = self.sizes[list(members)].tolist()
        index = self.random.pick(members, sizes, rows)
        offsets = torch.tensor([m * self.capacity for m in members], device=index.device)
        return self.gather(index + offsets[:, None])

    def gather(self, index: Tensor) -> Batch:
        """The rows at ``index`` ``[M, B]``, counted over the rows of all members."""
        batch, rows = take(self.layout, self.rows, index, self.device)

        def back(length: int) -> tuple[Batch, Tensor]:
            owner, at = index // self.capacity, index % self.capacity
            last = torch.from_numpy(self.added - 1).to(index.device)[owner]
            kept = torch.from_numpy(self.sizes).to(index.device)[owner]
            behind = (last - at) % self.capacity  # rows of the member that are newer
            steps = torch.arange(length - 1, -1, -1, device=index.device)
            present = behind[..., None] + steps < kept[..., None]
            earlier = owner[..., None] * self.capacity + (at[..., None] - steps) % self.capacity
            found, _ = take(self.layout, self.rows, earlier, self.device)
            return found, present.to(self.rows.dtype)

        return with_windows(self.layout, batch, rows, back)

    def order(self, member: int) -> tuple[np.ndarray, np.ndarray]:
        """Row numbers of a member from the oldest to the latest, and ``ends``, each ``[n]``."""
        last = int(self.added[member])
        index = np.arange(last - int(self.sizes[member]), last) % self.capacity
        return member * self.capacity + index, self.ends[member, index]

    def of_member(self, member: int) -> tuple[Batch, np.ndarray]:
        """All rows of a member from the oldest to the latest, ``[1, n]``, and ``ends`` ``[n]``."""
        index, ends = self.order(member)
        return self.gather(torch.from_numpy(index)[None]), ends

    def history(self, index: np.ndarray, ends: np.ndarray) -> dict[str, Any]:
        """The fields of a `Batch` of rows that are in `order`, ``[n, …]``, raw observations."""
        batch, _ = take(self.layout, self.rows, torch.from_numpy(index)[None], self.device)
        fields: dict[str, Any] = {
            name: None if field is None else field[0].cpu().numpy()
            for name, field in zip(batch._fields[:-1], batch[:-1])
        }
        for name in ("observations", "next_observations"):
            fields[name] = self.spec.raw_observations(fields[name])
        return fields

    def state_dict(self) -> dict[str, Tensor]:
        """Everything, rows included."""
        kept = int(self.sizes.max())
        return {
            "random": self.random.state_dict()["state"],
            "added": torch.from_numpy(self.added.copy()),
            "ends": torch.from_numpy(self.ends[:, :kept].copy()),
            "rows": self.rows.view(self.members, self.capacity, -1)[:, :kept].cpu().contiguous(),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.random.load_state_dict({"state": state["random"]})
        kept = state["rows"].shape[1]
        view = self.rows.view(self.members, self.capacity, -1)
        view[:, :kept] = state["rows"].to(self.rows.device)
        self.ends[:, :kept] = state["ends"].numpy()
        self.added = state["added"].numpy().copy()
        for member in range(self.members):
            ends = self.order(member)[1]
            self._steps[member] = ends[::-1].argmax() if ends.any() else len(ends)


def take(
    layout: RowLayout, rows: Tensor, index: Tensor, device: torch.device
) -> tuple[Batch, Tensor]:
    """The rows at ``index`` ``[…]`` as a batch on ``device``, and as they lie."""
    found = rows.index_select(0, index.to(rows.device).flatten())
    found = found.view(*index.shape, -1)
    if found.device != device:
        found = found.to(device, non_blocking=True)
    return layout.decode(found), found


def with_windows(
    layout: RowLayout,
    batch: Batch,
    rows: Tensor,
    back: Callable[[int], tuple[Batch, Tensor]],
) -> Batch:
    """``batch`` with the fields of extras that look at earlier rows.

    ``back(L)``: the L rows up to each row ``[M, B, L]``, and 1 where such a row is held.
    """

    if not any(extra.looks_back for extra in layout.extras):
        return batch

    def gather(length: int) -> tuple[dict[str, Tensor], Tensor]:
        found, present = back(length)
        fields = {
            "observations": found.observations,
            "actions": found.actions,
            "rewards": found.rewards,
        }
        return fields, present

    extras = dict(batch.extras)
    for extra, span in zip(layout.extras, layout.extra_columns):
        extras |= extra.window_fields(rows[..., span], gather)
    return batch._replace(extras=extras)


def extra_columns(extras: tuple[Extra, ...], dataset: Dataset, spec: Spec) -> np.ndarray | None:
    """What all extras store for the rows of a dataset, ``[N, …]``; None without extras."""
    if not extras:
        return None
    actions, rewards = spec.actions(dataset.actions), spec.rewards(dataset.rewards)
    return of_dataset(extras, actions, rewards, dataset.episodes)
