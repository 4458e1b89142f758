"""What engine=compile brings while acting: time of an environment step of SAC with its updates.

SAC on Pendulum-v1 with half of every batch of 256 from 20,000 rows of noise; 64-64 and 256-256
units, 1 and 5 updates per environment step. Processor time (`time.process_time`) of one thread in
blocks that take turns, eager and compiled; medians, the median of the ratios of each turn, and its
middle 80 %. Compiling comes before and is not counted.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import numpy as np

from benchmarks.runner import one_thread
from benchmarks.speed.online import ENV, noise, spec

TASKS = tuple((hidden, utd) for hidden in (64, 256) for utd in (1, 5))
KINDS = ("eager", "compile")
HEADS = ["units", "UTD", "eager, ms per step", "compile", "compile / eager"]


def engine(kind: str, hidden: int, utd: int) -> Any:
    from saferl.agents.sac import SAC
    from saferl.replay import ReplayBuffer
    from saferl.rollout import VectorEnv
    from saferl.training.online import OnlineEngine

    config = SAC.make_config({"hidden": [hidden] * 2, "random_steps": 0, "utd": float(utd)})
    env, buffer = VectorEnv(ENV, 1, None), ReplayBuffer.from_dataset(noise(), spec(), [0])
    return OnlineEngine(SAC(spec(), config, 1), env, 10**5, buffer, kind=kind)


def measure(hidden: int, utd: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of a step."""
    one_thread()
    engines = [engine(kind, hidden, utd) for kind in KINDS]
    steps = 60 // utd
    for made in engines:  # until all that is compiled has run
        made.run(12)
    times = np.zeros((rounds, 2))
    for turn in range(rounds):
        for i, made in enumerate(engines):
            start = time.process_time()
            made.run(steps)
            times[turn, i] = 1e3 * (time.process_time() - start) / steps
    for made in engines:
        made.close()
    ratios = times[:, 1] / times[:, 0]
    return {
        "agent": "sac",
        "hidden": hidden,
        "utd": utd,
        "milliseconds": dict(zip(KINDS, np.median(times, 0).tolist())),
        "ratio": float(np.median(ratios)),
        "middle": np.quantile(ratios, [0.1, 0.9]).tolist(),
    }


def rows(found: list[dict[str, Any]]) -> Iterable[list[str]]:
    """Of the table."""
    for cell in found:
        low, high = cell["middle"]
        times = [f"{cell['milliseconds'][kind]:.2f}" for kind in KINDS]
        yield [f"{cell['hidden']}-{cell['hidden']}", str(cell["utd"]), *times,
               f"{cell['ratio']:.2f} ({low:.2f} to {high:.2f})"]  # fmt: skip
