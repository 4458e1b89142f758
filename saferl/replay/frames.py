"""Replay buffers of pixels: uint8 on the device, stacked when a batch is drawn.

Batches hold ``observations`` and ``next_observations`` ``[M, B, *image]`` uint8, where the first
axis of an image counts the channels of all frames in a stack. Beside the frames lie rows without
observations (`saferl.replay.layout`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saferl.data.dataset import Dataset
from saferl.data.frames import Frames
from saferl.errors import SaferlError
from saferl.replay.batch import Batch
from saferl.replay.buffer import (
    CHUNK,
    OnlineBuffer,
    Say,
    SharedBuffer,
    extra_columns,
    silent,
    take,
)
from saferl.replay.extras import Extra
from saferl.replay.layout import RowLayout
from saferl.replay.memory import allocate
from saferl.spec import Spec


def frame_shape(spec: Spec) -> tuple[int, ...]:
    """Shape of one frame; the frames of a stack lie one after the other on the first axis."""
    return spec.image[0] // spec.frame_stack, *spec.image[1:]


def refuse_windows(extras: tuple[Extra, ...]) -> None:
    """Raise `SaferlError` for an extra that looks at earlier rows: there are none of pixels."""
    if any(extra.looks_back for extra in extras):
        raise SaferlError("windows of steps are of vectors: pixels have a frame stack instead")


class FrameBuffer(SharedBuffer):
    """A dataset of pixels, each frame held once; stacks never reach before their episode's start.

    Arguments as for `ReplayBuffer`, and ``frames``: how many there is room for (as many as rows if
    None). ``memory_map`` holds the frames.

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
        extras: tuple[Extra, ...] = (),
        memory_map: str | Path | None = None,
        say: Say = silent,
        frames: int | None = None,
    ):
        refuse_windows(extras)
        super().__init__(RowLayout(spec, costs, extras), capacity, seeds, device)
        home = torch.device("cpu") if memory_map is not None else self.device
        self.rows = allocate((self.capacity, self.layout.width), torch.float32, home, None, silent)
        shape = (frames or self.capacity, *frame_shape(spec))
        self.frames = allocate(shape, torch.uint8, self.device, memory_map, say)
        self.at = torch.zeros(self.capacity, 2, dtype=torch.int64, device=home)  # s and s'
        self.start = torch.zeros(shape[0], dtype=torch.int64, device=home)
        self._back = torch.arange(spec.frame_stack - 1, -1, -1, device=home)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.frames, self.rows, self.at, self.start))

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
    ) -> FrameBuffer:
        """A buffer that holds a `Dataset` of pixels, and of its frames those that are used."""
        now, after = dataset.observations, dataset.next_observations
        rows = np.arange(len(dataset))
        if isinstance(now, Frames) and isinstance(after, Frames):
            at = np.stack([now.at, after.at], 1)
            used = np.unique(now.members(at))
            sources = [(now.frames, used)]
            at, start = np.searchsorted(used, at), np.searchsorted(used, now.start[used])
        else:  # whole observations: each is its own frame
            sources = [(np.asarray(now), rows), (np.asarray(after), rows)]
            at, start = np.stack([rows, len(rows) + rows], 1), np.arange(2 * len(rows))
        costs = dataset.costs is not None
        buffer = cls(spec, len(dataset), seeds, device, costs, extras, memory_map, say, len(start))
        filled, home = 0, buffer.frames.device
        for frames, used in sources:
            for part in range(0, len(used), CHUNK // 16):
                block = np.ascontiguousarray(frames[used[part : part + CHUNK // 16]])
                buffer.frames[filled : filled + len(block)] = torch.from_numpy(block).to(home)
                filled += len(block)
        columns = buffer.layout.encode(
            None, dataset.actions, dataset.rewards, None, dataset.terminals, dataset.costs,
            extra_columns(extras, dataset, spec),
        )  # fmt: skip
        for whole, values in ((buffer.rows, columns), (buffer.at, at), (buffer.start, start)):
            whole.copy_(torch.as_tensor(values))
        buffer.size = len(dataset)
        return buffer

    def gather(self, index: Tensor) -> Batch:
        batch, _ = take(self.layout, self.rows, index, self.device)
        newest = self.at[index.to(self.at.device).flatten()]  # [M · B, 2]
        numbers = torch.maximum(newest[..., None] - self._back, self.start[newest][..., None])
        images = self.frames.index_select(0, numbers.flatten())
        images = images.view(*index.shape, 2, *self.spec.image)
        if images.device != self.device:
            images = images.to(self.device, non_blocking=True)
        return batch._replace(observations=images[:, :, 0], next_observations=images[:, :, 1])


class OnlineFrameBuffer(OnlineBuffer):
    """Pixels that members gather. A row holds the frames of s and the newest of s'.

    So a frame is held once for each stack it is in: rows can be overwritten one by one. Arguments
    as for `OnlineBuffer`.
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
        refuse_windows(extras)
        super().__init__(spec, capacity, seeds, device, costs, extras)
        shape = (len(self.rows), spec.frame_stack + 1, *frame_shape(spec))
        self.frames = allocate(shape, torch.uint8, self.device, None, silent)

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes + self.frames.nbytes

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
        """As in `OnlineBuffer`; observations are flattened or images.

        Raises:
            SaferlError: the next observation's frames are not this one's, moved by one.
        """
        stack, one = self.spec.frame_stack, self.frames.shape[2:]
        before, after = (
            np.asarray(images).reshape(len(members), stack, *one)
            for images in (observations, next_observations)
        )
        if not np.array_equal(before[:, 1:], after[:, :-1]):
            raise SaferlError(
                f"the environment's observations are not the last {stack} frames, oldest first, as "
                "the dataset's are: wrap it so that they are"
            )
        frames = np.concatenate([before, after[:, -1:]], 1).astype(np.uint8)
        where = members * self.capacity + self.added[members] % self.capacity
        self.frames[torch.from_numpy(where).to(self.device)] = torch.from_numpy(frames).to(
            self.device
        )
        super().append(members, ends, None, actions, rewards, None, terminals, costs)

    def gather(self, index: Tensor) -> Batch:
        batch, shape = super().gather(index), (*index.shape, *self.spec.image)
        frames = self.frames.index_select(0, index.to(self.device).flatten())
        return batch._replace(
            observations=frames[:, :-1].reshape(shape),
            next_observations=frames[:, 1:].reshape(shape),
        )

    def history(self, index: np.ndarray, ends: np.ndarray) -> dict[str, Any]:
        """As in `OnlineBuffer`; observations are `Frames` where they are known to be stacks."""
        before, after = self._observed(index, ends)
        both = {"observations": before, "next_observations": after}
        return super().history(index, ends) | both

    def _observed(self, index: np.ndarray, ends: np.ndarray) -> tuple[Any, Any]:
        stack, rows = self.spec.frame_stack, torch.from_numpy(index).to(self.device)
        frames = self.frames[rows].cpu().numpy()
        if stack == 1:
            return frames[:, 0], frames[:, 1]
        first = np.flatnonzero(np.append(True, ends[:-1]))
        parts: tuple[list[Any], list[Any], list[Any]] = [], [], []
        (held, at, start), known = parts, 0
        for begin, end in zip(first, [*first[1:], len(index)]):
            held += [frames[begin, :stack], frames[begin:end, stack]]
            at.append(known + stack - 1 + np.arange(end - begin))
            start.append(np.full(stack + end - begin, known))
            known += stack + end - begin
        all_frames, newest, first_of = map(np.concatenate, parts)
        return (
            Frames(all_frames, newest, first_of, stack),
            Frames(all_frames, newest + 1, first_of, stack),
        )

    def _by_member(self) -> Tensor:
        return self.frames.view(self.members, self.capacity, *self.frames.shape[1:])

    def state_dict(self) -> dict[str, Tensor]:
        state = super().state_dict()
        frames = self._by_member()[:, : state["rows"].shape[1]].cpu().contiguous()
        return state | {"frames": frames}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        super().load_state_dict(state)
        self._by_member()[:, : state["frames"].shape[1]] = state["frames"].to(self.device)
