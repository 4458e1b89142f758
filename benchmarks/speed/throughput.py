"""Speed of one update: engines, precisions and members, peers, and the arithmetic's floor.

    python -m benchmarks speed                   # CPU, one thread, about 15 minutes
    python -m benchmarks speed --device cuda     # or `make bench-gpu`: everything, on a GPU
    python -m benchmarks speed --quick           # to see that it runs: numbers mean nothing

Parts (``--parts``), each measured in one run and interleaved (A B C A B C …), so that whatever else
the machine does meets all sides; times are medians over the rounds:

    beside   ours, d3rlpy (with and without its compile option) and plain eager implementations
             (tests/agents/plain.py), each in a process of its own, on the same data with equal
             networks; an update is what a user waits for: drawing a batch, then a gradient step
    matrix   every registered agent: eager, compile, cuda_graph × fp32, bf16 × 1, 4, 16 members
    long     long timed runs with logging, extrapolated to a million updates, with a profile that
             says what bounds an update and the memory beside its estimate (on a GPU unless asked)
    acting   what engine=compile brings SAC while it acts (when asked)
    online   what acting costs the loop, and the meta step MOORL (when asked)

What a machine lacks is listed with the reason. `floors` says what the floor is. Results are
written after every part; parts of an earlier run on the same machine are kept.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import workers
from benchmarks.speed import acting, online, tables
from benchmarks.store import RESULTS, machine, now, write_json
from benchmarks.study import Study, add

DATA = {"rows": 100_000, "observation_dim": 17, "action_dim": 6}  # HalfCheetah's shapes
PARTS = ("beside", "matrix", "long", "acting", "online")
# Layers on both sides; {} are the agent's own defaults, which the peer does not have.
NETWORKS = {
    "bc": (256, 256),
    "td3_bc": (256, 256),
    "iql": (256, 256),
    "cql": (256, 256, 256),
    "a2pr": (),
}
PLAIN = ("a2pr", "cql")  # what tests/agents/plain.py has
KINDS, PRECISIONS, MEMBERS = ("eager", "compile", "cuda_graph"), ("fp32", "bf16"), (1, 4, 16)
LONG = (("a2pr", 1), ("a2pr", 16), ("td3_bc", 1), ("cql", 1))  # agent, members
BLOCK_SECONDS = 0.3  # of one side in one round
MATRIX_ROUNDS = 5
MATRIX_SECONDS = 10.0  # of one combination; a slow one gets fewer rounds
STEP = {"cpu": 2, "cuda": 20}  # updates come in multiples: alternating actors, recorded blocks
LOG_INTERVAL = {"cpu": 100, "cuda": 1000}  # updates between two readings of the metrics


class Bench:
    """The parts, for the options of one command."""

    def __init__(self, options: Namespace, peer: Callable[[], str] | None):
        self.options, self.peer = options, peer
        self.device, self.clock, self.quick = options.device, options.clock, options.quick
        self.data = DATA | ({"rows": 2000} if self.quick else {})
        self.step = STEP[self.device]

    def ours(self, **environment: str) -> workers.Worker:
        arguments = "speed.engines", "--device", self.device
        return workers.Worker(sys.executable, *arguments, **environment)

    def task(self, agent: str, **fields: Any) -> dict[str, Any]:
        return {"agent": agent, "data": self.data, "quick": self.quick} | fields

    def settings(self, agent: str) -> dict[str, Any]:
        """Equal on all sides."""
        found = {"normalize_observations": False}  # noise is standard already; it costs d3rlpy time
        if agent in workers.SETTINGS:
            hidden = (16, 16) if self.quick else NETWORKS[agent]
            found = workers.settings_of(agent, hidden) | found | {"normalize_rewards": False}
            found |= {"batch_size": 16} if self.quick else {}
        return found

    def updates(self, seconds: float) -> int:
        """Of a block, if one update takes so long."""
        block = 0.01 if self.quick else BLOCK_SECONDS
        return self.step * max(1, round(block / seconds / self.step))

    # Ours beside others.

    def beside(self, agent: str) -> dict[str, Any]:
        """One agent, all sides; times in milliseconds per update."""
        with contextlib.ExitStack() as stack:
            ours, plain = stack.enter_context(self.ours()), stack.enter_context(self.ours())
            peer = None
            if self.peer and agent in workers.SETTINGS:
                peer = stack.enter_context(workers.Worker(self.peer(), "speed.peer"))
            return self._beside(agent, ours, plain, peer)

    def _beside(self, agent: str, ours: Any, plain: Any, peer: Any) -> dict[str, Any]:
        settings, clock, cpu = self.settings(agent), self.clock, self.device == "cpu"
        task = self.task(agent, settings=settings)
        sides: dict[str, Callable[[int], tuple[float, float]]] = {}
        missing: dict[str, str] = {}

        def block(worker: Any, key: str) -> Callable[[int], tuple[float, float]]:
            # On a GPU sampling cannot be told apart without waiting for it.
            if cpu:
                return lambda n: worker("split", key=key, updates=n, clock=clock)
            return lambda n: (0.0, worker("run", key=key, updates=n, clock=clock))

        facts: dict[str, Any] = {}
        ways = [("saferl", "fp32", "auto"), ("saferl bf16", "bf16", "auto")]
        if cpu and "compile" in KINDS:  # where auto is eager
            ways.append(("saferl compile", "fp32", "compile"))
            ways.append(("saferl bf16 compile", "bf16", "compile"))
        for name, precision, kind in ways:
            made = ours("make", key=name, kind=kind, precision=precision, **task)
            made |= {} if "missing" in made else ours(
                "warm", key=name, updates=2 * self.step, clock=clock
            )  # fmt: skip
            if "missing" in made:
                missing[name] = made["missing"]
            else:
                sides[name] = block(ours, name)
                facts = facts or made
        if "saferl" not in sides:
            return {"agent": agent, "sides": {}, "missing": missing}
        if agent in PLAIN:
            made = plain("plain", key="plain", **task)
            if "missing" in made:
                missing["plain"] = made["missing"]
            else:
                sides["plain"] = block(plain, "plain")
        for name, compiled in (("d3rlpy", False), ("d3rlpy compile", True)):
            if peer is None:
                had = agent in workers.SETTINGS
                missing[name] = "left out (--no-peer)" if had else f"d3rlpy has no {agent}"
            elif compiled and cpu:
                missing[name] = "d3rlpy's compile option acts on a GPU alone"
            else:
                device = "cpu:0" if cpu else "cuda:0"
                peer("prepare", key=name, agent=agent, settings=settings, data=self.data,
                     device=device, compiled=compiled)  # fmt: skip
                sides[name] = lambda n, key=name: peer("block", key=key, updates=n, clock=clock)
        for side in sides.values():
            side(max(12, self.step))  # d3rlpy compiles in its first updates
        updates = self.updates(facts["seconds"])
        rates: dict[str, list[float]] = {}
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        for _ in range(2 if self.quick else self.options.rounds):
            for precision in PRECISIONS[: 1 + ("saferl bf16" in sides)]:
                found = ours("rate", precision=precision, clock=clock)
                rates.setdefault(precision, []).append(found.get("rate", float("nan")))
            for name, side in sides.items():
                times[name].append(tuple(1e3 * s / updates for s in side(updates)))
        row = {"agent": agent, "settings": settings, "missing": missing}
        row["updates_per_block"] = updates
        row |= {name: facts[name] for name in ("multiply_adds", "counted", "hidden", "batch_size")}
        row["gflops"] = {p: 2e-9 * statistics.median(found) for p, found in rates.items()}
        row["sides"] = {
            name: compare(times[name], times["saferl"], floors_of(name, facts, rates), cpu)
            for name in sides
        }
        return row

    # Engines, precisions, members.

    def matrix(self, agent: str) -> dict[str, Any]:
        """Every combination of one agent."""
        with self.ours() as ours:
            return {"agent": agent, "rows": self._matrix(agent, ours)}

    def _matrix(self, agent: str, ours: Any) -> list[dict[str, Any]]:
        rows = []
        for kind in KINDS:
            for precision in PRECISIONS:
                for members in MEMBERS:
                    row = {"kind": kind, "precision": precision, "members": members}
                    rows.append(row)
                    row["key"] = key = f"{kind} {precision} {members}"
                    if kind == "compile" and self.device == "cpu" and members > 1:
                        if not self.options.full:
                            row["missing"] = "left out for time (--full)"
                            continue
                    task = self.task(agent, kind=kind, precision=precision, members=members)
                    row |= ours("make", key=key, **task)
                    if "missing" not in row:
                        row |= ours("warm", key=key, updates=2 * self.step, clock=self.clock)
        running = [row for row in rows if "missing" not in row]
        limit = 0.2 if self.quick else MATRIX_SECONDS
        for row in running:
            row["updates"] = self.updates(row["seconds"])
            affordable = int(limit / (row["updates"] * row["seconds"]))
            row["rounds"] = max(1, min(affordable, 2 if self.quick else MATRIX_ROUNDS))
            row["times"], row["floors"] = [], []
        for index in range(max((row["rounds"] for row in running), default=0)):
            rates = {
                precision: ours("rate", precision=precision, clock=self.clock)["rate"]
                for precision in dict.fromkeys(row["precision"] for row in running)
            }
            for row in running:
                if index < row["rounds"]:
                    seconds = ours("run", key=row["key"], updates=row["updates"], clock=self.clock)
                    row["times"].append(1e3 * seconds / row["updates"])
                    row["floors"].append(1e3 * row["multiply_adds"] / rates[row["precision"]])
        for row in rows:
            if times := row.pop("times", None):
                bounds = row.pop("floors")
                row["ms"] = statistics.median(times)
                row["ms_per_member"] = row["ms"] / row["members"]
                row["floor_ms"] = statistics.median(bounds)
                row["over_floor"] = statistics.median(t / f for t, f in zip(times, bounds))
            row.pop("key", None), row.pop("seconds", None)
        return rows

    # Long runs.

    def long(self, agent: str, members: int) -> dict[str, Any]:
        """Both precisions of ours, each in a process of its own, and the peers."""
        seconds = 0.2 if self.quick else self.options.seconds
        interval = 4 if self.quick else LOG_INTERVAL[self.device]
        rows = []
        for precision in PRECISIONS:
            task = self.task(agent, precision=precision, members=members)
            with self.ours() as ours:
                found = ours("long", seconds=seconds, log_interval=interval, **task)
            if "missing" not in found:
                if self.device == "cpu":
                    # The C library keeps freed blocks for later, which is no need of the run.
                    with self.ours(MALLOC_MMAP_THRESHOLD_="131072") as ours:
                        found |= {"resident_bytes": found["memory_bytes"]} | ours("memory", **task)
                    estimate = found.pop("estimate")
                else:
                    with self.ours() as ours:
                        estimate = ours("estimate", **task)
                missing = {"estimated_bytes": None, "estimate": estimate}
                found |= missing if "missing" in estimate else estimate
            rows.append({"side": "saferl", "precision": precision, "members": members} | found)
        if agent in workers.SETTINGS and members == 1 and self.peer:
            with workers.Worker(self.peer(), "speed.peer") as peer:
                for name in ("d3rlpy", "d3rlpy compile"):
                    rows.append(
                        {"side": name, "members": 1} | self._peer(peer, agent, name, seconds)
                    )
        return {"agent": agent, "rows": rows}

    def _peer(self, peer: Any, agent: str, name: str, seconds: float) -> dict[str, Any]:
        compiled = name.endswith("compile")
        if compiled and self.device == "cpu":
            return {"missing": "d3rlpy's compile option acts on a GPU alone"}
        device = "cpu:0" if self.device == "cpu" else "cuda:0"
        peer("prepare", key=name, agent=agent, settings=self.settings(agent), data=self.data,
             device=device, compiled=compiled)  # fmt: skip
        peer("block", key=name, updates=12, clock="wall")
        updates, start = 0, time.perf_counter()
        while not updates or time.perf_counter() - start < seconds:
            peer("block", key=name, updates=10 * self.step, clock="wall")
            updates += 10 * self.step
        each = (time.perf_counter() - start) / updates
        peer("drop")
        return {"updates": updates, "seconds": each, "minutes_per_million": each * 1e6 / 60}

    # While acting.

    def acting(self, hidden: int, utd: int) -> dict[str, Any]:
        """Eager and compiled updates of SAC in an environment."""
        return acting.measure(hidden, utd, 2 if self.quick else self.options.rounds)

    def online(self, hidden: int, members: int) -> dict[str, Any]:
        """The loop with and without an environment, and MOORL's meta step."""
        return online.measure(hidden, members, 2 if self.quick else 2 * self.options.rounds)


def floors_of(side: str, facts: dict[str, Any], rates: dict[str, list[float]]) -> list[float]:
    """Milliseconds of the arithmetic in each round, in the side's own precision."""
    precision = "bf16" if "bf16" in side else "fp32"
    return [1e3 * facts["multiply_adds"] / rate for rate in rates[precision]]


def compare(
    side: Sequence[tuple[float, float]],
    ours: Sequence[tuple[float, float]],
    floor: Sequence[float],
    split: bool,
) -> dict[str, Any]:
    """Medians over rounds of ``(sampling, update)`` milliseconds; ratios are of the same round.

    Where sampling was not timed apart, an update is both.
    """
    median = statistics.median
    ratios = sorted(sum(a) / sum(b) for a, b in zip(side, ours))
    bound = sorted(update / f for (_, update), f in zip(side, floor))
    cut = len(ratios) // 10
    found = {
        "ms": median(sum(times) for times in side),
        "floor_ms": median(floor),
        "over_floor": median(bound),
        "over_floor_spread": [bound[cut], bound[-1 - cut]],  # the middle 80 % of the rounds
        "over_ours": median(ratios),
        "over_ours_spread": [ratios[cut], ratios[-1 - cut]],
        "update_over_ours": median(a[1] / b[1] for a, b in zip(side, ours)),
    }
    if split:
        found |= {
            "update_ms": median(update for _, update in side),
            "sampling_share": median(sampling / update for sampling, update in side),
        }
    return found


# The command ---------------------------------------------------------------------------------


def attempt(name: str, function: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    """What ``function`` measures; where its process fails, a line instead."""
    print(f"{name} …", file=sys.stderr, flush=True)
    try:
        return function(*arguments)
    except (RuntimeError, OSError) as error:  # of a worker, with its traceback, or its pipe
        print(error, file=sys.stderr)
        agent = arguments[0] if isinstance(arguments[0], str) else name
        return {"agent": agent, "failed": str(error).strip().splitlines()[-1][:200]}


class Speed(Study):
    name = "speed"

    def options(self, parser: ArgumentParser) -> None:
        add(parser, "--device", "cpu", choices=("cpu", "cuda"))
        add(parser, "--parts", None, "default: beside and matrix, on a GPU long too", nargs="+",
            choices=PARTS)  # fmt: skip
        add(parser, "--agents", None, "default: all that are registered", nargs="+")
        add(parser, "--rounds", 31, "blocks of each side in `beside`")
        add(parser, "--seconds", 60.0, "of each run in `long`")
        add(parser, "--full", False, "compile every number of members on a CPU too")
        add(parser, "--quick", False, "tiny networks and few updates, to see that it runs")
        add(parser, "--clock", "wall", "cpu: time on the processor, for a machine that is busy",
            choices=sorted(workers.CLOCKS))  # fmt: skip
        add(parser, "--no-peer", False, "leave d3rlpy out")
        add(parser, "--peer-python", None, "an interpreter with d3rlpy; else .venv-peers is made")

    def check(self, parser: ArgumentParser, options: Namespace) -> None:
        cuda = options.device == "cuda"
        if cuda and options.clock == "cpu":
            parser.error("--clock cpu sees nothing of what a GPU does")
        options.parts = options.parts or PARTS[: 3 if cuda else 2]
        if options.quick and options.out == RESULTS:
            options.out = Path(tempfile.mkdtemp("-quick"))
        if cuda and not options.report:
            import torch

            if not torch.cuda.is_available():
                print("no CUDA GPU is here: run this on a machine that has one", file=sys.stderr)
                sys.exit(2)

    def file(self, options: Namespace) -> Path:
        return options.out / ("speed.json" if options.device == "cpu" else "speed-cuda.json")

    def measure(self, options: Namespace) -> dict[str, Any]:
        path = self.file(options)
        peer = None if options.no_peer else lambda: workers.peer_python(options.peer_python)
        bench = Bench(options, peer)
        document, agents = self.setup(bench, options)
        if path.exists() and not options.fresh:
            keep_parts(document, path)
        for part in options.parts:
            for task in tasks(part, options.agents or agents):
                name = " ".join(map(str, (part, *task)))
                row = attempt(name, getattr(bench, part), *task)
                rows = document["parts"].get(part, {}).get("rows", [])
                rows = [row for row in rows if row["name"] != name]
                rows.append(row | {"name": name, "date": now()})
                rows.sort(key=lambda row: agents.index(row["agent"]))
                clock = "cpu" if part in ("acting", "online") else options.clock
                document["parts"][part] = {
                    "command": options.command, "date": now(), "clock": clock, "rows": rows,
                }  # fmt: skip
                write_json(path, document)
            self.render(document, path)
        return document

    def setup(self, bench: Bench, options: Namespace) -> tuple[dict[str, Any], list[str]]:
        """Results without any, and the names of all agents."""
        with bench.ours() as worker:
            facts = worker("facts")
        if unknown := set(options.agents or ()) - set(facts["agents"]):
            there = ", ".join(facts["agents"])
            sys.exit(f"no agent {', '.join(sorted(unknown))}: there are {there}")
        versions = {"ours": facts["versions"]}
        if bench.peer:
            with workers.Worker(bench.peer(), "speed.peer") as worker:
                versions["peer"] = worker("versions")
                facts["peer_float32_products"] = worker("precision")
        products = {k: v for k, v in facts.items() if k.endswith("float32_products")}
        return {
            "machine": machine() | {k: facts[k] for k in ("gpu", "cuda", "amx")},
            "versions": versions,
            "float32_products": products,
            "data": bench.data,
            "quick": options.quick,
            "parts": {},
        }, facts["agents"]

    def report(self, content: dict[str, Any]) -> str:
        content["verdicts"] = tables.verdicts(content)
        return tables.report(content)

    def draw(self, content: dict[str, Any], path: Path) -> None:
        tables.plot(content, path)


STUDY = Speed()


def tasks(part: str, agents: Sequence[str]) -> list[tuple[Any, ...]]:
    """What a part measures, one after the other."""
    if part in ("acting", "online"):
        return list({"acting": acting, "online": online}[part].TASKS)
    if part == "long":
        return [task for task in LONG if task[0] in agents]
    return [(agent,) for agent in agents if part == "matrix" or agent in NETWORKS]


def keep_parts(document: dict[str, Any], path: Path) -> None:
    """Take over the parts of an earlier run on this machine with these versions."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        earlier = json.loads(path.read_text())
        same = all(earlier[k] == document[k] for k in ("machine", "quick"))
        if same and earlier["versions"]["ours"] == document["versions"]["ours"]:
            document["parts"] = earlier["parts"]
            document["versions"] = earlier["versions"] | document["versions"]
