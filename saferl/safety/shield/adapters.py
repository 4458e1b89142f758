"""Policies and critics of this library and of others, called in one way: numpy in, numpy out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from saferl.errors import SaferlError


def each(function: Callable[[np.ndarray], Any]) -> Callable[[np.ndarray], np.ndarray]:
    """A function of one observation ``[O]`` as a function of several ``[N, O]``."""
    return lambda observations: np.stack([np.asarray(function(row)) for row in observations])


def to_numpy(values: Any) -> np.ndarray:
    return values.detach().cpu().numpy() if hasattr(values, "detach") else np.asarray(values)


class PolicyAdapter:
    """A policy or critic; ``name`` is what messages call it.

    With an attribute ``members``, which must be 1, it is given tensors ``[1, N, …]`` on its device
    and returns the same (a `saferl.nn.Policy` does); otherwise numpy arrays ``[N, …]``.

    Raises:
        SaferlError: it cannot be called or has several members; from a call: a result of another
            shape than asked for, or not of numbers.
    """

    def __init__(self, function: Any, name: str):
        if not callable(function):
            raise SaferlError(f"the {name} cannot be called: pass a policy or a function")
        members = getattr(function, "members", None)
        if members not in (None, 1):
            raise SaferlError(
                f"the {name} has {members} members: pass one of them, such as policy.member(0)"
            )
        self.function, self.name, self.tensors = function, name, members == 1
        self.device: Any = "cpu"
        if hasattr(function, "parameters"):
            tensors = [*function.parameters(), *function.buffers()]
            self.device = tensors[0].device if tensors else "cpu"

    def __call__(self, *arrays: np.ndarray, shape: tuple) -> np.ndarray:
        """What it returns for arrays of N rows, ``[N, *shape]``; a letter stands for any size."""
        return self._result(self.function, arrays, (), shape)

    def sample(self, rows: np.ndarray, random: Any, shape: tuple) -> np.ndarray:
        """Actions ``[N, *shape]`` drawn with ``random``, a `MemberRandom`."""
        return self._result(self.function.sample, (rows,), (random,), shape)

    def _result(self, function: Any, arrays: tuple, others: tuple, shape: tuple) -> np.ndarray:
        if self.tensors:
            import torch

            tensors = [torch.as_tensor(_single(a)[None], device=self.device) for a in arrays]
            with torch.no_grad():
                result = to_numpy(function(*tensors, *others))
            result = result[0] if result.ndim else result
        else:
            result = to_numpy(function(*arrays, *others))
        wanted = (len(arrays[0]), *shape)
        if result.shape != wanted:  # nearly always equal; letters are looked at only now
            sizes = zip(wanted, result.shape)
            same = [isinstance(want, str) or want == found for want, found in sizes]
            if result.ndim != len(wanted) or not all(same):
                raise SaferlError(
                    f"the {self.name} returned shape {_shape(result.shape)}, expected "
                    f"{_shape(wanted)}: it is called with all rows at once; "
                    "saferl.safety.shield.adapters.each adapts a function of one observation"
                )
        if result.dtype.kind not in "fiub":
            raise SaferlError(f"the {self.name} returned {result.dtype} values, expected numbers")
        return result


def _shape(sizes: tuple) -> str:
    return "[" + ", ".join(map(str, sizes)) + "]"


def _single(array: np.ndarray) -> np.ndarray:
    """Floats as float32; the actions of a discrete task stay whole numbers."""
    if array.dtype.kind == "f":
        array = array.astype(np.float32, copy=False)
    return array if array.flags.writeable else array.copy()  # torch warns of read-only arrays
