"""What engine=compile brings while acting: time of an environment step of SAC with its updates.

    python benchmarks/acting.py            # some minutes of one CPU core

SAC on Pendulum-v1 with half of every batch of 256 from 20,000 rows of noise; 64-64 and 256-256
units, 1 and 5 updates per environment step. Processor time (`time.process_time`) of one thread in
blocks that take turns, eager and compiled; medians, the median of the ratios of each turn, and its
middle 80 %. Compiling comes before and is not counted.
"""

from __future__ import annotations

import argparse
import os
import sys
import time

import common

os.environ.update(common.ONE_THREAD)

import numpy as np
import torch
from hybrid_speed import ENV, SPEC, noise

from saferl.agents.sac import SAC
from saferl.data.buffer import ReplayBuffer
from saferl.evaluation.rollout import Slots
from saferl.training.hybrid import HybridEngine

FILE = common.RESULTS / "acting.json"
ENGINES = ("eager", "compile")


def engine(kind: str, hidden: int, utd: int) -> HybridEngine:
    config = SAC.make_config({"hidden": [hidden] * 2, "random_steps": 0, "utd": float(utd)})
    slots, buffer = Slots(ENV, 1, None), ReplayBuffer.from_dataset(noise(), SPEC, [0])
    return HybridEngine(SAC(SPEC, config, 1), slots, 10**5, buffer, kind=kind)


def measure(hidden: int, utd: int, rounds: int) -> dict:
    """Milliseconds of a step."""
    engines = [engine(kind, hidden, utd) for kind in ENGINES]
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
        "hidden": hidden,
        "utd": utd,
        "milliseconds": dict(zip(ENGINES, np.median(times, 0).tolist())),
        "ratio": float(np.median(ratios)),
        "middle": np.quantile(ratios, [0.1, 0.9]).tolist(),
    }


def report(found: dict) -> str:
    rows = []
    for cell in found["cells"]:
        low, high = cell["middle"]
        rows.append(
            [f"{cell['hidden']}-{cell['hidden']}", cell["utd"]]
            + [f"{cell['milliseconds'][kind]:.2f}" for kind in ENGINES]
            + [f"{cell['ratio']:.2f} ({low:.2f} to {high:.2f})"]
        )
    heads = ["units", "UTD", "eager, ms per step", "compile", "compile / eager"]
    return common.table(heads, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = common.header() | {
        "cells": [measure(h, utd, options.rounds) for h in (64, 256) for utd in (1, 5)],
    }
    common.write_json(FILE, found)
    print(report(found))


if __name__ == "__main__":
    sys.exit(main())
