"""Names to classes, resolved lazily.

Agents and dataset families are entry points (groups ``saferl.agents`` and ``saferl.datasets``), the
library's own in the same way as a third party's; a script registers its own with a decorator:

    @saferl.register_agent("mine")
    class Mine(Agent): ...

Nothing is imported before it is asked for.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from importlib.metadata import entry_points
from typing import Any, TypeVar

from saferl.errors import SaferlError, unknown

T = TypeVar("T")
_registered: dict[str, dict[str, Any]] = {"agents": {}, "datasets": {}}


@cache
def _entry_points(group: str) -> dict[str, Any]:
    return {entry.name: entry for entry in entry_points(group=f"saferl.{group}")}


def names(group: str) -> list[str]:
    """All names of a group (``"agents"`` or ``"datasets"``), sorted."""
    return sorted(_entry_points(group) | _registered[group])


def _get(group: str, kind: str, name: str) -> Any:
    if name in _registered[group]:
        return _registered[group][name]
    if name in _entry_points(group):
        return _entry_points(group)[name].load()
    raise unknown(kind, name, names(group))


def _register(group: str, name: str) -> Callable[[T], T]:
    def add(item: T) -> T:
        _registered[group][name] = item
        return item

    return add


def register_agent(name: str) -> Callable[[T], T]:
    """Class decorator: makes ``name`` known to ``saferl train NAME`` and `make_agent`."""
    return _register("agents", name)


def register_dataset(prefix: str) -> Callable[[T], T]:
    """Function decorator: ``load_dataset("prefix/rest")`` calls ``function("rest", **options)``."""
    return _register("datasets", prefix)


def agent_class(name: str) -> Any:
    """The agent class registered as ``name``; raises `SaferlError` naming the nearest one."""
    return _get("agents", "agent", name)


def dataset_loader(prefix: str) -> Any:
    """The loader of a dataset family; raises `SaferlError` naming the nearest one."""
    return _get("datasets", "dataset family", prefix)


@cache
def _load_environment_plugins() -> None:
    for entry in entry_points(group="gymnasium.envs"):
        try:
            entry.load()()
        except ImportError:  # a plug-in whose simulator is not installed must not stop the others
            continue


def make_env(env: str | Callable[[], Any]) -> Any:
    """A gymnasium environment from its id, or from a function without arguments that makes one.

    Gymnasium 1.x loads no plug-ins by itself: packages that declare the entry-point group
    ``gymnasium.envs`` (saferl's own tasks among them) are registered here, once.

    Raises:
        SaferlError: no environment has that id (naming the nearest), or it cannot be made.
    """
    if not isinstance(env, str):
        return env()
    import gymnasium

    _load_environment_plugins()
    if env not in gymnasium.registry and ":" not in env:
        raise unknown("environment", env, gymnasium.registry, hint="`saferl list` shows our own")
    try:
        with warnings.catch_warnings():
            # D4RL's scores are defined on the -v4 robots: that v5 exists is no reason to warn.
            warnings.filterwarnings("ignore", ".*out of date.*", DeprecationWarning)
            return gymnasium.make(env, disable_env_checker=True)
    except (gymnasium.error.Error, ImportError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise SaferlError(f"cannot make environment {env!r}: {reason}") from error


def environment_ids() -> list[str]:
    """Ids of environments with a namespace (``saferl/HopperVelocity-v0``), as plug-ins have."""
    import gymnasium

    _load_environment_plugins()
    return sorted(name for name in gymnasium.registry if "/" in name)
