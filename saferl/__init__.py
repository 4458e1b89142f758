"""Offline reinforcement learning with safety constraints.

    import saferl
    dataset = saferl.load_dataset("saferl/hopper-velocity-mixed-v0")
    run = saferl.train("td3_bc", dataset, steps=20_000, members=3, cost_limits=[40])
    print(run.evaluation.text([40]))

Names below are imported when they are first used, so ``import saferl`` is quick and loads neither
torch nor a simulator.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saferl.data import Card, Dataset, from_dataframe, load_dataset, save_dataset
    from saferl.errors import SaferlError
    from saferl.evaluation.evaluate import evaluate as evaluate
    from saferl.nn import Policy
    from saferl.registry import make_env, register_agent, register_dataset
    from saferl.replay import ReplayBuffer
    from saferl.runs.gathered import gathered as gathered
    from saferl.runs.split import merge, split
    from saferl.training.evaluate import evaluate_run
    from saferl.training.train import load_agent, make_agent, resume
    from saferl.training.train import train as train

__version__ = "0.1.0"

_HOMES = {
    "Card": "saferl.data",
    "Dataset": "saferl.data",
    "Policy": "saferl.nn",
    "ReplayBuffer": "saferl.replay",
    "SaferlError": "saferl.errors",
    "evaluate": "saferl.evaluation",
    "evaluate_run": "saferl.training",
    "gathered": "saferl.training",
    "load_agent": "saferl.training",
    "load_dataset": "saferl.data",
    "from_dataframe": "saferl.data",
    "save_dataset": "saferl.data",
    "make_agent": "saferl.training",
    "make_env": "saferl.registry",
    "merge": "saferl.training",
    "register_agent": "saferl.registry",
    "register_dataset": "saferl.registry",
    "resume": "saferl.training",
    "split": "saferl.training",
    "train": "saferl.training",
}
__all__ = [
    "Card",
    "Dataset",
    "Policy",
    "ReplayBuffer",
    "SaferlError",
    "evaluate",
    "evaluate_run",
    "from_dataframe",
    "gathered",
    "load_agent",
    "load_dataset",
    "make_agent",
    "make_env",
    "merge",
    "register_agent",
    "register_dataset",
    "resume",
    "save_dataset",
    "split",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'saferl' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
