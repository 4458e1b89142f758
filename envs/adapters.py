"""Bullet-Safety-Gym and Safety-Gymnasium, the tasks of DSRL's datasets, behind gymnasium 1.x.

    make_env("bullet/SafetyBallRun-v0")
    make_env("safety-gymnasium/SafetyPointGoal1-v0")

Neither package installs with the versions of this library (both pin gymnasium 0.28), so they are
no dependencies: `BULLET_INSTALL` and `SAFETY_INSTALL` are the commands that install them beside it,
and nothing is imported before an environment is made.

Environments made here have five-value steps, the cost in ``info["cost"]`` (a float), float32
observations and the package's own horizon, and after ``reset(seed)`` repeat themselves exactly:

- Bullet-Safety-Gym ignores the seed and draws from numpy's global generator: each environment here
  has a state of its own, in force during its own calls only. Its episodes begin from the state that
  its first one began in, and with the last action of the one before still in force: here one
  episode is begun and dropped when an environment is made, and the motors are stopped at a reset.
- Safety-Gymnasium 1.0.0 imports modules that gymnasium 1.0 removed, and declares dataclasses that
  Python 3.11 refuses; both are supplied while it is imported, and taken away again.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import random
import sys
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import load_env_creator
from gymnasium.spaces import Box

from saferl.errors import SaferlError, unknown

BULLET_INSTALL = "pip install pybullet==3.2.7 && pip install --no-deps bullet-safety-gym==1.4.0"
SAFETY_INSTALL = (
    "pip install xmltodict pyyaml 'gymnasium-robotics>=1.4,<1.5' && "
    "pip install --no-deps safety-gymnasium==1.0.0"
)

# Names and horizons are spelt out so that the ids can be listed without the packages.
BULLET_TASKS = {
    f"Safety{robot}{task}-v0": horizon
    for task, horizons in {
        "Run": {"Ball": 100, "Car": 200, "Drone": 200, "Ant": 200},
        "Circle": {"Ball": 200, "Car": 300, "Drone": 300, "Ant": 500},
        "Gather": {"Ball": 250, "Car": 500, "Drone": 500, "Ant": 1000},
        "Push": {"Ball": 250, "Car": 500},
    }.items()
    for robot, horizon in horizons.items()
}
"""Bullet-Safety-Gym's task → steps after which an episode is truncated. Without its Reach tasks,
whose boxes move by the clock on the wall, so that no seed repeats an episode."""

SAFETY_TASKS = {
    f"Safety{robot}{task}{level}-v0": 500 if task in ("Circle", "Run") else 1000
    for robot in ("Point", "Car", "Doggo", "Racecar", "Ant")
    for task, levels in {"Goal": 3, "Button": 3, "Push": 3, "Circle": 3, "Run": 1}.items()
    for level in range(levels)
} | {
    f"Safety{robot}Velocity-v1": 1000
    for robot in ("Ant", "HalfCheetah", "Hopper", "Humanoid", "Swimmer", "Walker2d")
}
"""Safety-Gymnasium's task, vision and debugging ones left out → horizon in steps."""


def make_bullet(task: str) -> gymnasium.Env:
    """A Bullet-Safety-Gym environment, such as ``"SafetyBallRun-v0"``.

    Raises:
        SaferlError: an unknown task (naming the nearest), or a package that is not installed
            (saying how to install it).
    """
    if task not in BULLET_TASKS:
        raise unknown("Bullet-Safety-Gym task", task, BULLET_TASKS)
    _require("bullet_safety_gym", "pybullet", install=BULLET_INSTALL)
    # The package redirects C streams and needs Python's own, not a notebook's or a test's.
    streams = sys.__stdout__ or sys.stdout, sys.__stderr__ or sys.stderr
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        with _explained("bullet_safety_gym", BULLET_INSTALL):
            import bullet_safety_gym  # noqa: F401  registers its ids with gymnasium
        return BulletEnv(task)


def make_safety_gymnasium(task: str) -> gymnasium.Env:
    """A Safety-Gymnasium environment, such as ``"SafetyPointGoal1-v0"``; raises as `make_bullet`.

    The velocity tasks are also, without any further package, ``saferl/HopperVelocity-v0`` and its
    siblings.
    """
    if task not in SAFETY_TASKS:
        raise unknown("Safety-Gymnasium task", task, SAFETY_TASKS)
    _require("safety_gymnasium", "xmltodict", "gymnasium_robotics", install=SAFETY_INSTALL)
    with _explained("safety_gymnasium", SAFETY_INSTALL), _older_modules(), _older_dataclasses():
        import safety_gymnasium  # noqa: F401
    return SafetyGymnasiumEnv(task)


def env_ids() -> dict[str, dict[str, Any]]:
    """Ids to register with gymnasium, and the arguments of `gymnasium.register` for each."""
    return {
        f"{prefix}/{task}": {
            "entry_point": f"saferl.envs.adapters:{function}",
            "kwargs": {"task": task},
            "max_episode_steps": horizon,
        }
        for prefix, function, tasks in (
            ("bullet", "make_bullet", BULLET_TASKS),
            ("safety-gymnasium", "make_safety_gymnasium", SAFETY_TASKS),
        )
        for task, horizon in tasks.items()
    }


def _require(*modules: str, install: str) -> None:
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        names = ", ".join(missing)
        raise SaferlError(f"this needs {names}, not installed here; install with: {install}")


@contextlib.contextmanager
def _explained(package: str, install: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise SaferlError(
            f"{package} is installed but cannot be imported ({error}); install with: {install}"
        ) from error


class AdaptedEnv(gymnasium.Env):
    """An environment of an older API as gymnasium 1.x expects it; see the module."""

    metadata = {"render_modes": []}  # noqa: RUF012

    def __init__(self, task: str):
        spec = gymnasium.spec(task)
        self.horizon = int(spec.max_episode_steps or 0)
        # The package's own make, or gymnasium's, would wrap it in what the other does not know.
        # Both give their float64 boxes float32 bounds, which gymnasium compares with an overflow.
        with np.errstate(over="ignore"), _older_numpy():
            entry: Any = spec.entry_point
            self.inner: Any = load_env_creator(entry)(**copy.deepcopy(spec.kwargs))
            # Their float64 boxes, of which some bounds overflow to infinity.
            spaces: tuple[Any, Any] = self.inner.observation_space, self.inner.action_space
            self.observation_space, self.action_space = (
                Box(space.low.astype(np.float32), space.high.astype(np.float32), dtype=np.float32)
                for space in spaces
            )
        self._elapsed = 0

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        if seed is None:  # continue this environment's own sequence
            seed = int(self.np_random.integers(2**31))
        observation = self._reset(seed)
        self._elapsed = 0
        return np.array(observation, np.float32), {}

    def step(self, action):
        # A copy in the package's type: one of them keeps or changes the array it is given.
        action = np.array(action, dtype=self.inner.action_space.dtype)
        values = self._step(action)
        if len(values) == 6:
            observation, reward, cost, terminated, truncated, info = values
        else:
            observation, reward, terminated, truncated, info = values
            cost = info["cost"]
        self._elapsed += 1
        truncated = bool(truncated) or self._elapsed >= self.horizon
        info = {**info, "cost": float(cost)}
        return np.array(observation, np.float32), float(reward), bool(terminated), truncated, info

    def _reset(self, seed: int) -> Any:
        return self.inner.reset(seed=seed)[0]

    def _step(self, action: np.ndarray) -> tuple:
        return self.inner.step(action)

    def close(self) -> None:
        self.inner.close()


class BulletEnv(AdaptedEnv):
    """Bullet-Safety-Gym with random numbers of its own."""

    def __init__(self, task: str):
        self._state = np.random.RandomState(0).get_state()
        kept = random.getstate()  # obstacles are placed with Python's generator
        random.seed(0)
        try:
            with self._own_numbers():
                super().__init__(task)
        finally:
            random.setstate(kept)
        self._reset(0)

    @contextlib.contextmanager
    def _own_numbers(self) -> Iterator[None]:
        kept = np.random.get_state()  # noqa: NPY002
        np.random.set_state(self._state)  # noqa: NPY002
        try:
            yield
        finally:
            self._state = np.random.get_state()  # noqa: NPY002
            np.random.set_state(kept)  # noqa: NPY002

    def _reset(self, seed: int) -> Any:
        self._state = np.random.RandomState(seed).get_state()
        with self._own_numbers():
            self.inner.agent.apply_action(np.zeros(self.inner.action_space.shape))
            self.inner.bc.stepSimulation()
            return self.inner.reset()[0]

    def _step(self, action: np.ndarray) -> tuple:
        with self._own_numbers():
            return self.inner.step(action)


class SafetyGymnasiumEnv(AdaptedEnv):
    """Safety-Gymnasium; its six-value steps become five."""

    def _reset(self, seed: int) -> Any:
        with _older_numpy():
            return super()._reset(seed)

    def _step(self, action: np.ndarray) -> tuple:
        with _older_numpy():
            return super()._step(action)


# What Safety-Gymnasium expects ------------------------------------------------------------------


@contextlib.contextmanager
def _older_numpy() -> Iterator[None]:
    """It takes arrays of one number for numbers: deprecated since numpy 1.25, refused from 2.4."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Conversion of an array", DeprecationWarning)
        yield


@contextlib.contextmanager
def _older_modules() -> Iterator[None]:
    """Modules of gymnasium 0.28 that its 1.x lacks, with the classes that are imported from them.

    Their base classes are subclassed at import but never used here: wrappers of the package stay
    out of what `AdaptedEnv` makes.
    """
    from gymnasium import wrappers

    placeholder = type("Removed", (gymnasium.Wrapper,), {})
    supplied: dict[str, Any] = {
        "compatibility": {"EnvCompatibility": placeholder},
        "autoreset": {"AutoResetWrapper": placeholder},
        "normalize": {
            "NormalizeObservation": wrappers.NormalizeObservation,
            "NormalizeReward": wrappers.NormalizeReward,
            "RunningMeanStd": object,
        },
        "time_limit": {"TimeLimit": wrappers.TimeLimit},
        "env_checker": {"PassiveEnvChecker": wrappers.PassiveEnvChecker},
    }
    added = []
    for name, contents in supplied.items():
        full = f"gymnasium.wrappers.{name}"
        if find_spec(full) is None and full not in sys.modules:
            sys.modules[full] = module = ModuleType(full)
            vars(module).update(contents)
            added.append(full)
    try:
        yield
    finally:
        for full in added:
            del sys.modules[full]


@contextlib.contextmanager
def _older_dataclasses() -> Iterator[None]:
    """Python 3.10's dataclasses: a default may be an instance of a class without a hash.

    Since 3.11 these are refused, as lists are. Each instance gets a copy of its own.
    """
    strict = dataclasses.dataclass

    def tolerant(cls=None, /, **options):
        if cls is None:
            return lambda cls: tolerant(cls, **options)
        for name in vars(cls).get("__annotations__", {}):
            default = vars(cls).get(name)
            if (
                default is not None
                and type(default).__hash__ is None
                and not isinstance(default, (list, dict, set, dataclasses.Field))
            ):
                own = functools.partial(copy.deepcopy, default)
                setattr(cls, name, dataclasses.field(default_factory=own))
        return strict(cls, **options)

    dataclasses.dataclass = tolerant
    try:
        yield
    finally:
        dataclasses.dataclass = strict
