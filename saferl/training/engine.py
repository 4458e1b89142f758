"""Engines run K updates and leave the sums of the metrics on the device.

The loop reads them every N steps, so no update waits for the host. Three ways to run the same
updates, from the same random streams:

- ``eager``: one operation after the other;
- ``compile``: the operations of `Agent.learn`, recorded once and compiled by Inductor;
- ``cuda_graph``: drawing the batch, K updates and the sums of their metrics are recorded once as a
  CUDA graph and then replayed with a single launch.
"""

from __future__ import annotations

import shutil
from collections.abc import Hashable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saferl.errors import SaferlError, unknown
from saferl.io import part
from saferl.nn import PRECISIONS
from saferl.replay import Batch, Sampler
from saferl.rng import MemberRandom
from saferl.training.compiled import Compiled

ENGINES = ("auto", "eager", "compile", "cuda_graph")
BLOCKS = (20, 1)  # updates in one CUDA graph; the shorter for what the longer leaves
MAX_GRAPHS = 16  # kept; rarer sequences of updates run eagerly


def pick_device(name: str) -> torch.device:
    """ "auto" is the GPU if there is one.

    Raises:
        SaferlError: the device does not exist on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise SaferlError(f"device {name!r} cannot be used: {reason}") from None
    return device


def pick_engine(kind: str, device: torch.device) -> str:
    """The engine to use; "auto" is cuda_graph on a GPU, else eager.

    Raises:
        SaferlError: unknown, or the device or this machine lacks what it needs.
    """
    if kind not in ENGINES:
        raise unknown("engine", kind, ENGINES)
    if kind == "auto":
        return "cuda_graph" if device.type == "cuda" else "eager"
    if kind == "cuda_graph" and device.type != "cuda":
        raise SaferlError(f"engine cuda_graph needs a GPU but the run is on {device}: use auto")
    if (
        kind == "compile"
        and device.type == "cpu"
        and not any(map(shutil.which, ("g++", "clang++")))
    ):
        raise SaferlError("engine compile needs a C++ compiler (g++) on the PATH: use auto")
    return kind


def check_precision(precision: str, device: torch.device) -> None:
    """Refuse bf16 where it would be emulated, which is slower than fp32 and no more accurate.

    Raises:
        SaferlError: an unknown precision, or the device has no bf16 arithmetic.
    """
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
    if precision != "bf16":
        return
    if device.type == "cuda":
        able, needs = torch.cuda.is_bf16_supported(including_emulation=False), "an Ampere GPU"
    else:
        able = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        needs = "a CPU with AVX512-BF16 or AMX"
    if not able:
        raise SaferlError(f"precision bf16 needs {needs} or later, which {device} is not: use fp32")


class Engine:
    """Updates from a fixed buffer.

    Args:
        agent: an `Agent`.
        buffer: what it learns from.
        kind: how (`pick_engine` turns "auto" into one of the others).

    Raises:
        SaferlError: the buffer is not in the GPU's memory, where a CUDA graph needs it.
    """

    def __init__(self, agent: Any, buffer: Sampler, kind: str = "eager"):
        self.agent, self.buffer = agent, buffer
        self.kind = pick_engine(kind, agent.device)
        if self.kind == "cuda_graph" and not buffer.on_device:
            raise SaferlError(
                "engine cuda_graph needs the replay buffer in the GPU's memory: leave out "
                "--memory-map, or use eager"
            )
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._learn = Compiled(agent) if self.kind == "compile" else None
        self._graphs: dict[tuple[Hashable, ...], Recorded] = {}
        self._seen: set[tuple[Hashable, ...]] = set()  # sequences that have run eagerly
        # All graphs work in the same memory: what outlives an update was allocated before them.
        self.pool = torch.cuda.graph_pool_handle() if self.kind == "cuda_graph" else None

    failure: SaferlError | None = None  # why `run` did fewer steps than it was asked for

    def run(self, steps: int) -> int:
        """``steps`` gradient updates; on a GPU they may still be under way on return.

        Returns the steps done, fewer where there is a `failure`.
        """
        if self.kind != "cuda_graph":
            for _ in range(steps):
                self._update()
            return steps
        left = steps
        for size in BLOCKS:
            while left >= size:
                self._block(size)
                left -= size
        return steps

    def wait(self) -> None:
        """Return when the device has done what `run` gave it."""
        if self.agent.device.type == "cuda":
            torch.cuda.synchronize(self.agent.device)

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """One gradient update from ``batch``, compiled or not; its metrics, ``[M]`` each."""
        return self.agent.update(batch, self._learn)

    def _update(self) -> None:
        for name, value in self.update(self.buffer.sample(self.agent.batch_rows)).items():
            if name not in self._sums:
                self._sums[name] = torch.zeros_like(value)
                self._counts[name] = 0
            self._sums[name] += value
            self._counts[name] += 1

    def _block(self, size: int) -> None:
        """``size`` updates: eagerly when their sequence comes first, then recorded and replayed."""
        agent = self.agent
        key = tuple(agent.update_key(agent.updates + i) for i in range(1, size + 1))
        if key in self._seen and key not in self._graphs and len(self._graphs) < MAX_GRAPHS:
            self._graphs[key] = Recorded(self, size)
        if key in self._graphs:
            self._graphs[key].replay()
            return
        # The first time also creates what may not be created while recording: optimiser slots,
        # sums, tensors of hyper-parameters.
        for _ in range(size):
            self._update()
        self._seen.add(key)

    def read(self) -> dict[str, np.ndarray]:
        """Mean of each metric since the last read, ``[M]``: the only wait for the device."""
        means = {
            n: (self._sums[n] / count).cpu().numpy() for n, count in self._counts.items() if count
        }
        for name, total in self._sums.items():
            total.zero_()  # in place, as CUDA graphs add to this very memory
            self._counts[name] = 0
        return means

    def state_dict(self) -> dict[str, Tensor]:
        """Sampler state, and metric sums that were not read yet."""
        state = {f"buffer.{k}": v for k, v in self.buffer.state_dict().items()}
        for name, count in self._counts.items():
            if count:
                state[f"sum.{name}"] = self._sums[name]
                state[f"count.{name}"] = torch.tensor(count)
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.buffer.load_state_dict(part(state, "buffer."))
        # They hold the memory of what is replaced here.
        self._graphs, self._seen = {}, set()
        if self._learn is not None:
            self._learn = Compiled(self.agent)
        self._sums = {k: v.to(self.agent.device).clone() for k, v in part(state, "sum.").items()}
        self._counts = {k: int(v) for k, v in part(state, "count.").items()}

    def close(self) -> None:
        """Release what the engine holds besides memory."""


class Recorded:
    """A CUDA graph of ``size`` updates of an engine, metrics added to its sums."""

    def __init__(self, engine: Engine, size: int):
        self.engine, self.size = engine, size
        agent = engine.agent
        self.graph = torch.cuda.CUDAGraph()
        for random in (*engine.buffer.streams_of_random, *vars(agent).values()):
            if isinstance(random, MemberRandom):
                for generator in random.generators:
                    self.graph.register_generator_state(generator)
        counts, updates = dict(engine._counts), agent.updates
        with torch.cuda.graph(self.graph, pool=engine.pool):
            for _ in range(size):
                engine._update()
        # Nothing has run yet: take back what recording counted.
        self.counts = {name: n - counts.get(name, 0) for name, n in engine._counts.items()}
        engine._counts, agent.updates = counts, updates

    def replay(self) -> None:
        agent, counts = self.engine.agent, self.engine._counts
        self.graph.replay()
        agent.updates += self.size
        agent.key = agent.update_key(agent.updates)
        for name, n in self.counts.items():
            counts[name] += n
