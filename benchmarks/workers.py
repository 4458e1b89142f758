"""Worker processes, the peer's environment, and what both sides of a comparison are given.

This module runs in the peer's environment too, so it imports the standard library alone.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
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
        for package in PEER_PACKAGES:  # torch first: the pinned build, not d3rlpy's choice
            command = [str(python), "-m", "pip", "install", "--quiet", package]
            subprocess.run(command, check=True)
        done.touch()
    return str(python)


class Worker:
    """A process with one thread that answers one request at a time, as JSON lines over pipes."""

    def __init__(self, python: str, module: str, *arguments: str, **environment: str):
        self._process = subprocess.Popen(
            [python, "-m", f"benchmarks.{module}", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ | ONE_THREAD | environment,
        )
        self.name = module

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


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Python's version and the packages'."""
    found = {name: importlib.metadata.version(name) for name in packages}
    return {"python": platform.python_version(), **found}


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
