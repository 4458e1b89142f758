"""Tables (CSV, Parquet, pandas): one row per step, columns mapped to their roles.

load_dataset("patients.csv", columns={
    "observations": ["age", "heart_rate", "lactate"],   # one or more
    "actions": "dose",                                  # one integer column: discrete actions
    "rewards": "reward",
    "costs": "adverse_event",                           # optional
    "episode": "patient_id", "time": "hour",            # or flags: "terminals", "timeouts"
})
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from saferl.data.card import Card
from saferl.data.dataset import Dataset
from saferl.errors import SaferlError, nearest, unknown

MANY = ("observations", "next_observations")
ROLES = (*MANY, "actions", "rewards", "costs", "terminals", "timeouts", "episode", "time")


def from_dataframe(
    frame: Any,
    columns: dict[str, Any] | None = None,
    *,
    episode_end: str = "terminal",
    card: Card | None = None,
    **options: Any,
) -> Dataset:
    """A `Dataset` from a pandas DataFrame with one row per step.

    Args:
        frame: its columns must be numeric; text and dates are encoded by the caller.
        columns: role to column name (lists for ``observations``, ``next_observations`` and several
            continuous ``actions``). Roles: observations, actions, rewards, and optionally costs,
            terminals, timeouts, next_observations, episode, time. None takes columns named after
            the roles: ``observation_0 … action reward cost terminal timeout episode time``.
        episode_end: where an ``episode`` column ends an episode that no flag ends: "terminal" (the
            record is complete: nothing follows) or "timeout" (it was cut off: its last row has no
            successor and is left out, unless next_observations are given). Without ``episode``
            the flags alone end episodes.
        options: those of `Dataset.from_arrays`: ``clip_actions`` and fields of the card, among them
            ``n_actions`` where the integers of the action column do not show how many there are.

    With ``episode`` rows are brought together per episode, in order of first appearance, and sorted
    by ``time`` within it where given. One integer action column means discrete actions, float
    columns continuous ones.

    Raises:
        SaferlError: an unknown or missing column, text, missing values (row and column named), and
            what `Dataset.from_arrays` refuses.
    """
    roles = _roles(frame, columns)
    if episode_end not in ("terminal", "timeout"):
        raise unknown("episode_end", str(episode_end), ("terminal", "timeout"))
    episode = roles.pop("episode", None)
    time = roles.pop("time", None)
    values = {role: _numbers(frame, names) for role, names in roles.items()}
    actions = roles["actions"]
    kinds = {frame[name].dtype.kind for name in actions}
    if kinds <= set("iub"):
        values["actions"] = values["actions"].astype(np.int64)
    order, last, problems, notes = None, None, [], []
    if episode is not None:
        order, last, problems = _episodes(frame, episode[0], time)
        if order is not None:
            values = {role: array[order] for role, array in values.items()}
    elif time is not None:
        raise SaferlError(
            "columns: time orders the steps of an episode, so it needs episode as well"
        )
    n = len(frame)
    terminals = values.pop("terminals", np.zeros((n, 1))).reshape(-1)
    timeouts = values.pop("timeouts", None)
    if timeouts is not None:
        timeouts = timeouts.reshape(-1)
    if last is not None:
        timeouts = np.zeros(n) if timeouts is None else timeouts
        open_end = last & (terminals == 0) & (timeouts == 0)
        if episode_end == "terminal":
            terminals = np.where(open_end, 1, terminals)
        else:
            timeouts = np.where(open_end, 1, timeouts)
        if open_end.any():
            notes.append(
                f"{open_end.sum()} episodes end with column {episode[0]!r} alone: taken as "
                f"{episode_end}s"
            )
    card = (card or Card("table")).noted(*notes)
    dataset = Dataset.from_arrays(
        **values, terminals=terminals, timeouts=timeouts, card=card, **options
    )
    dataset.problems = (*dataset.problems, *problems)
    return dataset


def load(path: Path, *, columns: dict[str, Any] | None = None, **options: Any) -> Dataset:
    """`from_dataframe` of a ``.csv`` or ``.parquet`` file."""
    import pandas

    try:
        if path.suffix.lower() == ".csv":
            frame = pandas.read_csv(path)
        else:
            frame = pandas.read_parquet(path)
    except ImportError:
        raise SaferlError(
            f"{path}: reading Parquet needs pyarrow: pip install 'saferl[parquet]'"
        ) from None
    except (OSError, ValueError, pandas.errors.ParserError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise SaferlError(f"{path} cannot be read as {path.suffix[1:]}: {reason}") from None
    try:
        return from_dataframe(frame, columns, card=Card(path.name, origin=str(path)), **options)
    except SaferlError as error:
        raise SaferlError(f"{path}: {error}") from None


def _roles(frame: Any, columns: dict[str, Any] | None) -> dict[str, list[Any]]:
    """Role to a list of existing column names; what is missing or unknown is an error."""
    present = list(frame.columns)
    if columns is None:
        columns = {role: _by_name(role, present) for role in ROLES}
        columns = {role: names for role, names in columns.items() if names}
    roles: dict[str, list[Any]] = {}
    for role, names in columns.items():
        if role not in ROLES:
            raise unknown("role in columns", str(role), ROLES)
        if names is None:
            continue
        names = list(names) if isinstance(names, (list, tuple)) else [names]
        for name in names:
            if name not in present:
                guess = nearest(str(name), map(str, present))
                raise SaferlError(
                    f"unknown column for {role} {str(name)!r}: {guess}Present: "
                    f"{', '.join(map(str, present[:20]))}"
                )
        if len(names) != 1 and role not in (*MANY, "actions"):
            raise SaferlError(f"columns: {role} takes one column, got {names}")
        if names:
            roles[role] = names
    missing = [role for role in ("observations", "actions", "rewards") if role not in roles]
    if not {"terminals", "timeouts", "episode"} & set(roles):
        missing.append("terminals, timeouts or episode")
    if missing:
        raise SaferlError(
            f"columns: no column for {', '.join(missing)}; map them with columns={{'observations': "
            f"[…], 'actions': …, 'rewards': …, 'episode': …}}; present: "
            f"{', '.join(map(str, present[:20]))}"
        )
    if not len(frame):
        raise SaferlError("the table has no rows")
    return roles


def _by_name(role: str, present: list[Any]) -> list[Any]:
    singular = role.removesuffix("s") if role not in ("episode", "time") else role
    if role in (*MANY, "actions"):
        return [
            c for c in present if str(c) in (role, singular) or str(c).startswith(f"{singular}_")
        ]
    return [c for c in present if str(c) in (role, singular)][:1]


def _numbers(frame: Any, names: list[Any]) -> np.ndarray:
    """``[N, len(names)]`` float32 (float64 for one column: integer labels must survive)."""
    kind = np.float32 if len(names) > 1 else np.float64
    out = np.empty((len(frame), len(names)), kind)
    for i, name in enumerate(names):
        series = frame[name]
        if series.dtype.kind not in "biuf":
            shown = ", ".join(map(str, series.dropna().unique()[:5]))
            raise SaferlError(
                f"column {name!r} holds {series.dtype} values ({shown}), not numbers: encode them "
                "first, for example as 0, 1, 2 … or as one 0/1 column each"
            )
        out[:, i] = series.to_numpy(dtype=kind, na_value=np.nan)
        bad = ~np.isfinite(out[:, i])
        if bad.any():
            row = int(bad.argmax())
            raise SaferlError(
                f"column {name!r}, row {row}: {out[row, i]} ({bad.sum()} such values): drop these "
                "rows or fill them in"
            )
    return out


def _episodes(
    frame: Any, episode: Any, time: list[Any] | None
) -> tuple[np.ndarray | None, np.ndarray, list[str]]:
    """Order that brings episodes together (None: it is there), last-row mask, problems."""
    codes, _ = frame[episode].factorize()
    if (codes < 0).any():
        row = int((codes < 0).argmax())
        raise SaferlError(f"column {episode!r}, row {row}: an episode id is missing")
    keys = (codes,) if time is None else (_numbers(frame, time)[:, 0], codes)
    order = np.lexsort(keys)
    problems = []
    if time is not None:
        when = keys[0][order]
        same = (np.diff(when) == 0) & (np.diff(codes[order]) == 0)
        if same.any():
            problems.append(
                f"{same.sum()} rows have the same {episode!r} and {time[0]!r} as another row"
            )
    codes = codes[order]
    last = np.ones(len(codes), bool)
    last[:-1] = codes[1:] != codes[:-1]
    return (None if (np.diff(order) == 1).all() else order), last, problems
