"""D4RL (Fu et al., 2020, arXiv:2004.07219): files, reference returns, and its package's objects.

``load("hopper-medium-v2")`` finds the file in ``$SAFERL_DATA_DIR/d4rl``, then in the d4rl package's
own cache (``$D4RL_DATASET_DIR`` or ``~/.d4rl/datasets``), else downloads it; the environment
variable ``SAFERL_D4RL_MIRROR`` replaces the base URL. ``d4rl_reference.json`` holds every id of
locomotion, maze2d, antmaze, adroit and kitchen with its file, time limit and reference returns.

v2 locomotion files carry ``next_observations`` and all rows are used. The others do not, and rows
are taken as in D4RL's ``qlearning_dataset`` (see `Dataset.from_arrays`). v0 and v1 of a task are
different data from v2, so their scores are not comparable.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from saferl.data import validate
from saferl.data.card import Card
from saferl.data.dataset import Dataset
from saferl.data.sources import fetch, flat
from saferl.errors import SaferlError, unknown

CLIPPED = ("adroit", "kitchen")  # their environments clip actions in step()


@cache
def _reference() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("d4rl_reference.json").read_text())


@cache
def _groups() -> dict[str, dict[str, Any]]:
    return {id: group for group in _reference()["groups"] for id in group["files"]}


def ids() -> list[str]:
    """All known ids, without the ``d4rl/`` in front."""
    return sorted(_groups())


def id_of_file(name: str) -> str | None:
    """The id that D4RL publishes under this file name, or None."""
    for id, group in _groups().items():
        if group["files"][id].rsplit("/", 1)[-1] == name and "longhorizon" not in id:
            return id
    return None


def card(id: str) -> Card:
    """The card of a D4RL id; raises `SaferlError` naming the nearest id."""
    if id not in _groups():
        raise unknown("D4RL dataset", id, ids(), hint="see `saferl list` for all ids")
    group = _groups()[id]
    return Card(
        id=f"d4rl/{id}",
        env_id=group["env_id"],
        action_low=(-1.0,),
        action_high=(1.0,),
        horizon=group["horizon"],
        reference_returns=group["returns"],
        reference_source="D4RL",
        licence="CC BY 4.0",
        origin=_reference()["url"] + group["files"][id],
        notes=group.get("notes", ()),
    )


def load(
    id: str,
    *,
    path: str | Path | None = None,
    download: bool = True,
    clip_actions: bool = False,
    **card_fields: Any,
) -> Dataset:
    """A D4RL dataset.

    Args:
        id: such as ``hopper-medium-v2``.
        path: a local copy of the file; None looks in the caches and downloads.
        download: False refuses to use the network.

    Raises:
        SaferlError: an unknown id, no network, a damaged file, data that fail validation.
    """
    facts = card(id).replace(**card_fields)
    if path is None:
        own_cache = Path(os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets")
        path = fetch.locate(
            "d4rl",
            _groups()[id]["files"][id],
            base=_reference()["url"],
            mirror="SAFERL_D4RL_MIRROR",
            other=own_cache,
            download=download,
        )
    path = Path(path)
    arrays, _ = flat.read_hdf5(path)
    clip = clip_actions or _groups()[id]["family"] in CLIPPED
    return flat.from_file(path, _with_timeouts(arrays), facts, clip, {})


def _with_timeouts(arrays: dict[str, Any]) -> dict[str, Any]:
    """Without flags but with successors, episodes are cut where a successor is not the next row.

    Such data come from ``qlearning_dataset``, which drops the rows that timed out. Files without
    both are v0: `validate.prepare` counts their steps up to the horizon. (D4RL counts one too few
    in an episode that follows a terminal; here each episode has its full horizon.)
    """
    if arrays.get("timeouts") is None and arrays.get("next_observations") is not None:
        observations = np.asarray(arrays["observations"])
        next_observations = np.asarray(arrays["next_observations"])
        n = len(observations)
        if next_observations.shape != observations.shape:
            return arrays  # `validate.prepare` says what is wrong
        cut = np.zeros(n, bool)
        for part in validate.chunks(n - 1):
            stop = min(part.stop, n - 1)
            same = next_observations[part.start : stop] == observations[part.start + 1 : stop + 1]
            cut[part.start : stop] = ~same.reshape(len(same), -1).all(1)
        terminals = np.asarray(arrays["terminals"]).reshape(-1).astype(bool)
        if len(terminals) == n:
            cut[-1:] = not (cut.any() or terminals.any())
            arrays["timeouts"] = cut & ~terminals
    return arrays


def from_d4rl(
    source: Any, id: str | None = None, *, clip_actions: bool = False, **card_fields: Any
) -> Dataset:
    """A user's ``d4rl`` environment (it has ``get_dataset()``), or a dictionary from that package.

    Args:
        source: ``gym.make("hopper-medium-v2")``; or the dictionary of ``env.get_dataset()``
            (keys such as ``infos/qpos`` are left out) or of ``d4rl.qlearning_dataset(env)``.
        id: the D4RL id, for the card. None asks the environment; a dictionary then gets a card with
            action bounds [-1, 1], as all D4RL tasks have, and no reference returns.
    """
    facts = Card("d4rl", action_low=(-1.0,), action_high=(1.0,), licence="CC BY 4.0")
    if hasattr(source, "get_dataset"):
        id = id or getattr(getattr(source, "spec", None), "id", None)
        low, high = (getattr(source, f"ref_{m}_score", None) for m in ("min", "max"))
        facts = facts.replace(
            id=f"d4rl/{id}" if id else "d4rl",
            horizon=getattr(source, "_max_episode_steps", None),
            reference_returns=None if None in (low, high) else (low, high),
            reference_source=None if None in (low, high) else "D4RL",
        )
        data = source.get_dataset()
    else:
        data = source
    if not hasattr(data, "keys"):
        raise SaferlError(
            f"from_d4rl takes an environment with get_dataset() or its dictionary, got "
            f"{type(source).__name__}"
        )
    if id in _groups():
        facts = card(id)
    missing = [key for key in validate.REQUIRED if key not in data]
    if missing:
        raise SaferlError(
            f"the D4RL dictionary lacks {', '.join(missing)}; present: {', '.join(data)}"
        )
    arrays = {k: data[k] for k in (*validate.REQUIRED, *flat.OPTIONAL) if k in data}
    facts = facts.replace(**card_fields).noted("handed over by the d4rl package")
    clip = clip_actions or (id in _groups() and _groups()[id]["family"] in CLIPPED)
    return Dataset.from_arrays(**_with_timeouts(arrays), card=facts, clip_actions=clip)
