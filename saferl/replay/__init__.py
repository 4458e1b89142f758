"""Replay buffers on the device, and what an update draws from them.

buffer = make_buffer(dataset, dataset.spec(config), seeds=(0, 1, 2))
batch = buffer.sample(256)                                       # fields [3, 256, …]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from saferl.data.dataset import Dataset
from saferl.replay.batch import Batch, Sampler
from saferl.replay.buffer import OnlineBuffer, ReplayBuffer, Say, SharedBuffer, silent
from saferl.replay.extras import Extra, NextActions, ReturnsToGo, Window
from saferl.replay.frames import FrameBuffer, OnlineFrameBuffer, frame_shape
from saferl.replay.layout import RowLayout
from saferl.replay.memory import free_memory
from saferl.replay.mixed import MixedSampler
from saferl.spec import Spec

__all__ = [
    "Batch",
    "Extra",
    "FrameBuffer",
    "MixedSampler",
    "NextActions",
    "OnlineBuffer",
    "OnlineFrameBuffer",
    "ReplayBuffer",
    "ReturnsToGo",
    "RowLayout",
    "Sampler",
    "SharedBuffer",
    "Window",
    "buffer_class",
    "free_memory",
    "make_buffer",
    "online_buffer_class",
    "row_floats",
]


def buffer_class(spec: Spec) -> type[ReplayBuffer] | type[FrameBuffer]:
    """The class for a dataset: `FrameBuffer` for pixels."""
    return FrameBuffer if spec.image else ReplayBuffer


def online_buffer_class(spec: Spec) -> type[OnlineBuffer]:
    """The class for what members gather: `OnlineFrameBuffer` for pixels."""
    return OnlineFrameBuffer if spec.image else OnlineBuffer


def make_buffer(
    dataset: Dataset,
    spec: Spec,
    seeds: Sequence[int],
    device: torch.device | str = "cpu",
    extras: tuple[Extra, ...] = (),
    memory_map: str | Path | None = None,
    say: Say = silent,
) -> SharedBuffer:
    """A buffer that holds every transition of a `Dataset`, and that all members share.

    Args:
        spec: maps raw arrays to the agent's units. seeds: one per member.
        extras: further columns of a batch (`saferl.replay.extras`).
        memory_map: a file that holds the rows (frames, for pixels) instead of memory.
        say: receives the line that states the memory need before it is allocated.

    Raises:
        SaferlError: the rows do not fit into the memory that is free.
    """
    cls = buffer_class(spec)
    return cls.from_dataset(dataset, spec, seeds, device, extras, memory_map, say)


def row_floats(
    spec: Spec, costs: bool, extras: tuple[Extra, ...] = (), online: bool = False
) -> float:
    """Floats of memory for one row, its share of the frames included.

    ``online``: of what a member gathers, where each stack of frames is held whole.
    """
    width = RowLayout(spec, costs, extras).width
    if not spec.image:
        return width
    frame = math.prod(frame_shape(spec)) / 4  # bytes, in floats
    if online:
        return width + (spec.frame_stack + 1) * frame
    return width + 6 + (1 if spec.frame_stack > 1 else 2) * frame
