"""Our side of the study `speed`: agents under every engine, the plain references, one long run.

Runs as a worker with one CPU thread. Subjects are kept under a key until `drop`, so that blocks of
different ones can take turns. What the machine cannot do comes back as ``{"missing": reason}``.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

from benchmarks import workers
from benchmarks.speed import bounds, floors

KINDS = ("eager", "compile", "cuda_graph")
PRECISIONS = ("fp32", "bf16")
FIT_ROWS = 2048  # of the data, for methods that learn something before their first update
COST_LIMIT = 25.0  # for methods that need one; it changes no shape
PIXEL_ROWS, FRAME, FRAME_STACK = 1000, (3, 84, 84), 3  # for methods that learn from pixels


def or_missing(function: Callable[..., Any]) -> Callable[..., Any]:
    """Answer with the reason where something cannot be done here."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        import torch

        from saferl.errors import SaferlError

        try:
            return function(*args, **kwargs)
        except SaferlError as error:
            return {"missing": str(error)}
        except torch.OutOfMemoryError:
            return {"missing": "out of memory"}
        except Exception as error:
            # The log has the rest, the table says "failed", and what else there is gets measured.
            traceback.print_exc(file=sys.stderr)
            line = (str(error).splitlines() or [""])[0][:200]
            return {"missing": f"failed: {type(error).__name__}: {line}"}

    return wrapped


@dataclasses.dataclass
class Task:
    """What to build: an agent with its defaults and ``settings`` over them.

    ``quick`` makes networks and batches so small that an update takes no time: to see that
    everything runs.
    """

    agent: str
    data: dict[str, int]  # arguments of `workers.synthetic`
    kind: str = "auto"
    precision: str = "fp32"
    members: int = 1
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    quick: bool = False

    @property
    def cls(self) -> Any:
        from saferl.registry import agent_class

        return agent_class(self.agent)

    def config(self) -> Any:
        layers = ("hidden", "critic_hidden", "value_hidden", "vae_hidden")
        small = {name: [16, 16] for name in layers} | {"samples": 2, "batch_size": 16}
        wanted = small if self.quick else {}
        if self.cls.needs_costs:
            wanted = wanted | {"cost_limit": COST_LIMIT}
        known = {field.name for field in dataclasses.fields(self.cls.Config)}
        wanted = {name: value for name, value in wanted.items() if name in known}
        return self.cls.make_config(wanted | self.settings)

    def dataset(self) -> Any:
        cls, shape = self.cls, tuple(sorted(self.data.items()))
        data = synthetic(cls.discrete, cls.needs_costs, bool(cls.pixels), shape)
        return cls.prepare(data, self.config())


@functools.cache
def synthetic(discrete: bool, costs: bool, pixels: bool, shape: tuple[tuple[str, int], ...]) -> Any:
    """`workers.synthetic` as a `Dataset`, with what a method asks for.

    That is as many discrete actions as components, costs, or one episode of pixels.
    """
    import numpy as np

    from saferl.data import Dataset
    from saferl.data.frames import Frames

    random, sizes = np.random.default_rng(1), dict(shape)
    if pixels:
        sizes["rows"] = min(sizes["rows"], PIXEL_ROWS)
    rows, a = sizes["rows"], sizes["action_dim"]
    arrays = workers.synthetic(**sizes)
    arrays["rewards"] = arrays["rewards"][:, 0]
    if pixels:
        frames = random.integers(256, size=(rows + 1, *FRAME), dtype=np.uint8)
        for number, name in enumerate(("observations", "next_observations")):
            at, start = np.arange(rows) + number, np.zeros(rows + 1, np.int64)
            arrays[name] = Frames(frames, at, start, FRAME_STACK)
    if costs:  # four fifths of the limit per episode on average, so that some keep it
        arrays["costs"] = (random.random(rows) < 0.8 * COST_LIMIT / 1000).astype(np.float32)
    units: dict[str, Any] = {"action_low": (-1.0,) * a, "action_high": (1.0,) * a}
    if discrete:
        arrays["actions"] = random.integers(a, size=rows)
        units = {"n_actions": a}
    return Dataset.from_arrays(**arrays, id="synthetic", **units)


class Subject:
    """An agent with buffer and engine."""

    def __init__(self, agent: Any, buffer: Any, kind: str):
        from saferl.training.engine import Engine

        self.agent, self.buffer = agent, buffer
        self.engine = Engine(agent, buffer, kind)

    @classmethod
    def of(cls, task: Task, device: str) -> Subject:
        """Raises `SaferlError` where the device lacks the engine or the precision."""
        import torch

        from saferl.agents.shared.agent import Agent
        from saferl.replay import make_buffer
        from saferl.training.engine import check_precision, pick_engine

        pick_engine(task.kind, torch.device(device))  # before anything is built
        check_precision(task.precision, torch.device(device))
        rows, config, seeds = task.dataset(), task.config(), list(range(task.members))
        spec = rows.spec(config)
        agent = task.cls(spec, config, seeds, device, task.precision)
        if task.cls.fit is not Agent.fit:
            agent.fit(rows.subset(min(FIT_ROWS, len(rows))), lambda line: None)
        buffer = make_buffer(rows, spec, seeds, device, task.cls.batch_extras(config))
        return cls(agent, buffer, task.kind)

    def run(self, updates: int, now: Callable[[], float] = time.perf_counter) -> float:
        """Seconds of so many updates, batches drawn by the engine."""
        self.engine.wait()
        start = now()
        self.engine.run(updates)
        self.engine.wait()
        seconds = now() - start
        self.engine.read()
        return seconds

    def split(self, updates: int, now: Callable[[], float]) -> tuple[float, float]:
        """Seconds spent on sampling and on updating (on a CPU)."""
        rows = self.agent.batch_rows
        return in_turn(lambda: self.buffer.sample(rows), self.engine.update, updates, now)

    def multiply_adds(self, name: str) -> tuple[float, str]:
        """Per update of all members, and how it was found."""
        spec, config = self.agent.spec, self.agent.config
        try:
            count = floors.multiply_adds(name, spec.observation_dim, spec.action_dim, config)
            return self.agent.members * count, "from the layer sizes"
        except KeyError:
            batch = self.buffer.sample(self.agent.batch_rows)
            return floors.counted(lambda: self.agent.update(batch)), "torch's counter"

    def empty(self, updates: int = 100) -> float:
        """Seconds of an update that reads its batch and learns nothing, on the same engine."""
        import torch
        from torch import nn

        class Nothing(type(self.agent)):
            def build(self, init: Any) -> None:
                self.actor = nn.Linear(1, 1)

            def update_key(self, update: int) -> None:
                return None

            def learn(self, batch: Any) -> dict[str, Any]:
                fields = [x.flatten(1).to(torch.float32) for x in batch.tensors()]
                return {"mean": sum(field.mean(1) for field in fields)}

        agent = self.agent
        idle = Nothing(agent.spec, agent.config, agent.seeds, agent.device, agent.precision)
        twin = Subject(idle, self.buffer, self.engine.kind)
        twin.run(updates)
        return statistics.median(twin.run(updates) for _ in range(5)) / updates


class PlainSubject:
    """A reference of tests/agents/plain.py with a buffer of its own."""

    def __init__(self, task: Task, device: str):
        import torch

        from tests.agents import plain

        self.device, config, arrays = device, task.config(), workers.synthetic(**task.data)
        sizes = task.data["observation_dim"], task.data["action_dim"]
        self.plain, self.rows = plain.KINDS[task.agent](*sizes, config, device), config.batch_size
        names = ("observations", "actions", "rewards", "next_observations")
        terminals = torch.from_numpy(arrays["terminals"]).float()[:, None]
        fields = [*(torch.from_numpy(arrays[name]) for name in names), terminals]
        self.buffer = plain.Buffer(*(field.to(device) for field in fields))

    def split(self, updates: int, now: Callable[[], float]) -> tuple[float, float]:
        def update(batch: Any) -> None:
            self.plain.update(*batch)

        return in_turn(lambda: self.buffer.sample(self.rows), update, updates, now)

    def run(self, updates: int, now: Callable[[], float] = time.perf_counter) -> float:
        start = now()
        self.split(updates, now)
        if self.device != "cpu":
            import torch

            torch.cuda.synchronize()
        return now() - start


def in_turn(
    sample: Callable[[], Any],
    update: Callable[[Any], Any],
    updates: int,
    now: Callable[[], float],
) -> tuple[float, float]:
    """Seconds in ``sample`` and in ``update``."""
    sampling = updating = 0.0
    for _ in range(updates):
        start = now()
        batch = sample()
        middle = now()
        update(batch)
        sampling += middle - start
        updating += now() - middle
    return sampling, updating


class Ours:
    """The handlers of the worker; times are in seconds of the clock that is named."""

    def __init__(self, device: str):
        self.device = device
        self.subjects: dict[str, Any] = {}
        self.products: dict[str, floors.Product] = {}

    @or_missing
    def make(self, key: str, **task: Any) -> dict[str, Any]:
        """Build the subject ``key`` from the fields of a `Task`."""
        self.subjects.pop(key, None)
        subject = Subject.of(Task(**task), self.device)
        count, source = subject.multiply_adds(task["agent"])
        self.subjects[key] = subject
        config = subject.agent.config
        return {
            "multiply_adds": count,
            "counted": source,
            "batch_size": config.batch_size,
            "hidden": list(config.hidden),
        }

    @or_missing
    def plain(self, key: str, **task: Any) -> dict[str, Any]:
        self.subjects[key] = PlainSubject(Task(**task), self.device)
        return {}

    @or_missing
    def warm(self, key: str, updates: int, clock: str) -> dict[str, float]:
        """Compile or record, then take the time of one update."""
        start = time.perf_counter()
        self.subjects[key].run(updates)
        first = time.perf_counter() - start
        again = self.subjects[key].run(updates, workers.CLOCKS[clock])
        return {"warm_up_s": first, "seconds": again / updates}

    def run(self, key: str, updates: int, clock: str) -> float:
        return self.subjects[key].run(updates, workers.CLOCKS[clock])

    def split(self, key: str, updates: int, clock: str) -> tuple[float, float]:
        return self.subjects[key].split(updates, workers.CLOCKS[clock])

    @or_missing
    def rate(self, precision: str, clock: str) -> dict[str, float]:
        """Multiply-adds per second of a large square product."""
        if precision not in self.products:
            self.products[precision] = floors.Product(precision, self.device)
        return {"rate": self.products[precision].rate(workers.CLOCKS[clock])}

    def drop(self) -> None:
        import torch

        self.subjects.clear()
        gc.collect()
        if self.device != "cpu":
            torch.cuda.empty_cache()

    @or_missing
    def estimate(self, **fields: Any) -> dict[str, int]:
        """Bytes that `saferl train` announces for the run."""
        from saferl.training.memory import estimate

        task = Task(**fields)
        rows, config = task.dataset(), task.config()
        found = estimate(
            task.cls,
            rows.spec(config),
            config,
            task.members,
            len(rows),
            self.device,
            task.precision,
            costs=rows.costs is not None,
            dataset=rows,
        )
        return {"estimated_bytes": found.total}

    @or_missing
    def long(self, seconds: float, log_interval: int, **fields: Any) -> dict[str, Any]:
        """Train for about ``seconds``, with metrics read and written as `saferl train` does.

        Memory is that of the whole process, here and in `memory`: a worker should be asked for one
        of them, once, and for nothing else, not even the estimate, which leaves a GPU's workspaces
        behind. Here it includes what libraries load, and the dataset.
        """
        task = Task(**fields)
        before = bounds.reset_memory(self.device)
        subject = Subject.of(task, self.device)
        result = train(subject, seconds, log_interval)
        used = bounds.peak_memory(self.device) - before
        rate = self.rate(task.precision, "wall")["rate"]  # after, for its memory is not the run's
        floor = subject.multiply_adds(task.agent)[0] / rate
        each, empty = result["seconds"], or_missing(subject.empty)()
        return result | {
            "engine": subject.engine.kind,
            "memory_bytes": used,
            "floor_s": floor,
            "over_floor": each / floor,
            "sampling_share": empty / each if isinstance(empty, float) else empty,
            "profile": or_missing(bounds.profile)(subject.engine, each, floor),
        }

    def memory(self, **fields: Any) -> dict[str, Any]:
        """The most memory that the agent, its buffer and a few updates take, and the estimate."""
        estimate = self.estimate(**fields)  # also loads libraries and makes the dataset
        gc.collect()
        before = bounds.reset_memory(self.device)
        Subject.of(Task(**fields), self.device).run(8)
        return {"memory_bytes": bounds.peak_memory(self.device) - before, "estimate": estimate}


def train(subject: Subject, seconds: float, log_interval: int) -> dict[str, Any]:
    """Time of updates and of logging, after a warm-up."""
    from saferl.runs.folder import RunFolder
    from saferl.runs.metrics import MetricsLog

    for _ in range(2):  # compiled and recorded
        subject.run(max(2, log_interval // 10))
    with tempfile.TemporaryDirectory() as folder:
        log = MetricsLog(RunFolder(folder), subject.agent.members)
        updates, logging, start = 0, 0.0, time.perf_counter()
        while not updates or time.perf_counter() - start < seconds:
            subject.engine.run(log_interval)
            subject.engine.wait()
            middle = time.perf_counter()
            updates += log_interval
            log.write(updates, subject.engine.read())
            logging += time.perf_counter() - middle
        total = time.perf_counter() - start
        log.close()
    return {
        "updates": updates,
        "seconds": total / updates,
        "minutes_per_million": total / updates * 1e6 / 60,
        "logging_share": logging / total,
        "log_interval": log_interval,
    }


def facts(device: str) -> dict[str, Any]:
    """Versions, the device, and which agents there are."""
    import torch

    from saferl.registry import names

    return {
        "versions": workers.versions(["saferl", "torch", "numpy"]),
        "float32_products": torch.get_float32_matmul_precision(),  # "highest": no TF32
        "agents": names("agents"),
        "amx": bool(torch.cpu._is_amx_tile_supported()),
        "gpu": torch.cuda.get_device_name() if device != "cpu" else None,
        "cuda": torch.version.cuda if device != "cpu" else None,
    }


def serve(device: str) -> None:
    import torch

    torch.set_num_threads(1)
    ours = Ours(device)
    names = ("make", "plain", "warm", "run", "split", "rate", "drop", "estimate", "long",
             "memory")  # fmt: skip
    handlers = {name: getattr(ours, name) for name in names}
    workers.serve(handlers | {"facts": lambda: facts(device)})


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    serve(parser.parse_args().device)
