"""From what a user asks for to the settings of every member.

Hyper-parameters: dataclass defaults < ``configs/AGENT.yaml`` < what the user sets.
"""

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
from saferl.registry import agent_class
from saferl.runs.config import Member, RunConfig, Values
from saferl.safety.limits import check_limit


@cache
def _published(agent: str) -> dict[str, Any]:
    file = resources.files("saferl.configs").joinpath(f"{agent}.yaml")
    return (yaml.safe_load(file.read_text()) or {}) if file.is_file() else {}


def published(agent: str, dataset_id: str) -> Values:
    """What ``configs/AGENT.yaml`` sets for a dataset: its defaults, then each matching family."""
    return {key: value for key, (value, _) in published_with_sources(agent, dataset_id).items()}


def published_with_sources(agent: str, dataset_id: str) -> dict[str, tuple[Any, str]]:
    """`published`, and where each value comes from."""
    document, file = _published(agent), f"configs/{agent}.yaml"
    found = {key: (value, file) for key, value in (document.get("defaults") or {}).items()}
    for family in document.get("families") or []:
        if any(fnmatch(dataset_id, pattern) for pattern in family["datasets"]):
            where = f"{file}, {family['datasets'][0]}: {family['source']}"
            found |= {key: (value, where) for key, value in family["set"].items()}
    return found


def parse_settings(pairs: list[str]) -> Values:
    """``["alpha=1,2.5", "discount=0.99"]`` to ``{"alpha": [1, 2.5], "discount": 0.99}``."""
    values: Values = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key or not text:
            raise SaferlError(f"--set {pair!r} is not KEY=VALUE")
        parts = [_scalar(part) for part in text.strip("[]").split(",")]
        values[key.strip()] = parts if len(parts) > 1 else parts[0]
    return values


def parse_options(text: str) -> Values:
    """``"bandwidth=0.15 scaling=minmax neighbours=none"`` as keyword arguments."""
    found = parse_settings(text.split())
    found = {k: None if v == "none" else v for k, v in found.items()}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}


def _scalar(text: str) -> Any:
    """A number, true, false or a word; YAML 1.1 would take 1e-3 for a word."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text.lower(), text)


@dataclasses.dataclass(frozen=True)
class Resolved:
    """A run's complete record, and where each of the agent's settings comes from."""

    run: RunConfig
    sources: dict[str, str]


def resolve(asked: RunConfig, task_id: str) -> Resolved:
    """Fill in what a user left open.

    Every list of values of a per-member field is trained on every seed: ``alpha=[1, 2.5, 10]``
    with four seeds gives twelve members. An agent is trained for the limits that it is judged by,
    unless the settings have a ``cost_limit``; without any limit it is judged by the finite ones
    that it is trained for, its default included.

    Args:
        task_id: id of the dataset, which chooses published settings; "online" without one.

    Raises:
        SaferlError: an unknown agent or setting; a value that cannot be meant; a list for a setting
            that cannot differ between members, is empty or has a value twice (which would look like
            another seed).
    """
    cls = agent_class(asked.agent)
    defaults = {spec.name: spec.default for spec in dataclasses.fields(cls.Config)}
    from_files = published_with_sources(asked.agent, task_id)
    given = dict(cls.rename_settings(asked.settings))
    sources = dict.fromkeys(defaults, f"default of {cls.Config.__name__}")
    sources |= {key: where for key, (_, where) in from_files.items()}
    sources |= dict.fromkeys(given, "given")
    settings = {key: value for key, (value, _) in from_files.items()} | given
    limits = asked.cost_limits
    if "cost_limit" in defaults:
        if limits and "cost_limit" not in given:
            settings["cost_limit"], sources["cost_limit"] = list(limits), "the run's cost limits"
        elif not limits:
            limits = _own_limits(settings.get("cost_limit", defaults["cost_limit"]))
    for key in settings:
        if key not in defaults:
            raise unknown("config key", key, defaults)
    seeds = _seeds(asked)
    varied = {
        key: value
        for key, value in settings.items()
        if isinstance(value, (list, tuple)) and not isinstance(defaults[key], tuple)
    }
    for key, values in varied.items():
        _check_list(key, values, defaults[key])
    members = tuple(
        Member(seed, dict(zip(varied, combination)))
        for combination in itertools.product(*varied.values())
        for seed in seeds
    )
    # Checked and converted as the agent will have it.
    lists = {key: [member.values[key] for member in members] for key in varied}
    config = cls.make_config(settings | lists)
    full = {key: _plain(value) for key, value in dataclasses.asdict(config).items()}
    members = tuple(
        Member(member.seed, {key: full[key][m] for key in varied})
        for m, member in enumerate(members)
    )
    evaluation = asked.eval_interval
    evaluation = max(1, asked.steps // 5) if evaluation is None else evaluation or asked.steps
    run = asked.replace(
        settings={key: value for key, value in full.items() if key not in varied},
        members=members,
        cost_limits=tuple(limits),
        eval_interval=evaluation,
        log_interval=asked.log_interval or max(1, asked.steps // 100),
        checkpoint_interval=asked.checkpoint_interval or evaluation,
    )
    return Resolved(run, sources)


def _seeds(asked: RunConfig) -> list[int]:
    if isinstance(asked.members, int):
        return list(range(asked.seed, asked.seed + asked.members))
    return [member.seed for member in asked.members]


def _own_limits(own: Any) -> tuple[float, ...]:
    own = own if isinstance(own, (list, tuple)) else [own]
    checked = [check_limit(limit, infinite=True) for limit in own]
    return tuple(limit for limit in checked if math.isfinite(limit))


def _check_list(key: str, values: Any, default: Any) -> None:
    if isinstance(default, (str, bool)):
        raise SaferlError(f"{key} cannot differ between members: give it one value")
    if not values or len(set(values)) < len(values):
        problem = "a value twice" if values else "no values"
        raise SaferlError(f"{key} has {problem}: give each once, and more seeds with members")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
