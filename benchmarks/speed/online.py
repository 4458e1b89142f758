"""What acting costs the loop, and the meta step MOORL: `python benchmarks/hybrid.py speed`.

Processor time of one thread (`time.process_time`) in blocks that take turns. A ratio is the median
of those of the rounds, with their quartiles.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import common
import numpy as np
import torch

from saferl.agents.moorl import MOORL
from saferl.agents.sac import SAC
from saferl.data import Dataset
from saferl.data.buffer import ReplayBuffer
from saferl.evaluation.rollout import Slots
from saferl.spec import Spec
from saferl.training.engine import Engine
from saferl.training.hybrid import HybridEngine

ENV = "Pendulum-v1"
SPEC = Spec(3, 1, action_low=(-2.0,), action_high=(2.0,), horizon=200)


def noise() -> Dataset:
    """Rows in the shape of Pendulum's."""
    rng = np.random.default_rng(0)
    rows, ends = 20_000, np.arange(20_000) % 200 == 199
    return Dataset.from_arrays(
        rng.normal(size=(rows, 3)), rng.uniform(-2, 2, (rows, 1)), rng.normal(size=rows),
        np.zeros(rows), ends, rng.normal(size=(rows, 3)), action_low=(-2.0,), action_high=(2.0,),
    )  # fmt: skip


def speed(rounds: int, hidden: list[int], members: int) -> dict[str, Any]:
    """Processor time of an update in each loop, and of MOORL's iteration with its meta step."""
    torch.set_num_threads(1)
    data, seeds = noise(), range(members)
    config = SAC.make_config({"hidden": hidden, "random_steps": 0, "start_steps": 0})
    buffer = ReplayBuffer.from_dataset(data, SPEC, seeds)
    pure = Engine(SAC(SPEC, config, members), buffer)
    both = HybridEngine(
        SAC(SPEC, config, members), Slots(ENV, members, None), 10**5,
        ReplayBuffer.from_dataset(data, SPEC, seeds),
    )  # fmt: skip
    moorl = MOORL(SPEC, MOORL.make_config({"hidden": hidden}), members)
    batch = buffer.sample(moorl.batch_rows)
    both.run(300)

    def meta() -> None:
        with torch.no_grad():
            torch._foreach_copy_(moorl._meta, moorl._moving)
        moorl.meta_step()

    tasks = {
        "offline": (lambda: pure.run(20), 20),
        "hybrid": (lambda: both.run(20), 20),
        "moorl": (lambda: [moorl.update(batch) for _ in range(4)], 4),
        "meta": (lambda: [meta() for _ in range(40)], 40),
    }
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for turn in range(rounds + 1):
        for name, (run, count) in tasks.items():
            start = time.process_time()
            run()
            if turn:  # the first warms up
                times[name].append((time.process_time() - start) / count)
    both.close()
    medians = {name: statistics.median(values) for name, values in times.items()}

    def ratio(over: str, under: str) -> list[float]:
        found = [a / b for a, b in zip(times[over], times[under], strict=True)]
        return [float(q) for q in np.quantile(found, (0.25, 0.5, 0.75))]

    return common.header() | {
        "hidden": hidden,
        "members": members,
        "rounds": rounds,
        "milliseconds": {name: 1e3 * value for name, value in medians.items()},
        "update_rate_of_offline": ratio("offline", "hybrid"),
        "meta_step_of_iteration": ratio("meta", "moorl"),
    }


def told(found: dict[str, Any]) -> str:
    """A line of Markdown."""
    ms = found["milliseconds"]
    low, rate, high = (100 * q for q in found["update_rate_of_offline"])
    return (
        f"- {found['members']} member(s), layers {found['hidden']}: an update takes "
        f"{ms['offline']:.2f} ms in the offline loop and {ms['hybrid']:.2f} ms with its "
        f"environment step, {rate:.1f} % of the rate (quartiles {low:.1f}, {high:.1f}); a MOORL "
        f"iteration of K = 5 takes {ms['moorl']:.2f} ms, snapshot and meta step "
        f"{1e3 * ms['meta']:.0f} µs of it, {100 * found['meta_step_of_iteration'][1]:.2f} %"
    )
