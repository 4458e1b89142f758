"""What the benchmarks share: worker processes, the peer's environment, files.

This module runs in the peer's environment too, so it imports the standard library alone.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PEER = ROOT / ".venv-peers"
PEER_PACKAGES = ("torch==2.13.0", "d3rlpy==2.8.1")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}


def peer_python(given: str | None = None) -> str:
    """The interpreter that has d3rlpy: ``given``, ``$SAFERL_PEER_PYTHON``, or `.venv-peers`.

    d3rlpy pins another gymnasium than ours, so it lives in an environment of its own, which is made
    here when it is absent (a download of some hundred megabytes).
    """
    chosen = given or os.environ.get("SAFERL_PEER_PYTHON")
    if chosen:
        return chosen
    python = PEER / "bin" / "python"
    done = PEER / "installed"
    if not done.exists():
        print(f"making {PEER} with {' and '.join(PEER_PACKAGES)}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(PEER)], check=True)
        for (
            package
        ) in PEER_PACKAGES:  # torch first: the pinned build, not the one d3rlpy would take
            command = [str(python), "-m", "pip", "install", "--quiet", package]
            subprocess.run(command, check=True)
        done.touch()
    return str(python)


class Worker:
    """A process with one thread that answers one request at a time, as JSON lines over pipes."""

    def __init__(self, python: str, script: Path, *arguments: str, **environment: str):
        environment = os.environ | ONE_THREAD | environment
        self._process = subprocess.Popen(
            [python, str(script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.name = script.name

    def __call__(self, do: str, **arguments: Any) -> Any:
        """Call handler ``do`` in the process and wait for its answer."""
        self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with status {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{self.name}, {do}:\n{answer['error']}")
        return answer["value"]

    def close(self) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve(handlers: dict[str, Callable[..., Any]]) -> None:
    """The other end of `Worker`: answers requests until standard input closes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not mix with the answers
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"value": handlers[request.pop("do")](**request)}
        except Exception:
            answer = {"error": traceback.format_exc()}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def machine() -> dict[str, Any]:
    """Processor, cores and system."""
    model = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {"cpu": model, "cores": os.cpu_count(), "system": f"{platform.system()} {os.uname()[4]}"}


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Python's version and the packages'."""
    found = {name: importlib.metadata.version(name) for name in packages}
    return {"python": platform.python_version(), **found}


def now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def command() -> str:
    """The command line that is running, without options that name this machine's paths."""
    arguments, skip = [], False
    for argument in sys.argv[1:]:
        path = argument in ("--peer-python", "--a2pr", "--corl", "--out")
        if not skip and not path:
            arguments.append(argument)
        skip = path
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *arguments])


def header(*packages: str) -> dict[str, Any]:
    """What results begin with: command, date, machine, and versions of what made them."""
    return {
        "command": command(),
        "date": now(),
        "machine": machine(),
        "versions": versions(["saferl", "torch", "numpy", *packages]),
    }


def write_json(path: Path, value: Any) -> None:
    """Write beside ``path`` and rename, so that an interruption leaves the earlier file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; the first column to the left, numbers to the right."""
    lines = [list(map(str, heads)), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]

    def text(line: Sequence[str]) -> str:
        cells = [
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths))
        ]
        return "| " + " | ".join(cells) + " |"

    rule = "|" + "|".join("-" * (w + 1) + ("-" if i == 0 else ":") for i, w in enumerate(widths))
    return "\n".join([text(lines[0]), rule + "|", *map(text, lines[1:])])


# What is equal on both sides, under our names: the defaults for D4RL locomotion of both libraries
# where they agree; where they do not (CQL's rates and weight, BC's rate), one value for both.
_COMMON = {"batch_size": 256, "discount": 0.99, "normalize_observations": True}
SETTINGS: dict[str, dict[str, Any]] = {
    "bc": _COMMON | {"lr": 3e-4},
    "td3_bc": _COMMON
    | {
        "actor_lr": 3e-4,
        "critic_lr": 3e-4,
        "alpha": 2.5,
        "policy_noise": 0.2,
        "noise_clip": 0.5,
        "policy_interval": 2,
        "tau": 0.005,
    },
    "iql": _COMMON
    | {
        "normalize_rewards": True,
        "actor_lr": 3e-4,
        "critic_lr": 3e-4,
        "value_lr": 3e-4,
        "expectile": 0.7,
        "beta": 3.0,
        "advantage_clip": 100.0,
        "tau": 0.005,
        "actor_decay_steps": 0,
    },
    "cql": _COMMON
    | {
        "actor_lr": 1e-4,
        "critic_lr": 3e-4,
        "temperature_lr": 1e-4,
        "weight": 5.0,
        "samples": 10,
        "tau": 0.005,
        "orthogonal_init": False,
    },
}


def settings_of(agent: str, hidden: Sequence[int]) -> dict[str, Any]:
    """`SETTINGS` of an agent with networks of ``hidden`` units everywhere."""
    sizes = {"hidden": list(hidden)}
    if agent == "cql":
        sizes["critic_hidden"] = list(hidden)
    return SETTINGS[agent] | sizes


def synthetic(rows: int, observation_dim: int, action_dim: int) -> dict[str, Any]:
    """Noise in the shape of a dataset with episodes of 1000 steps, the same in every process."""
    import numpy as np

    random = np.random.default_rng(0)
    timeouts = np.zeros(rows, bool)
    timeouts[999::1000] = timeouts[-1] = True
    return {
        "observations": random.standard_normal((rows, observation_dim), np.float32),
        "actions": random.uniform(-1, 1, (rows, action_dim)).astype(np.float32),
        "rewards": random.standard_normal((rows, 1), np.float32),
        "next_observations": random.standard_normal((rows, observation_dim), np.float32),
        "terminals": np.zeros(rows, bool),
        "timeouts": timeouts,
    }
