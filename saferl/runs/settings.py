"""Hyper-parameters: dataclass defaults < ``configs/AGENT.yaml`` < what the user sets."""

from __future__ import annotations

import dataclasses
import itertools
import math
from fnmatch import fnmatch
from functools import cache
from importlib import resources
from typing import Any

import yaml

from saferl.errors import SaferlError, unknown
from saferl.safety.limits import check_limit


@cache
def _published(agent: str) -> dict[str, Any]:
    file = resources.files("saferl.configs").joinpath(f"{agent}.yaml")
    return (yaml.safe_load(file.read_text()) or {}) if file.is_file() else {}


def published(agent: str, dataset_id: str) -> dict[str, Any]:
    """What ``configs/AGENT.yaml`` sets for a dataset: its defaults, then each matching family."""
    document = _published(agent)
    values = dict(document.get("defaults") or {})
    for family in document.get("families") or []:
        if any(fnmatch(dataset_id, pattern) for pattern in family["datasets"]):
            values |= family["set"]
    return values


def parse_settings(pairs: list[str]) -> dict[str, Any]:
    """``["alpha=1,2.5", "discount=0.99"]`` to ``{"alpha": [1, 2.5], "discount": 0.99}``."""
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key or not text:
            raise SaferlError(f"--set {pair!r} is not KEY=VALUE")
        parts = [_scalar(part) for part in text.strip("[]").split(",")]
        values[key.strip()] = parts if len(parts) > 1 else parts[0]
    return values


def _scalar(text: str) -> Any:
    """A number, true, false or a word; YAML 1.1 would take 1e-3 for a word."""
    try:
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        return {"true": True, "false": False}.get(text.lower(), text)


@dataclasses.dataclass(frozen=True)
class Members:
    """Who is trained: one seed per member, and a name that tells the members apart."""

    seeds: tuple[int, ...]
    names: tuple[str, ...]


def resolve(
    config_class: type, settings: dict[str, Any], seeds: list[int]
) -> tuple[dict[str, Any], Members]:
    """Expand lists of values into members: every combination of values is trained on every seed.

    ``alpha=[1, 2.5, 10]`` with four seeds gives twelve members. Returns plain settings whose lists
    have one value per member, and the members.

    Raises:
        SaferlError: an unknown field; a list for one that is a word or true or false; a list that
            is empty or has a value twice, which would look like another seed.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(config_class)}
    for key in settings:
        if key not in defaults:
            raise unknown("config key", key, defaults)
    lists = {
        key: value
        for key, value in settings.items()
        if isinstance(value, (list, tuple)) and not isinstance(defaults[key], tuple)
    }
    for key, values in lists.items():
        if isinstance(defaults[key], (str, bool)):
            raise SaferlError(f"{key} cannot differ between members: give it one value")
        if not values or len(set(values)) < len(values):
            problem = "a value twice" if values else "no values"
            raise SaferlError(f"{key} has {problem}: give each once, and more seeds with members")
    combinations = list(itertools.product(*lists.values()))
    columns = [seed for _ in combinations for seed in seeds]
    expanded = dict(settings)
    for position, key in enumerate(lists):
        expanded[key] = [c[position] for c in combinations for _ in seeds]
    names = tuple(
        " ".join([*(f"{k}={_short(v)}" for k, v in zip(lists, c)), f"seed={seed}"])
        for c in combinations
        for seed in seeds
    )
    return expanded, Members(tuple(columns), names)


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)


def constrain(
    config: type, limits: list[float], given: dict[str, Any], published: dict[str, Any]
) -> tuple[list[float], dict[str, Any]]:
    """What is judged, and all settings: an agent is trained for the limits that it is judged by.

    Limits for the tables are trained for, unless ``given`` has a ``cost_limit``. Without any, the
    agent is judged by the finite limits that it is trained for, its default included.
    """
    settings = published | given
    if not hasattr(config, "cost_limit"):
        return limits, settings
    if limits:
        return limits, settings if "cost_limit" in given else settings | {"cost_limit": limits}
    own = settings.get("cost_limit", config.cost_limit)
    own = own if isinstance(own, (list, tuple)) else [own]
    own = [check_limit(limit, infinite=True) for limit in own]
    return [limit for limit in own if math.isfinite(limit)], settings
