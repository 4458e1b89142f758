"""Cost-bearing environments and wrappers.

Importing this module registers the velocity tasks with gymnasium, the way its plug-ins do:

    import gymnasium, saferl.envs
    env = gymnasium.make("saferl/HopperVelocity-v0")

or, without the import, ``gymnasium.make("saferl.envs:saferl/HopperVelocity-v0")``. Gymnasium 1.x
imports no plug-ins by itself; saferl's own commands find these ids (and those of any package that
declares the same entry point) through the entry-point group ``gymnasium.envs``.
"""

from __future__ import annotations

from typing import Any

from gymnasium.envs.registration import register, registry

from . import adapters, dmc, epicare, mazes
from .wrappers import CostWrapper, FlattenActions, SixValueAdapter, adapt_cost

__all__ = [
    "HORIZON",
    "VELOCITY_THRESHOLDS",
    "CostWrapper",
    "FlattenActions",
    "SixValueAdapter",
    "adapt_cost",
    "register_envs",
]

HORIZON = 1000
"""Steps after which an episode of the velocity tasks is truncated."""

VELOCITY_THRESHOLDS = {
    "Hopper": 0.7402,
    "HalfCheetah": 3.2096,
    "Walker2d": 2.3415,
    "Ant": 2.6222,
    "Swimmer": 0.2282,
    "Humanoid": 1.4149,
}
"""Speed in metres per second above which a step costs 1 (those of Safety-Gymnasium's v1 tasks)."""


def register_envs() -> None:
    """Register ``saferl/HopperVelocity-v0`` and its siblings with gymnasium.

    Also ``bullet/…`` and ``safety-gymnasium/…``, whose packages are needed when they are made. Only
    names are stored: the simulator is imported by ``gymnasium.make``. Calling it again, or from
    gymnasium's ``namespace`` context as older versions do, changes nothing.
    """
    tasks: dict[str, dict[str, Any]] = {
        f"saferl/{robot}Velocity-v0": {
            "entry_point": f"saferl.envs.velocity:{robot}VelocityEnv",
            "max_episode_steps": HORIZON,
        }
        for robot in VELOCITY_THRESHOLDS
    }
    tasks["saferl/D4RLAnt-v0"] = {
        "entry_point": "saferl.envs.d4rl:D4RLAntEnv",
        "max_episode_steps": HORIZON,
    }
    for name, options in {
        "ICUSepsis": {},
        "ICUSepsisTerminate": {"strategy": "terminate"},
        "ICUSepsisLevels": {"actions": "levels"},
        "ICUSepsisTerminateLevels": {"strategy": "terminate", "actions": "levels"},
    }.items():
        tasks[f"saferl/{name}-v0"] = {
            "entry_point": "saferl.envs.icu_sepsis:ICUSepsisEnv",
            "kwargs": options,
            "max_episode_steps": 500,
        }
    for name, arguments in epicare.env_ids().items():
        tasks[name] = {"entry_point": "saferl.envs.epicare:EpiCareEnv", "kwargs": arguments}
    for name, arguments in (tasks | mazes.env_ids() | dmc.env_ids() | adapters.env_ids()).items():
        if name not in registry:
            register(id=name, **arguments)


register_envs()
