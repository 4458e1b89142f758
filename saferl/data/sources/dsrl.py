"""DSRL (Liu et al., 2023, arXiv:2306.09303): 38 offline datasets with costs.

``load("OfflinePointGoal1-v0")``, ``load("OfflinePointGoal1Gymnasium-v0")`` and
``load("PointGoal1")`` are one task. It is looked for in ``$SAFERL_DATA_DIR/dsrl``, then in the
dsrl package's own cache (``$DSRL_DATASET_DIR`` or ``~/.dsrl/datasets``), else downloaded; the
environment variable ``SAFERL_DSRL_MIRROR`` replaces the base URL. DSRL publishes no checksums: the
number of trajectories in the file's name is compared with the episodes in it.

The score is normalised with the least and greatest return in the data, as DSRL's papers do. Costs
are 0/1 in Bullet and Safety-Gymnasium tasks and real numbers in MetaDrive.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

from saferl.data.card import Card
from saferl.data.dataset import Dataset
from saferl.data.sources import fetch, flat
from saferl.errors import SaferlError, nearest


@cache
def _reference() -> dict[str, Any]:
    return json.loads(Path(__file__).with_name("dsrl_reference.json").read_text())


@cache
def _names() -> dict[str, str]:
    """Every spelling of an id to its task."""
    names = {task: task for task in _reference()["tasks"]}
    return names | {i: task for task, row in _reference()["tasks"].items() for i in row["ids"]}


def ids() -> list[str]:
    """All known ids, without the ``dsrl/`` in front; tasks by their short name are left out."""
    return sorted(set(_names()) - set(_reference()["tasks"]))


def task(id: str) -> dict[str, Any]:
    """The published constants of a task: file, env, dims, horizon, returns, max_cost, limits."""
    if id not in _names():
        raise SaferlError(
            f"unknown DSRL dataset {id!r}: {nearest(id, ids())}Tasks: "
            f"{', '.join(_reference()['tasks'])}"
        )
    return _reference()["tasks"][_names()[id]]


def id_of_file(name: str) -> str | None:
    """The id that DSRL publishes under this file name, or None."""
    for row in _reference()["tasks"].values():
        if row["file"] == name:
            return row["ids"][0]
    return None


def card(id: str) -> Card:
    """The card of a DSRL task; raises `SaferlError` naming the nearest id."""
    row = task(id)
    notes = [f"DSRL's cost limits are {', '.join(map(str, row['limits']))} per episode"]
    ours = (row["env"] or "").startswith("saferl/")
    if not ours:
        where = {"bullet": "bullet-safety-gym", "metadrive": "DSRL's fork of MetaDrive"}
        package = where.get(row["group"], "safety-gymnasium")
        name = f" as {row['env']}" if row["env"] else ""
        notes.append(f"evaluation needs {package}{name}: no gymnasium environment is set")
    return Card(
        id=f"dsrl/{row['ids'][0]}",
        env_id=row["env"] if ours else None,
        action_low=(-1.0,),
        action_high=(1.0,),
        horizon=row["horizon"],
        reference_returns=row["returns"],
        reference_source="DSRL",
        licence="CC BY 4.0",
        origin=_reference()["url"] + row["file"],
        notes=(*notes, *row.get("notes", ())),
    )


def load(
    id: str,
    *,
    path: str | Path | None = None,
    download: bool = True,
    clip_actions: bool = False,
    **card_fields: Any,
) -> Dataset:
    """A DSRL dataset; the arguments are those of `saferl.data.sources.d4rl.load`.

    Raises:
        SaferlError: an unknown id, no network, a damaged file, a file without costs or next
            observations, dimensions that are not the task's, data that fail validation.
    """
    row, facts = task(id), card(id).replace(**card_fields)
    if path is None:
        path = fetch.locate(
            "dsrl",
            row["file"],
            base=_reference()["url"],
            mirror="SAFERL_DSRL_MIRROR",
            other=Path(os.environ.get("DSRL_DATASET_DIR") or "~/.dsrl/datasets"),
            download=download,
        )
    path = Path(path)
    arrays, _ = flat.read_hdf5(path)
    missing = [key for key in ("costs", "next_observations", "timeouts") if key not in arrays]
    if missing:
        raise SaferlError(
            f"{path}: a DSRL file has {', '.join(missing)} as well; present: {', '.join(arrays)}"
        )
    dims = [arrays["observations"].shape[-1], arrays["actions"].shape[-1]]
    if dims != row["dims"]:
        raise SaferlError(
            f"{path}: observations and actions have {dims[0]} and {dims[1]} columns, "
            f"{facts.id} has {row['dims'][0]} and {row['dims'][1]}: the file is another task's"
        )
    dataset = flat.from_file(path, arrays, facts, clip_actions, {})
    if len(dataset.episodes) != row["trajectories"]:
        problem = (
            f"{len(dataset.episodes)} episodes, but the published file has {row['trajectories']}: "
            "part of it is missing or it was made from other data"
        )
        dataset.problems = (*dataset.problems, problem)
    return dataset
