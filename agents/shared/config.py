"""Configurations of agents: what all have in common, and plain values as a field has them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from saferl.errors import SaferlError


@dataclass(frozen=True)
class AgentConfig:
    """Hyper-parameters that every agent has. Unknown keys and wrong types are errors."""

    batch_size: int = 256  # transitions per member and update
    discount: float = 0.99  # γ, per environment step
    hidden: tuple[int, ...] = (256, 256)  # units of each hidden layer
    normalize_observations: bool = False  # (s - mean) / (std + 1e-3) over the dataset
    normalize_rewards: bool = False  # × 1000 / (largest - smallest episode return)
    reward_scale: float = 1.0  # training reward = scale × raw + shift; scores use raw rewards
    reward_shift: float = 0.0  # changes what is optimal where episodes can terminate


def member_values(config: AgentConfig, name: str, members: int = 1) -> list[float]:
    """The values of a hyper-parameter, that of every member where it does not vary."""
    value = getattr(config, name)
    return list(value) if isinstance(value, tuple) else [value] * members


def at_least(config: Any, name: str, least: float) -> None:
    """Raise `SaferlError` where a number is smaller."""
    for value in member_values(config, name):
        if value < least:
            raise SaferlError(f"{name} must be {least:g} or more, got {value:g}")


def between(config: Any, name: str, low: float, high: float, above: bool = False) -> None:
    """Raise `SaferlError` where a number is outside [low, high], or (low, high] with ``above``."""
    lower = f"above {low:g} and" if above else f"{low:g} or more and"
    for value in member_values(config, name):
        if not low <= value <= high or (above and value == low):
            raise SaferlError(f"{name} must be {lower} at most {high:g}, got {value:g}")


def check(config: AgentConfig, per_member: frozenset[str]) -> None:
    """Raise `SaferlError` where a value cannot be meant, whichever agent it is for.

    ``per_member``: names of the fields that may differ between members.
    """
    for field in dataclasses.fields(config):
        name, found = field.name, member_values(config, field.name)
        if isinstance(field.default, tuple):  # layers and the like
            if any(size < 1 for size in found):
                raise SaferlError(f"{name} takes numbers of 1 or more, got {found}")
            continue
        if isinstance(getattr(config, name), tuple) and name not in per_member:
            raise SaferlError(
                f"{name} cannot differ between members; these can: "
                f"{', '.join(sorted(per_member)) or 'none'}"
            )
        odd = any(value != value for value in found)
        if odd and name != "cost_limit":  # which `check_limit` refuses in its own words
            raise SaferlError(f"{name} = nan is not a number: give it one")
        if name in ("batch_size", "policy_interval"):
            at_least(config, name, 1)
        if name == "tau":
            between(config, name, 0, 1)
        if name.endswith("lr"):
            at_least(config, name, 0)


def convert(key: str, value: Any, default: Any) -> Any:
    """``value`` in the type of the field's default; a list where a number belongs is per member."""
    try:
        if isinstance(default, tuple):  # layer sizes
            return tuple(int(v) for v in (value if isinstance(value, (list, tuple)) else [value]))
        if isinstance(value, (list, tuple)):
            if isinstance(default, bool) or not isinstance(default, (int, float)):
                raise TypeError
            return tuple(float(v) for v in value)
        if isinstance(default, bool):
            if not isinstance(value, bool):
                raise TypeError
            return value
        if isinstance(default, int):
            if isinstance(value, bool) or int(value) != float(value):
                raise TypeError
            return int(value)
        if isinstance(default, float):
            if isinstance(value, bool):
                raise TypeError
            return float(value)
        if isinstance(default, str):
            return str(value)
        return value
    except (TypeError, ValueError):
        raise SaferlError(
            f"{key} = {value!r} is not {_article(default)}: its default is {default!r}"
        ) from None


def _article(default: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}
    return names.get(type(default), "a list of whole numbers")
