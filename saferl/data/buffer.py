"""The replay buffer: a dataset on the device, in the agent's units, sampled there.

One row holds a whole transition (observation | action | reward | cost | terminal | next
observation), so a batch is one gather and the pieces are views of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from saferl.errors import SaferlError
from saferl.rng import MemberRandom
from saferl.spec import Spec

CHUNK = 65536  # rows transformed at a time, so that filling needs no full-size temporary


class Batch(NamedTuple):
    """Transitions in the agent's units, each with leading axes ``[M, B]``."""

    observations: Tensor  # [M, B, O]
    actions: Tensor  # [M, B, A] in [-1, 1], or [M, B] int64
    rewards: Tensor  # [M, B]
    costs: Tensor | None  # [M, B] in user units; None where the data have no costs
    next_observations: Tensor  # [M, B, O]
    terminals: Tensor  # [M, B], 1 where bootstrapping stops


class ReplayBuffer:
    """Transitions on the device; uniform sampling with replacement, one stream per member.

    Args:
        spec: maps raw arrays to the agent's units as they enter.
        capacity: rows (per member where they own their data); the oldest are overwritten.
        seeds: one per member.
        costs: whether rows carry a cost.
        own_rows: each member has rows of its own (online data); else all share one set.
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
        own_rows: bool = False,
        memory_map: str | Path | None = None,
        say: Callable[[str], None] = lambda line: None,
    ):
        self.spec, self.capacity, self.costs = spec, int(capacity), costs
        self.device = torch.device(device)
        self.members, self.own_rows = len(seeds), own_rows
        self.random = MemberRandom(seeds, device, stream=2)
        self.size = self.cursor = 0
        actions = 1 if spec.discrete else spec.action_dim
        widths = [spec.observation_dim, actions, 1, int(costs), 1, spec.observation_dim]
        self._splits = np.cumsum([0, *widths]).tolist()
        owners = self.members if own_rows else 1
        shape = (owners * self.capacity, self._splits[-1])
        need = shape[0] * shape[1] * 4
        if memory_map is not None:
            rows = np.memmap(memory_map, np.float32, "w+", shape=shape)
            self.rows = torch.from_numpy(rows)
            say(f"buffer: {human(need)} in {memory_map}")
        else:
            free = free_memory(self.device)
            say(f"buffer: {human(need)} of {human(free)} free on {self.device}")
            if need > free:
                raise SaferlError(
                    f"the replay buffer needs {human(need)} on {self.device} but {human(free)} "
                    "is free: train on fewer rows (--set-dataset size=N or Dataset.subset) or pass "
                    "--memory-map FILE"
                )
            self.rows = torch.zeros(shape, device=self.device)
        # Rows of member m start at m · capacity where members own theirs.
        self._offsets = torch.arange(owners, device=self.rows.device)[:, None] * self.capacity

    @classmethod
    def from_dataset(
        cls,
        dataset,
        spec: Spec,
        seeds: Sequence[int],
        device: torch.device | str = "cpu",
        memory_map: str | Path | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> ReplayBuffer:
        """A full buffer that all members share, holding every transition of a `Dataset`."""
        buffer = cls(
            spec,
            len(dataset),
            seeds,
            device,
            costs=dataset.costs is not None,
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
            )
        return buffer

    def extend(self, observations, actions, rewards, next_observations, terminals, costs=None):
        """Append raw numpy rows, ``[N, …]`` shared or ``[M, N, …]`` where members own theirs."""
        owners = len(self._offsets)
        if not self.own_rows:
            fields = [observations, actions, rewards, next_observations, terminals, costs]
            fields = [None if f is None else np.asarray(f)[None] for f in fields]
            observations, actions, rewards, next_observations, terminals, costs = fields
        if self.costs and costs is None:
            raise SaferlError("this buffer holds costs, but the added rows have none")
        n = observations.shape[1]
        block = np.empty((owners, n, self._splits[-1]), np.float32)
        s = self._splits
        for m in range(owners):
            block[m, :, s[0] : s[1]] = self.spec.observations(np.asarray(observations[m]))
            block[m, :, s[1] : s[2]] = self.spec.actions(np.asarray(actions[m]))
            block[m, :, s[2]] = self.spec.rewards(np.asarray(rewards[m]))
            if self.costs:
                block[m, :, s[3]] = costs[m]
            block[m, :, s[4]] = terminals[m]
            block[m, :, s[5] : s[6]] = self.spec.observations(np.asarray(next_observations[m]))
        index = (self.cursor + np.arange(n)) % self.capacity
        rows = torch.from_numpy(block).to(self.rows.device)
        where = (self._offsets + torch.from_numpy(index).to(self.rows.device)).flatten()
        self.rows.index_copy_(0, where, rows.flatten(0, 1))
        self.cursor = (self.cursor + n) % self.capacity
        self.size = min(self.size + n, self.capacity)

    def sample(self, batch_size: int) -> Batch:
        """A batch ``[M, batch_size]`` drawn uniformly with replacement."""
        index = self.random.integers(self.size, batch_size)
        return self.gather(index)

    def gather(self, index: Tensor) -> Batch:
        """The rows at ``index`` ``[M, B]`` (each member's own row numbers)."""
        where = (index.to(self.rows.device) + self._offsets).flatten()
        rows = self.rows.index_select(0, where).view(*index.shape, -1)
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
        )

    def state_dict(self, rows: bool = False) -> dict[str, Tensor]:
        """The sampler's state; with ``rows=True`` also the data (needed for online buffers)."""
        state = {
            "random": self.random.state_dict()["state"],
            "size": torch.tensor(self.size),
            "cursor": torch.tensor(self.cursor),
        }
        if rows:
            kept = self.rows.view(len(self._offsets), self.capacity, -1)[:, : self.size]
            state["rows"] = kept.cpu().contiguous()
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.random.load_state_dict({"state": state["random"]})
        if "rows" in state:
            view = self.rows.view(len(self._offsets), self.capacity, -1)
            view[:, : state["rows"].shape[1]] = state["rows"].to(self.rows.device)
            self.size, self.cursor = int(state["size"]), int(state["cursor"])


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
