"""What acting costs the loop, and the meta step MOORL.

Processor time of one thread (`time.process_time`) in blocks that take turns. A ratio is the median
of those of the rounds, with their quartiles.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable
from typing import Any

import numpy as np

from benchmarks.runner import one_thread

ENV = "Pendulum-v1"
TASKS = ((256, 1), (256, 3), (64, 1))  # units per layer, members
HEADS = ["units", "members", "update, ms", "with its environment step, ms", "rate of the former",
         "MOORL iteration (K 5), ms", "meta step, µs", "of the iteration"]  # fmt: skip


def spec() -> Any:
    """Of Pendulum."""
    from saferl.spec import Spec

    return Spec(3, 1, action_low=(-2.0,), action_high=(2.0,), horizon=200)


def noise() -> Any:
    """Rows in the shape of Pendulum's."""
    from saferl.data import Dataset

    rng = np.random.default_rng(0)
    rows, ends = 20_000, np.arange(20_000) % 200 == 199
    return Dataset.from_arrays(
        rng.normal(size=(rows, 3)), rng.uniform(-2, 2, (rows, 1)), rng.normal(size=rows),
        np.zeros(rows), ends, rng.normal(size=(rows, 3)), action_low=(-2.0,), action_high=(2.0,),
    )  # fmt: skip


def measure(units: int, members: int, rounds: int) -> dict[str, Any]:
    """Processor time of an update in each loop, and of MOORL's iteration with its meta step."""
    import torch

    from saferl.agents.moorl import MOORL
    from saferl.agents.sac import SAC
    from saferl.replay import ReplayBuffer
    from saferl.rollout import VectorEnv
    from saferl.training.engine import Engine
    from saferl.training.online import OnlineEngine

    one_thread()
    data, seeds, hidden = noise(), range(members), [units, units]
    config = SAC.make_config({"hidden": hidden, "random_steps": 0, "start_steps": 0})
    buffer = ReplayBuffer.from_dataset(data, spec(), seeds)
    pure = Engine(SAC(spec(), config, members), buffer)
    both = OnlineEngine(
        SAC(spec(), config, members), VectorEnv(ENV, members, None), 10**5,
        ReplayBuffer.from_dataset(data, spec(), seeds),
    )  # fmt: skip
    moorl = MOORL(spec(), MOORL.make_config({"hidden": hidden}), members)
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

    return {
        "agent": "moorl",
        "hidden": hidden,
        "members": members,
        "rounds": rounds,
        "milliseconds": {name: 1e3 * value for name, value in medians.items()},
        "update_rate_of_offline": ratio("offline", "hybrid"),
        "meta_step_of_iteration": ratio("meta", "moorl"),
    }


def rows(found: list[dict[str, Any]]) -> Iterable[list[str]]:
    """Of the table."""
    for cell in found:
        ms, (low, rate, high) = cell["milliseconds"], cell["update_rate_of_offline"]
        yield [
            "-".join(map(str, cell["hidden"])), str(cell["members"]), f"{ms['offline']:.2f}",
            f"{ms['hybrid']:.2f}", f"{rate:.1%} ({low:.1%} to {high:.1%})", f"{ms['moorl']:.2f}",
            f"{1e3 * ms['meta']:.0f}", f"{cell['meta_step_of_iteration'][1]:.2%}",
        ]  # fmt: skip
