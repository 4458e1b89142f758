"""Pixel observations: single frames held once, stacked where they are read."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from hashlib import blake2b
from typing import Any

import numpy as np


class Frames:
    """``[N, stack · C, H, W]`` uint8 that is made on reading, from frames ``[F, C, H, W]``.

    Observation i is the stack of frames up to number ``at[i]``, oldest first. Before the first
    frame of an episode that frame is repeated, so no stack reaches into another episode. The
    observations and next observations of a `Dataset` share their frames.

    Args:
        frames: uint8, in time order within an episode.
        at: ``[N]`` int64, the newest frame of each observation.
        start: ``[F]`` int64, the first frame of the episode that a frame belongs to.
        stack: frames in one observation, 1 or more.
    """

    dtype = np.dtype(np.uint8)

    def __init__(self, frames: np.ndarray, at: np.ndarray, start: np.ndarray, stack: int):
        self.frames, self.at, self.start, self.stack = frames, at, start, stack

    @property
    def shape(self) -> tuple[int, ...]:
        channels, height, width = self.frames.shape[1:]
        return len(self.at), self.stack * channels, height, width

    @property
    def ndim(self) -> int:
        return 4

    @property
    def flags(self) -> Any:
        return self.frames.flags

    def view(self) -> Frames:
        return self

    def __len__(self) -> int:
        return len(self.at)

    def members(self, at: np.ndarray) -> np.ndarray:
        """Numbers of the frames in the stacks that end at ``at``, ``[…, stack]``."""
        past = at[..., None] - np.arange(self.stack - 1, -1, -1)
        return np.maximum(past, self.start[at][..., None])

    def __getitem__(self, rows: Any) -> np.ndarray:
        """Stacked observations of one row, a slice, row numbers or a mask, as an array."""
        images = self.frames[self.members(self.at[rows])]
        return images.reshape(*images.shape[:-4], *self.shape[1:])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:] if dtype is None else self[:].astype(dtype)

    def take(self, rows: np.ndarray) -> Frames:
        """The observations of some rows, over the same frames."""
        return Frames(self.frames, self.at[rows], self.start, self.stack)

    @cached_property
    def hashes(self) -> np.ndarray:
        """``[N]`` uint64, equal for rows whose newest frames are equal."""
        digests = b"".join(blake2b(frame, digest_size=8).digest() for frame in self.frames)
        return np.frombuffer(digests, np.uint64)[self.at]


def take(array: np.ndarray | Frames, rows: np.ndarray) -> np.ndarray | Frames:
    """``array[rows]``, without making the stacks of `Frames`."""
    return array.take(rows) if isinstance(array, Frames) else array[rows]


def blocks(array: np.ndarray | Frames) -> tuple[np.ndarray, ...]:
    """The arrays that are really held."""
    if isinstance(array, Frames):
        return array.frames, array.at, array.start, np.array(array.stack)
    return (array,)


def nbytes(arrays: Iterable[np.ndarray | Frames]) -> int:
    """Bytes that arrays occupy, frames that they share counted once."""
    return sum({id(block): block.nbytes for array in arrays for block in blocks(array)}.values())


def is_image(observations: np.ndarray | Frames) -> bool:
    """Whether observations are pixels: uint8 with three axes each."""
    return observations.dtype == np.uint8 and observations.ndim == 4
