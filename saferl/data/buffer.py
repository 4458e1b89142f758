"""The replay buffer: a dataset on the device, in the agent's units, sampled there.

One row holds a whole transition (observation | action | reward | cost | terminal | next
observation), so a batch is one gather and the pieces are views of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saferl.errors import SaferlError
from saferl.rng import MemberRandom
from saferl.spec import Spec

CHUNK = 65536  # rows transformed at a time, so that filling needs no full-size temporary


class Batch(NamedTuple):
    """Transitions in the agent's units, each with leading axes ``[M, B]``."""

    observations: Tensor  # [M, B, O], or pixels [M, B, C, H, W] uint8
    actions: Tensor  # [M, B, A] in [-1, 1], or [M, B] int64
    rewards: Tensor  # [M, B]
    costs: Tensor | None  # [M, B] in user units; None where the data have no costs
    next_observations: Tensor  # as observations
    terminals: Tensor  # [M, B], 1 where bootstrapping stops
    returns: Tensor | None = None  # [M, B] discounted return-to-go, where an agent asks for it

    def rows(self, start: int, stop: int) -> Batch:
        """The rows from ``start`` to ``stop`` of each member."""
        return self.map(lambda field: field[:, start:stop])

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """``change`` of each field that is there."""
        return Batch(*(None if field is None else change(field) for field in self))

    @staticmethod
    def concatenate(batches: Sequence[Batch], axis: int) -> Batch:
        """Batches along the axis of members (0) or of rows (1)."""
        if len(batches) == 1:
            return batches[0]
        fields = zip(*batches)
        return Batch(*(None if f[0] is None else torch.cat(f, axis) for f in fields))


class ReplayBuffer:
    """Transitions on the device; uniform sampling with replacement, one stream per member.

    All members share the rows, and draw from all of them unless `restrict` says from which;
    `OnlineBuffer` has rows of each member's own.

    Args:
        spec: maps raw arrays to the agent's units as they enter.
        capacity: rows; the oldest are overwritten.
        seeds: one per member.
        costs: whether rows carry a cost.
        returns: whether rows carry a return-to-go.
        memory_map: a file that holds the rows instead of memory; batches are moved to the device.
        say: receives the line that states the memory need before it is allocated.

    Raises:
        SaferlError: the rows do not fit into the memory that is free.
    """

    streams = 2  # of the random numbers that draw rows

    def __init__(
        self,
        spec: Spec,
        capacity: int,
        seeds: Sequence[int],
        device: torch.device | str = "cpu",
        costs: bool = True,
        returns: bool = False,
        memory_map: str | Path | None = None,
        say: Callable[[str], None] = lambda line: None,
    ):
        self.spec, self.capacity = spec, int(capacity)
        self.costs, self.returns = costs, returns
        self.device = torch.device(device)
        self.members = len(seeds)
        self.random = MemberRandom(seeds, device, stream=self.streams)
        self.size = self.cursor = 0
        self._tables: list[Tensor] | None = None
        actions = 1 if spec.discrete else spec.action_dim
        numbers = 0 if spec.image else spec.observation_dim  # pixels lie in a place of their own
        widths = [numbers, actions, 1, int(costs), 1, numbers, returns]
        self._splits = np.cumsum([0, *widths]).tolist()
        shape = (self._owners() * self.capacity, self._splits[-1])
        self.rows = allocate(shape, torch.float32, self.device, memory_map, say)

    def _owners(self) -> int:
        """Sets of rows."""
        return 1

    @property
    def width(self) -> float:
        """Floats of memory for one row."""
        return self.rows.shape[1]

    @property
    def own_width(self) -> float:
        """Floats of memory for one row of the online buffer of the same task."""
        return self.width

    @property
    def nbytes(self) -> int:
        """Bytes that all rows take."""
        return self.rows.nbytes

    @classmethod
    def from_dataset(
        cls,
        dataset,
        spec: Spec,
        seeds: Sequence[int],
        device: torch.device | str = "cpu",
        memory_map: str | Path | None = None,
        say: Callable[[str], None] = lambda line: None,
        returns: np.ndarray | None = None,
    ) -> ReplayBuffer:
        """A full buffer that all members share, holding every transition of a `Dataset`.

        ``returns``: of each row ``[N]``, in the agent's units, for batches that carry them.
        """
        if (kind := buffer_class(spec)) is not cls:
            return kind.from_dataset(dataset, spec, seeds, device, memory_map, say, returns)
        buffer = cls(
            spec,
            len(dataset),
            seeds,
            device,
            costs=dataset.costs is not None,
            returns=returns is not None,
            memory_map=memory_map,
            say=say,
        )
        for start in range(0, len(dataset), CHUNK):
            part = slice(start, start + CHUNK)
            buffer.extend(
                dataset.observations[part],
                dataset.actions[part],
                dataset.rewards[part],
                dataset.next_observations[part],
                dataset.terminals[part],
                None if dataset.costs is None else dataset.costs[part],
                None if returns is None else returns[part],
            )
        return buffer

    def _encode(
        self, observations, actions, rewards, next_observations, terminals, costs, returns
    ) -> Tensor:
        """Raw numpy arrays of n transitions as rows ``[n, width]``."""
        if self.costs and costs is None:
            raise SaferlError("this buffer holds costs, but the added rows have none")
        s = self._splits
        block = np.empty((len(observations), s[-1]), np.float32)
        if not self.spec.image:
            block[:, s[0] : s[1]] = self.spec.observations(np.asarray(observations))
            block[:, s[5] : s[6]] = self.spec.observations(np.asarray(next_observations))
        block[:, s[1] : s[2]] = self.spec.actions(np.asarray(actions))
        block[:, s[2]] = self.spec.rewards(np.asarray(rewards))
        if self.costs:
            block[:, s[3]] = costs
        block[:, s[4]] = terminals
        if self.returns:
            block[:, s[6]] = returns
        return torch.from_numpy(block).to(self.rows.device)

    def extend(
        self, observations, actions, rewards, next_observations, terminals, costs=None, returns=None
    ):
        """Append raw numpy rows ``[N, …]``."""
        rows = self._encode(
            observations, actions, rewards, next_observations, terminals, costs, returns
        )
        n = len(rows)
        index = (self.cursor + np.arange(n)) % self.capacity
        self.rows.index_copy_(0, torch.from_numpy(index).to(rows.device), rows)
        self.cursor = (self.cursor + n) % self.capacity
        self.size = min(self.size + n, self.capacity)

    def restrict(self, rows: Sequence[np.ndarray] | None) -> None:
        """Let member i draw from ``rows[i]`` alone, numbers of rows; None: from all.

        Members that are given one and the same array share its memory.
        """
        if rows is None:
            self._tables = None
            return
        distinct = {id(own): torch.as_tensor(own, device=self.device) for own in rows}
        self._tables = [distinct[id(own)] for own in rows]

    def sample(self, batch_size: int) -> Batch:
        """A batch ``[M, batch_size]`` drawn uniformly with replacement."""
        if self._tables is not None:
            return self.sample_of(range(self.members), batch_size)
        return self.gather(self.random.integers(self.size, batch_size))

    def sample_of(self, members: Sequence[int], rows: int) -> Batch:
        """A batch ``[len(members), rows]`` of some members, whose streams alone move."""
        if self._tables is None:
            return self.gather(self.random.pick(members, [self.size] * len(members), rows))
        tables = [self._tables[member] for member in members]
        index = self.random.pick(members, [len(table) for table in tables], rows)
        return self.gather(torch.stack([t[own] for t, own in zip(tables, index)]))

    def gather(self, index: Tensor) -> Batch:
        """The rows at ``index`` ``[M, B]``."""
        rows = self.rows.index_select(0, index.to(self.rows.device).flatten())
        rows = rows.view(*index.shape, -1)
        if rows.device != self.device:
            rows = rows.to(self.device, non_blocking=True)
        s = self._splits
        actions = rows[..., s[1] : s[2]]
        return Batch(
            observations=rows[..., s[0] : s[1]],
            actions=actions.squeeze(-1).long() if self.spec.discrete else actions,
            rewards=rows[..., s[2]],
            costs=rows[..., s[3]] if self.costs else None,
            next_observations=rows[..., s[5] : s[6]],
            terminals=rows[..., s[4]],
            returns=rows[..., s[6]] if self.returns else None,
        )

    def state_dict(self) -> dict[str, Tensor]:
        """The sampler's state, without the rows."""
        return {
            "random": self.random.state_dict()["state"],
            "size": torch.tensor(self.size),
            "cursor": torch.tensor(self.cursor),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.random.load_state_dict({"state": state["random"]})


class OnlineBuffer(ReplayBuffer):
    """Rows of each member's own, in the order in which they happened; the oldest are overwritten.

    Arguments as for `ReplayBuffer`; ``capacity`` is per member. Members may hold different numbers
    of rows. Beside the rows it keeps where episodes end, so that they can become a `Dataset`.

    Attributes:
        sizes: rows of each member, ``[M]``.
        ends: whether a row is the last of its episode, ``[M, capacity]``, for whichever reason.
    """

    streams = 4

    def __init__(self, spec: Spec, capacity: int, seeds: Sequence[int], *args: Any, **options: Any):
        super().__init__(spec, capacity, seeds, *args, **options)
        self.added = np.zeros(self.members, np.int64)  # rows so far, overwritten ones included
        self.ends = np.zeros((self.members, self.capacity), bool)

    def _owners(self) -> int:
        return self.members

    @property
    def sizes(self) -> np.ndarray:
        return np.minimum(self.added, self.capacity)

    def append(self, members: np.ndarray, ends: np.ndarray, *fields: Any) -> None:
        """One row for each of ``members``: raw arrays ``[len(members), …]`` as in `extend`."""
        rows = self._encode(*fields)
        at = self.added[members] % self.capacity
        where = torch.from_numpy(members * self.capacity + at).to(rows.device)
        self.rows.index_copy_(0, where, rows)
        self.ends[members, at] = ends
        self.added[members] += 1

    def cut(self, member: int) -> None:
        """Mark the member's last row as the last of its episode."""
        if self.added[member]:
            self.ends[member, (self.added[member] - 1) % self.capacity] = True

    def fill_returns(self, member: int, rows: int, fill: Callable[[np.ndarray], Any]) -> None:
        """Write the returns-to-go of the member's last ``rows`` rows.

        ``fill(rewards [n]) -> [n]``, both in the agent's units.
        """
        last = int(self.added[member])
        index = np.arange(max(last - rows, last - self.capacity), last) % self.capacity
        where = torch.from_numpy(member * self.capacity + index).to(self.rows.device)
        rewards = self.rows[where, self._splits[2]].cpu().numpy()
        values = torch.from_numpy(np.asarray(fill(rewards), np.float32)).to(self.rows.device)
        self.rows[where, self._splits[6]] = values

    def sample(self, batch_size: int) -> Batch:
        return self.sample_of(range(self.members), batch_size)

    def sample_of(self, members: Sequence[int], rows: int) -> Batch:
        sizes = self.sizes[list(members)].tolist()
        index = self.random.pick(members, sizes, rows)
        offsets = torch.tensor([m * self.capacity for m in members], device=index.device)
        return self.gather(index + offsets[:, None])

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
        batch = super().gather(torch.from_numpy(index)[None])
        fields = {
            name: None if f is None else f[0].cpu().numpy() for name, f in batch._asdict().items()
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


def buffer_class(spec: Spec) -> type[ReplayBuffer]:
    """The class for a dataset: `FrameBuffer` for pixels."""
    if not spec.image:
        return ReplayBuffer
    from saferl.data.frame_buffer import FrameBuffer

    return FrameBuffer


def online_buffer_class(spec: Spec) -> type[OnlineBuffer]:
    """The class for what members gather: `OnlineFrameBuffer` for pixels."""
    if not spec.image:
        return OnlineBuffer
    from saferl.data.frame_buffer import OnlineFrameBuffer

    return OnlineFrameBuffer


def allocate(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    file: str | Path | None,
    say: Callable[[str], None],
) -> Tensor:
    """Zeros on the device, or in a file; the need is said before.

    Raises:
        SaferlError: more than the memory that is free.
    """
    need = math.prod(shape) * dtype.itemsize
    if file is not None:
        say(f"buffer: {human(need)} in {file}")
        kind = torch.empty(0, dtype=dtype).numpy().dtype
        return torch.from_numpy(np.memmap(file, kind, "w+", shape=shape))
    free = free_memory(device)
    say(f"buffer: {human(need)} of {human(free)} free on {device}")
    if need > free:
        raise SaferlError(
            f"the replay buffer needs {human(need)} on {device} but {human(free)} is free: train "
            "on fewer rows (--dataset-option size=N, Dataset.subset, --set online_capacity=N) or "
            "pass --memory-map FILE"
        )
    return torch.zeros(shape, dtype=dtype, device=device)


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on the device now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 2**63 - 1  # not a Linux machine: let the allocation itself decide


def human(size: float) -> str:
    """1536 → '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
