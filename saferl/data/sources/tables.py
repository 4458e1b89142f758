"""Tables (CSV, Parquet, pandas): one row per step, columns mapped to their roles.

load_dataset("patients.csv", columns={
    "observations": ["age", "heart_rate", "lactate"],   # one or more
    "actions": "dose",                                  # one integer column: discrete actions
    "rewards": "reward",
    "costs": "adverse_event",                           # optional
    "episode": "patient_id", "time": "hour",            # or flags: "terminals", "timeouts"
}, encode="onehot")                                     # text columns, where there are any

Rows are taken in the order of the table unless ``time`` sorts them. `encode_rows` makes the
observations of further rows of such a table.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from saferl.data.card import Card
from saferl.data.dataset import Dataset
from saferl.errors import SaferlError, nearest, unknown

MANY = ("observations", "next_observations")
ENCODINGS = ("onehot", "ordinal")
TIMES = {"time", "timestamp", "datetime", "date", "day", "hour", "minute", "second", "step"}
"""Words in the name of a column that may say when a row happened; ``t`` as the whole name, too."""
ROLES = (*MANY, "actions", "rewards", "costs", "terminals", "timeouts", "episode", "time")


def from_dataframe(
    frame: Any,
    columns: dict[str, Any] | None = None,
    *,
    episode_end: str = "terminal",
    encode: str | None = None,
    card: Card | None = None,
    **options: Any,
) -> Dataset:
    """A `Dataset` from a pandas DataFrame with one row per step.

    Args:
        frame: its columns must be numeric, but for text that ``encode`` encodes.
        columns: role to column name (lists for ``observations``, ``next_observations`` and several
            continuous ``actions``). Roles: observations, actions, rewards, and optionally costs,
            terminals, timeouts, next_observations, episode, time. None takes columns named after
            the roles: ``observation_0 … action reward cost terminal timeout episode time``.
        episode_end: where an ``episode`` column ends an episode that no flag ends: "terminal" (the
            record is complete: nothing follows) or "timeout" (it was cut off: its last row has no
            successor and is left out, unless next_observations are given). Without ``episode``
            the flags alone end episodes.
        encode: how observations that are text or categorical become numbers: "onehot", one 0/1
            column for each value, or "ordinal", 0, 1, 2 … in the order of a categorical column,
            else of the alphabet. Actions that are text then become 0, 1, 2 … The values are kept
            in ``card.categories``, by column. None refuses text.
        options: those of `Dataset.from_arrays`: ``clip_actions`` and fields of the card, among them
            ``n_actions`` where the integers of the action column do not show how many there are.

    With ``episode`` rows are brought together per episode, in order of first appearance, and sorted
    by ``time`` (numbers, dates, or text that sorts) within it where given. Without ``time`` they
    stay as they are, and a column named like a time that runs backwards within an episode is one
    of the ``problems``. One integer action column means discrete actions, float
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
    if encode is not None and encode not in ENCODINGS:
        raise unknown("encode", str(encode), ENCODINGS)
    seen, actions = roles["observations"], roles["actions"]
    categories = _categories(frame, roles) if encode else {}
    facts: dict[str, Any] = {
        "columns": tuple(map(str, seen)),
        "categories": {str(n): categories[n] for n in (*seen, *actions) if n in categories},
        "encoding": encode if any(name in categories for name in seen) else None,
    }
    values: dict[str, Any] = {
        role: _numbers(frame, names, categories, encode if role in MANY else "ordinal")
        for role, names in roles.items()
    }
    if all(name in categories or frame[name].dtype.kind in "iub" for name in actions):
        values["actions"] = values["actions"].astype(np.int64)
        if len(actions) == 1 and actions[0] in categories:
            options.setdefault("n_actions", len(categories[actions[0]]))
    order, last = None, None
    problems: list[str] = []
    notes: list[str] = []
    if episode is not None:
        order, last, problems = _episodes(frame, episode[0], time)
        if order is not None:
            values = {role: array[order] for role, array in values.items()}
    elif time is not None:
        raise SaferlError(
            "columns: time orders the steps of an episode, so it needs episode as well"
        )
    n = len(frame)
    problems += _backwards(frame, order, episode, roles, time)
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
                f"{open_end.sum()} episodes end with column {str(episode and episode[0])!r} alone: "
                f"taken as {episode_end}s"
            )
    card = (card or Card("table")).replace(**facts).noted(*notes)
    dataset = Dataset.from_arrays(
        **values, terminals=terminals, timeouts=timeouts, card=card, **options
    )
    dataset.problems = (*dataset.problems, *problems)
    return dataset


def encode_rows(frame: Any, card: Card) -> np.ndarray:
    """Observations ``[N, O]`` float32 of rows of a table like the one that ``card`` is of.

    Text is encoded as it was for the dataset. This is what a policy that was trained on the dataset
    is given; it normalises by itself.

    Raises:
        SaferlError: the card is not of a table; a column is missing; a value that the dataset did
            not hold; values that are missing or no numbers.
    """
    if not card.columns:
        raise SaferlError(f"{card.id} was not made from a table: there is nothing to encode by")
    present = {str(name): name for name in frame.columns}
    for name in card.columns:
        if name not in present:
            listed = ", ".join(list(present)[:20])
            raise SaferlError(f"no column {name!r}: {nearest(name, present)}Present: {listed}")
    names = [present[name] for name in card.columns]
    categories = {present[n]: v for n, v in card.categories.items() if n in card.columns}
    return _numbers(frame, names, categories, card.encoding).astype(np.float32)


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


def _is_text(series: Any) -> bool:
    return series.dtype.kind not in "biufmM"


def _value(value: Any) -> Any:
    """A category as JSON can hold it."""
    value = value.item() if hasattr(value, "item") else value
    return value if isinstance(value, (str, int, float, bool)) else str(value)


def _categories(frame: Any, roles: dict[str, list[Any]]) -> dict[Any, tuple]:
    """The values of each column of text; an observation's are those of its successor too."""
    names = [name for role in (*MANY, "actions") for name in roles.get(role, ())]
    found: dict[Any, list] = {}
    for name in names:
        if not _is_text(frame[name]):
            continue
        own = getattr(frame[name].dtype, "categories", None)
        if own is not None:  # pandas' own, in their order
            found[name] = [_value(value) for value in own]
        else:
            found[name] = sorted({_value(value) for value in frame[name].dropna()}, key=str)
    for one, next_column in zip(roles["observations"], roles.get("next_observations", ())):
        if one in found or next_column in found:
            both = [*found.get(one, ()), *found.get(next_column, ())]
            found[one] = found[next_column] = list(dict.fromkeys(both))
    return {name: tuple(values) for name, values in found.items()}


def _numbers(
    frame: Any,
    names: list[Any],
    categories: dict[Any, tuple] | None = None,
    encode: str | None = None,
) -> np.ndarray:
    """``[N, …]`` float32 (float64 for one column: integer labels must survive).

    Columns with ``categories`` become their numbers, or with ``encode`` "onehot" as many columns.
    """
    parts = []
    for name in names:
        if categories and name in categories:
            codes = _codes(frame[name], name, categories[name])
            one_hot = np.eye(len(categories[name]), dtype=np.float32)
            parts.append(one_hot[codes] if encode == "onehot" else codes[:, None])
        else:
            parts.append(_column(frame[name], name)[:, None])
    single = len(parts) == 1 and parts[0].shape[1] == 1
    kind = np.float64 if single else np.float32
    with np.errstate(over="ignore"):  # what overflows becomes inf, and is refused as such
        return np.concatenate([part.astype(kind, copy=False) for part in parts], 1)


def _column(series: Any, name: Any) -> np.ndarray:
    """``[N]`` float64 of a column of numbers."""
    if series.dtype.kind not in "biuf":
        shown = ", ".join(map(str, series.dropna().unique()[:5]))
        remedy = "pass encode='onehot' or encode='ordinal'"
        if series.dtype.kind in "mM":
            remedy = "turn dates into numbers, such as hours since admission"
        raise SaferlError(
            f"column {name!r} holds {series.dtype} values ({shown}), not numbers: {remedy}"
        )
    values = series.to_numpy(dtype=np.float64, na_value=np.nan)
    _refuse_missing(name, ~np.isfinite(values), values)
    return values


def _codes(series: Any, name: Any, values: tuple) -> np.ndarray:
    """``[N]`` int64, which of ``values`` each row of a column has."""
    missing = series.isna().to_numpy(bool)
    rows = [None if gone else _value(value) for value, gone in zip(series, missing)]
    _refuse_missing(name, missing, rows)
    numbers = {value: number for number, value in enumerate(values)}
    codes = np.array([numbers.get(value, -1) for value in rows], np.int64)
    if (codes < 0).any():
        row = int((codes < 0).argmax())
        listed = ", ".join(map(str, values[:20]))
        raise SaferlError(f"column {name!r}, row {row}: {rows[row]!r} is none of {listed}")
    return codes


def _refuse_missing(name: Any, missing: np.ndarray, values: Any) -> None:
    if missing.any():
        row = int(missing.argmax())
        raise SaferlError(
            f"column {name!r}, row {row}: {values[row]} ({missing.sum()} such values): drop these "
            "rows or fill them in"
        )


def _when(series: Any) -> np.ndarray | None:
    """``[N]`` numbers that order a column of numbers, dates or text; None where some are missing.

    Text is read as dates if all of it can be, else it is sorted as text.
    """
    import pandas

    if series.isna().any():
        return None
    if series.dtype.kind in "biuf":
        return series.to_numpy()
    if series.dtype.kind not in "mM":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pandas says when it guesses the format of dates
            dates = pandas.to_datetime(series.astype(str), errors="coerce")
        if dates.isna().any():
            return np.unique(series.astype(str).to_numpy(), return_inverse=True)[1]
        series = dates
    return series.astype("int64").to_numpy()


def _backwards(
    frame: Any,
    order: np.ndarray | None,
    episode: list[Any] | None,
    roles: dict[str, list[Any]],
    time: list[Any] | None,
) -> list[str]:
    """Columns named like a time that run backwards within an episode."""
    if time is not None:
        return []
    order = np.arange(len(frame)) if order is None else order
    if episode is not None:
        number = frame[episode[0]].factorize()[0][order]
    else:
        flags = [
            frame[roles[role][0]].to_numpy() != 0
            for role in ("terminals", "timeouts")
            if role in roles
        ]
        ends = np.logical_or.reduce(flags)
        number = np.cumsum(ends) - ends
    inside = np.diff(number) == 0
    found = []
    for name in frame.columns:
        words = set(re.split(r"[^a-z]+", str(name).lower()))
        if not (words & TIMES or words == {"t"}) or name in (episode or ()):
            continue
        when = _when(frame[name])
        if when is None:
            continue
        back = inside & (when[order][1:] < when[order][:-1])
        if back.any():
            row = int(order[int(back.argmax()) + 1])
            remedy = "give it the role time in columns" if episode else "sort the rows by it"
            found.append(
                f"column {name!r} runs backwards at {back.sum()} of {inside.sum()} steps within "
                f"episodes, first at row {row} of the table: the rows are taken as they stand; "
                f"{remedy} if it says when they happened"
            )
    return found


def _episodes(
    frame: Any, episode: Any, time: list[Any] | None
) -> tuple[np.ndarray | None, np.ndarray, list[str]]:
    """Order that brings episodes together (None: it is there), last-row mask, problems."""
    codes, _ = frame[episode].factorize()
    if (codes < 0).any():
        row = int((codes < 0).argmax())
        raise SaferlError(f"column {episode!r}, row {row}: an episode id is missing")
    when = None if time is None else _when(frame[time[0]])
    if time is not None and when is None:
        row = int(frame[time[0]].isna().to_numpy(bool).argmax())
        raise SaferlError(f"column {time[0]!r}, row {row}: a time is missing")
    keys = (codes,) if when is None else (when, codes)
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
