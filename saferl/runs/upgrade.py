"""Records of runs as earlier versions wrote them, brought to the present format.

Format 1 (no ``format`` key): ``agent_config`` holds every setting, a list where members differ;
``members`` are printed names, ``seeds`` stand beside them.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from saferl.registry import agent_class
from saferl.runs.config import FORMAT, Values

ADDED: Values = {"guard": None, "keep_checkpoints": 2, "engine": "auto", "precision": "fp32",
         "start_from": None, "threads": 1}  # fmt: skip
"""Options that the first versions did not write."""


def upgrade(values: Values) -> Values:
    """The record of a run in the present format; one that is in it already is returned as it is."""
    if values.get("format") == FORMAT or "agent_config" not in values:
        return values
    values = ADDED | values
    config = values.pop("agent_config")
    seeds, names = values.pop("seeds"), values.pop("members")
    cls = agent_class(values["agent"])
    varied = {
        key: setting
        for key, setting in cls.rename_settings(config, warn=False).items()
        if is_varied(cls, key, setting)
    }
    config = cls.rename_settings(config, warn=False)
    # A member that was split off has its value as the only one; its name says that it was its own.
    alone = {
        key: config[key]
        for key in cls.per_member & config.keys()
        if key not in varied and all(f"{key}=" in str(name) for name in names)
    }
    values["members"] = [
        {"seed": seed, "values": {key: of[m] for key, of in varied.items()} | alone}
        for m, seed in enumerate(seeds)
    ]
    values["settings"] = {k: v for k, v in config.items() if k not in varied and k not in alone}
    return {"format": FORMAT, **values}


def is_varied(cls: Any, key: str, setting: Any) -> bool:
    """Whether a setting holds one value per member, and is not a list by nature."""
    defaults = {spec.name: spec.default for spec in dataclasses.fields(cls.Config)}
    return isinstance(setting, list) and not isinstance(defaults.get(key), tuple)


def upgrade_state(cls: Any, state: dict[str, Any]) -> dict[str, Any]:
    """Tensors of a checkpoint under the names that the agent's state has now."""
    renamed = cls.renamed_state
    if not renamed:
        return state
    patterns = [
        (re.compile(r"agent\." + re.escape(old).replace(r"\*", r"(\w+)") + r"(?=\.|$)"),
         "agent." + new.replace("*", r"\1"))
        for old, new in renamed.items()
    ]  # fmt: skip
    found = {}
    for key, tensor in state.items():
        for pattern, new in patterns:
            key = pattern.sub(new, key)
        found[key] = tensor
    return found
