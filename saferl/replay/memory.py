"""Memory of a buffer: what is free on a device, and tensors on it or in a file."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from saferl import io
from saferl.errors import SaferlError
from saferl.io import human


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on the device now."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else io.free_memory()


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
        file = Path(file)
        if not file.parent.is_dir():
            raise SaferlError(f"--memory-map {file}: the folder {file.parent} does not exist")
        if file.exists() and (not file.is_file() or file.stat().st_size != need):
            raise SaferlError(
                f"--memory-map {file} exists and is no buffer of this run: name a file that is "
                "not there yet"
            )
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
