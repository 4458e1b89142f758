"""The replay buffer of pixels: uint8 frames on the device once, stacked when a batch is drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saferl.data.buffer import CHUNK, Batch, ReplayBuffer, free_memory, human
from saferl.data.frames import Frames
from saferl.errors import SaferlError
from saferl.rng import MemberRandom
from saferl.spec import Spec


class FrameBuffer(ReplayBuffer):
    """Transitions between stacks of frames, sampled as `ReplayBuffer` does.

    A batch holds ``observations`` and ``next_observations`` ``[M, B, C, H, W]`` uint8, where C
    counts the channels of all frames in a stack. Stacks never reach before their episode's start
    (see `Frames`). A row beside the frames is action | reward | cost | terminal | return-to-go.

    Args:
        frames: how many there is room for; as many as rows if None.

    Raises:
        SaferlError: the frames do not fit into the memory that is free.
    """

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
        frames: int | None = None,
    ):
        self.spec, self.capacity = spec, int(capacity)
        self.costs, self.returns = costs, returns
        self.device = torch.device(device)
        self.members = len(seeds)
        self.random = MemberRandom(seeds, device, stream=self.streams)
        self.size = self.cursor = 0
        actions = 1 if spec.discrete else spec.action_dim
        self._splits = np.cumsum([0, actions, 1, int(costs), 1, int(returns)]).tolist()
        self.stack = spec.frame_stack
        shape = (frames or self.capacity, *self._frame(spec))
        need = int(np.prod(shape))
        if memory_map is not None:
            self.frames = torch.from_numpy(np.memmap(memory_map, np.uint8, "w+", shape=shape))
            say(f"buffer: {human(need)} in {memory_map}")
        else:
            free = free_memory(self.device)
            say(f"buffer: {human(need)} of {human(free)} free on {self.device}")
            if need > free:
                raise SaferlError(
                    f"the replay buffer needs {human(need)} on {self.device} but {human(free)} "
                    "is free: train on fewer episodes (Dataset.subset) or pass --memory-map FILE"
                )
            self.frames = torch.zeros(shape, dtype=torch.uint8, device=self.device)
        home = self.frames.device
        self.rows = torch.zeros(self.capacity, self._splits[-1], device=home)
        self.at = torch.zeros(self.capacity, 2, dtype=torch.int64, device=home)  # s and s'
        self.start = torch.zeros(shape[0], dtype=torch.int64, device=home)
        self._back = torch.arange(self.stack - 1, -1, -1, device=home)

    @staticmethod
    def _frame(spec: Spec) -> tuple[int, ...]:
        """Shape of one frame; frames of a stack lie one after the other on the first axis."""
        return spec.image[0] // spec.frame_stack, *spec.image[1:]

    @property
    def width(self) -> float:
        """Floats of memory for one row, its share of the frames included."""
        frames = 1 if self.stack > 1 else 2
        return self.rows.shape[1] + 6 + frames * self.frames[0].nbytes / 4

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.frames, self.rows, self.at, self.start))

    @classmethod
    def from_dataset(
        cls,
        dataset: Any,
        spec: Spec,
        seeds: Sequence[int],
        device: torch.device | str = "cpu",
        memory_map: str | Path | None = None,
        say: Callable[[str], None] = lambda line: None,
        returns: np.ndarray | None = None,
    ) -> FrameBuffer:
        """A buffer that holds a `Dataset` of pixels, and of its frames those that are used."""
        both = dataset.observations, dataset.next_observations
        if isinstance(both[0], Frames):
            at = np.stack([array.at for array in both], 1)
            used = np.unique(both[0].members(at))
            sources = [(both[0].frames, used)]
            at, start = np.searchsorted(used, at), np.searchsorted(used, both[0].start[used])
        else:  # whole observations: each is its own frame
            rows = np.arange(len(dataset))
            sources = [(array, rows) for array in both]
            at, start = np.stack([rows, len(rows) + rows], 1), np.arange(2 * len(rows))
        buffer = cls(
            spec, len(dataset), seeds, device, dataset.costs is not None, returns is not None,
            memory_map=memory_map, say=say, frames=len(start),
        )  # fmt: skip
        filled = 0
        for frames, used in sources:
            for part in range(0, len(used), CHUNK // 16):
                block = np.ascontiguousarray(frames[used[part : part + CHUNK // 16]])
                buffer.frames[filled : filled + len(block)] = torch.from_numpy(block).to(
                    buffer.frames.device
                )
                filled += len(block)
        s, rows = buffer._splits, np.empty((len(dataset), buffer._splits[-1]), np.float32)
        rows[:, s[0] : s[1]] = spec.actions(dataset.actions)
        rows[:, s[1]] = spec.rewards(dataset.rewards)
        if buffer.costs:
            rows[:, s[2]] = dataset.costs
        rows[:, s[3]] = dataset.terminals
        if buffer.returns:
            rows[:, s[4]] = returns
        for whole, part in ((buffer.rows, rows), (buffer.at, at), (buffer.start, start)):
            whole.copy_(torch.from_numpy(part))
        buffer.size = len(dataset)
        return buffer

    def extend(self, *rows: Any, **columns: Any) -> None:
        raise SaferlError("a buffer of frames holds one dataset: make it with from_dataset")

    def gather(self, index: Tensor) -> Batch:
        """The rows at ``index`` ``[M, B]``."""
        where = index.to(self.rows.device).flatten()
        rows = self.rows.index_select(0, where).view(*index.shape, -1)
        newest = self.at.index_select(0, where)  # [M · B, 2]
        numbers = torch.maximum(newest[..., None] - self._back, self.start[newest][..., None])
        images = self.frames.index_select(0, numbers.flatten())
        images = images.view(*index.shape, 2, *self.spec.image)
        if rows.device != self.device:
            rows = rows.to(self.device, non_blocking=True)
            images = images.to(self.device, non_blocking=True)
        s = self._splits
        actions = rows[..., s[0] : s[1]]
        return Batch(
            observations=images[:, :, 0],
            actions=actions.squeeze(-1).long() if self.spec.discrete else actions,
            rewards=rows[..., s[1]],
            costs=rows[..., s[2]] if self.costs else None,
            next_observations=images[:, :, 1],
            terminals=rows[..., s[3]],
            returns=rows[..., s[4]] if self.returns else None,
        )
