"""From whatever a source delivers to arrays a `Dataset` can hold: types, flags, next rows, checks.

What makes training wrong is refused with one line that names the place and the remedy. What is only
suspicious is returned as a list of problems. Everything runs over chunks of rows, so that checking
a large dataset needs little more memory than holding it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from saferl.data.frames import Frames
from saferl.errors import SaferlError

CHUNK = 65536  # rows
TOLERANCE = 1e-4  # relative; float32 rounding of bounds and of next observations
LARGE = 1e6  # magnitude from which a value is more likely a wrong unit or a code for "missing"
LISTED = 8  # of many columns or actions, so many are named
REQUIRED = ("observations", "actions", "rewards", "terminals")


def prepare(
    arrays: dict[str, Any], card: Any, clip_actions: bool = False, action_start: int = 0
) -> tuple[dict[str, np.ndarray], dict[str, Any], list[str], list[str]]:
    """Checked arrays for a `Dataset`, card fields learnt from them, notes and problems.

    ``arrays`` has the keys of `Dataset.from_arrays`; its entries are popped as they are converted,
    so that a source which keeps no reference of its own needs no second copy. Discrete actions of
    ``arrays`` count from ``action_start``.
    """
    notes: list[str] = []
    problems: list[str] = []
    missing = [name for name in REQUIRED if arrays.get(name) is None]
    if missing:
        present = [name for name, array in arrays.items() if array is not None]
        raise SaferlError(f"missing: {', '.join(missing)}; present: {', '.join(present) or 'none'}")
    rewards = column("rewards", arrays.pop("rewards"))
    n = len(rewards)
    if not n:
        raise SaferlError("the dataset has no rows")
    observations = states("observations", arrays.pop("observations"), n)
    actions, facts = _actions(arrays.pop("actions"), n, card, int(action_start))
    terminals = flags("terminals", arrays.pop("terminals"), n)
    timeouts = arrays.pop("timeouts", None)
    if timeouts is not None:
        timeouts = flags("timeouts", timeouts, n)
    elif card.horizon is not None:
        timeouts = timeouts_from_horizon(terminals, int(card.horizon))
        notes.append(f"timeouts reconstructed: every {card.horizon}th step of an episode")
    else:
        timeouts = np.zeros(n, bool)
    costs = arrays.pop("costs", None)
    if costs is not None:
        costs = column("costs", costs, n)

    both = terminals & timeouts
    if both.any():
        problems.append(
            f"{both.sum()} rows are both terminal and timeout: kept as terminal, timeout cleared"
        )
        timeouts = timeouts & ~both
    if not (terminals.any() or timeouts.any()):
        raise SaferlError(
            f"no episode ends in {n} rows: mark the last row of each episode in terminals (the "
            "task is over) or timeouts (it was cut off), or give horizon="
        )

    data = dict(observations=observations, actions=actions, rewards=rewards, costs=costs,
                terminals=terminals, timeouts=timeouts)  # fmt: skip
    del observations, actions, rewards, costs
    next_observations = arrays.pop("next_observations", None)
    if next_observations is None:
        data, note = _next_rows(data)
        notes += note
    else:
        next_observations = states("next_observations", next_observations, n)
        if next_observations.shape != data["observations"].shape:
            raise SaferlError(
                f"next_observations have shape {list(next_observations.shape)}, observations "
                f"{list(data['observations'].shape)}: they must be equal"
            )
        data["next_observations"] = next_observations
        if next_observations.dtype != data["observations"].dtype:
            data["next_observations"] = next_observations.astype(data["observations"].dtype)

    for name in ("observations", "next_observations", "actions", "rewards", "costs"):
        if data.get(name) is not None:
            check_finite(name, data[name])
    if data["actions"].dtype.kind == "f":
        bounds, changed = _bounds(data, card, clip_actions)
        facts |= bounds
        notes += changed
    problems += _suspicious(data, card) + cost_problems(data["costs"])
    return data, facts, notes, problems


# Types and shapes -------------------------------------------------------------------------------


def _array(name: str, values: Any) -> np.ndarray:
    if hasattr(values, "detach"):  # a torch tensor, perhaps with a gradient or on a GPU
        values = values.detach().cpu()
        values = values.float() if str(values.dtype) == "torch.bfloat16" else values
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise SaferlError(f"{name} are not one array, rows differ in shape: {error}") from None
    if array.dtype.kind not in "biuf":
        raise SaferlError(
            f"{name} have type {array.dtype}: they must be numbers; encode text and dates first"
        )
    return array


def _same_length(name: str, array: np.ndarray | Frames, n: int | None) -> None:
    if array.ndim == 0:
        raise SaferlError(f"{name} must have one row per step, got the single value {array}")
    if n is not None and len(array) != n:
        raise SaferlError(f"{name} have {len(array)} rows but rewards have {n}: they must be equal")


def column(name: str, values: Any, n: int | None = None) -> np.ndarray:
    """``[N]`` float32 from ``[N]`` or ``[N, 1]``."""
    array = _array(name, values)
    _same_length(name, array, n)
    if array.ndim > 1 and array.size == len(array):
        array = array.reshape(len(array))
    if array.ndim != 1:
        raise SaferlError(f"{name} have shape {list(array.shape)}: one number per row is needed")
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(array, dtype=np.float32)


def flags(name: str, values: Any, n: int) -> np.ndarray:
    """``[N]`` bool from bool or 0/1 numbers, ``[N]`` or ``[N, 1]``."""
    array = _array(name, values)
    _same_length(name, array, n)
    if array.size != n:
        raise SaferlError(f"{name} have shape {list(array.shape)}: one flag per row is needed")
    array = array.reshape(n)
    if array.dtype != bool:
        wrong = (array != 0) & (array != 1)
        if wrong.any():
            row = int(wrong.argmax())
            raise SaferlError(f"{name}[{row}] is {array[row]}: flags must be 0 or 1")
        array = array.astype(bool)
    return np.ascontiguousarray(array)


def states(name: str, values: Any, n: int) -> Any:
    """``[N, *O]`` float32, or uint8 as it is."""
    array = values if isinstance(values, Frames) else _array(name, values)
    _same_length(name, array, n)
    if array.ndim == 1:
        array = array[:, None]
    if isinstance(array, Frames):
        return array
    kind = np.uint8 if array.dtype == np.uint8 else np.float32
    with np.errstate(over="ignore"):  # what overflows becomes inf, and `check_finite` names it
        return np.ascontiguousarray(array, dtype=kind)


def _actions(values: Any, n: int, card: Any, start: int) -> tuple[np.ndarray, dict[str, Any]]:
    array = _array("actions", values)
    _same_length("actions", array, n)
    levels = card.action_levels
    if array.dtype.kind == "f" and card.n_actions is None and levels is None:
        with np.errstate(over="ignore"):
            return np.ascontiguousarray(array.reshape(n, -1), dtype=np.float32), {}
    if levels is not None:
        total = math.prod(levels)
        if card.n_actions not in (None, total):
            raise SaferlError(
                f"action_levels = {levels} make {total} actions, but n_actions is "
                f"{card.n_actions}: leave n_actions out"
            )
        card = card.replace(n_actions=total)
        if array.size != n:
            array, start = one_integer(array, levels, start), 0
    if array.size != n:
        shape = array.reshape(n, -1)
        needed = ", ".join(str(int(level)) for level in shape.max(0) - start + 1)
        raise SaferlError(
            f"actions are integers of shape {list(array.shape)}: cast them to float for continuous "
            f"actions, or pass action_levels=({needed}), the number of levels of each column, to "
            "make one integer of each combination"
        )
    if card.action_low is not None or card.action_high is not None:
        raise SaferlError(
            "actions are integers but action_low/action_high are given: cast the actions to float "
            "for continuous actions, or give no bounds for discrete ones"
        )
    array = array.reshape(n)
    valid = np.isfinite(array) & (array == np.floor(array)) & (array >= start)
    if card.n_actions is not None:
        valid &= array < start + card.n_actions
    if not valid.all():
        row = int(valid.argmin())
        last = f"from {start} on"
        if card.n_actions is not None:
            last = f"{start} … {start + int(card.n_actions) - 1}"
        elsewhere = "" if start else "; pass action_start= if they count from another number"
        raise SaferlError(
            f"actions[{row}] is {array[row]}: discrete actions must be whole numbers "
            f"{last}{elsewhere}"
        )
    array = np.ascontiguousarray(array, dtype=np.int64)
    array = array - start if start else array
    if card.n_actions is not None:
        return array, {"n_actions": int(card.n_actions)}
    return array, {"n_actions": int(array.max()) + 1}


def one_integer(actions: np.ndarray, levels: Sequence[int], start: int = 0) -> np.ndarray:
    """``[N]`` int64 of whole numbers ``[N, K]`` that count from ``start``; the first is slowest.

    Raises:
        SaferlError: another number of columns than levels; a value that is no level of its column.
    """
    actions = actions.reshape(len(actions), -1)
    if actions.shape[1] != len(levels):
        raise SaferlError(
            f"actions have {actions.shape[1]} columns, action_levels {len(levels)} numbers: give "
            "the number of levels of each column"
        )
    with np.errstate(invalid="ignore"):
        digits = actions.astype(np.int64) - start
    valid = (actions == np.floor(actions)) & (digits >= 0) & (digits < np.array(levels))
    if not valid.all():
        row, column = map(int, np.argwhere(~valid)[0])
        last = start + levels[column] - 1
        raise SaferlError(
            f"actions[{row}, {column}] is {actions[row, column]}, not one of its levels {start} … "
            f"{last}: give the true action_levels="
        )
    return np.asarray(np.ravel_multi_index(tuple(digits.T), tuple(levels)), np.int64)


# Flags and successors ---------------------------------------------------------------------------


def timeouts_from_horizon(terminals: np.ndarray, horizon: int) -> np.ndarray:
    """``[N]`` bool, true at every ``horizon``-th step since an episode began that did not end."""
    starts = np.concatenate([[0], np.flatnonzero(terminals) + 1])
    step = np.arange(len(terminals))
    step -= starts[np.searchsorted(starts, step, side="right") - 1]
    return (step % horizon == horizon - 1) & ~terminals


def _next_rows(data: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Successors from the next row; rows without one are left out (see `Dataset.from_arrays`)."""
    terminals, timeouts = data["terminals"], data["timeouts"]
    n = len(terminals)
    keep = ~timeouts
    if not terminals[-1]:
        keep[-1] = False
    index = np.flatnonzero(keep)
    if not len(index):
        raise SaferlError(
            "no row has a successor: give next_observations, or mark fewer rows as timeouts"
        )
    moved = np.zeros(n, bool)  # the row before a dropped timeout ends the episode instead
    moved[:-1] = timeouts[1:] & ~(terminals | timeouts)[:-1]
    data["timeouts"] = moved
    observations = data.pop("observations")
    successor = np.minimum(index + 1, n - 1)
    # The next row of a terminal belongs to another episode: its own observation is a real state.
    successor[terminals[index]] = index[terminals[index]]
    next_observations = observations[successor]
    if len(index) < n:
        observations = observations[index]
        data = {k: None if v is None else v[index] for k, v in data.items()}
    data |= {"observations": observations, "next_observations": next_observations}
    notes = ["next observations are taken from the next row"]
    if len(index) < n:
        notes = [
            f"next observations are taken from the next row; {n - len(index)} of {n} rows had none "
            "and were left out, so returns lack the last reward of episodes that timed out"
        ]
    if not (data["terminals"].any() or data["timeouts"].any()):
        raise SaferlError("no episode of two or more rows ends: give next_observations")
    return data, notes


# Checks -----------------------------------------------------------------------------------------


def chunks(n: int) -> Iterator[slice]:
    return (slice(start, start + CHUNK) for start in range(0, n, CHUNK))


def check_finite(name: str, array: np.ndarray) -> None:
    """Raise `SaferlError` that names the first row and column which is NaN or infinite."""
    if array.dtype.kind != "f":
        return
    for part in chunks(len(array)):
        finite = np.isfinite(array[part])
        if finite.all():
            continue
        place = np.argwhere(~finite)[0]
        row = int(place[0]) + part.start
        value = array[part][tuple(place)]
        where = f"row {row}" + "".join(f", column {c}" for c in place[1:])
        count = sum(int((~np.isfinite(array[p])).sum()) for p in chunks(len(array)))
        raise SaferlError(
            f"{name}: {value} at {where} ({count} such values): drop these rows or fill them in"
        )


def _bounds(data: dict, card: Any, clip: bool) -> tuple[dict[str, Any], list[str]]:
    """Bounds as one value per component; actions clipped to them where they may be."""
    actions, notes = data["actions"], []
    dim = actions.shape[1]
    if (card.action_low is None) != (card.action_high is None):
        raise SaferlError("give both action_low and action_high, or neither")
    if card.action_low is None:
        low, high = actions.min(0), actions.max(0)
        flat = low == high
        low, high = np.where(flat, low - 1, low), np.where(flat, high + 1, high)
        notes.append("action bounds are the least and greatest action in the data")
    else:
        low, high = (np.asarray(b, np.float32) for b in (card.action_low, card.action_high))
        for name, bound in (("action_low", low), ("action_high", high)):
            if bound.size not in (1, dim):
                raise SaferlError(f"{name} has {bound.size} values but actions have {dim} columns")
        low, high = (np.broadcast_to(b, (dim,)) for b in (low, high))
        if not (np.isfinite(low).all() and np.isfinite(high).all() and (low < high).all()):
            raise SaferlError(
                f"action bounds must be finite and low < high, got {low.tolist()} … {high.tolist()}"
            )
    facts = {"action_low": tuple(low.tolist()), "action_high": tuple(high.tolist())}
    slack = TOLERANCE * (high - low)
    outside = far = 0
    first = (0, 0)
    for part in chunks(len(actions)):
        block = actions[part]
        outside += int(((block < low) | (block > high)).any(1).sum())
        beyond = (block < low - slack) | (block > high + slack)
        if beyond.any() and not far:
            row, col = map(int, np.argwhere(beyond)[0])
            first = (row + part.start, col)
        far += int(beyond.any(1).sum())
    if far and not clip:
        row, col = first
        raise SaferlError(
            f"actions[{row}, {col}] is {actions[row, col]:g}, outside [{low[col]:g}, "
            f"{high[col]:g}] ({far} of {len(actions)} rows): give the true bounds with action_low= "
            "and action_high=, rescale this column, or pass clip_actions=True"
        )
    if far:
        notes.append(f"actions of {far} of {len(actions)} rows were clipped to the bounds")
    if outside:
        data["actions"] = np.clip(actions, low, high)
    return facts, notes


def row_hashes(*arrays: np.ndarray) -> np.ndarray:
    """``[N]`` uint64, equal for rows that are equal bit for bit."""
    n = len(arrays[0])
    hashes = np.zeros(n, np.uint64)
    random = np.random.default_rng(0)
    for array in arrays:
        flat = np.ascontiguousarray(array).reshape(n, -1)
        words = flat.view(np.uint8 if flat.dtype == np.uint8 else np.uint32)
        weights = random.integers(2**63, size=words.shape[1], dtype=np.uint64) * 2 + 1
        for part in chunks(n):
            # Mixing first: float32 words share low zero bits, and plain sums of them collide.
            mixed = words[part].astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
            mixed ^= mixed >> np.uint64(29)
            hashes[part] += mixed @ weights
    return hashes


def duplicate_rows(observations, actions, rewards) -> int:
    """Rows that repeat an earlier row's observation, action and reward bit for bit."""
    if isinstance(observations, Frames):
        observations = observations.hashes
    hashes = row_hashes(observations, actions, rewards)
    hashes.sort()
    return int((hashes[1:] == hashes[:-1]).sum())


def _share(count: int, total: int) -> str:
    return f"{count} of {total} ({100 * count / total:.3g} %)"


def _suspicious(data: dict, card: Any) -> list[str]:
    observations, next_observations = data["observations"], data["next_observations"]
    n, found = len(observations), []
    ends = data["terminals"] | data["timeouts"]
    stops = np.flatnonzero(ends) + 1
    if stops[-1] < n:
        found.append(
            f"the last {n - stops[-1]} rows belong to an episode without an end: trained on, left "
            "out of return statistics"
        )
    if card.horizon is not None:
        lengths = np.diff(stops, prepend=0)
        if (lengths > card.horizon).any():
            found.append(
                f"{_share(int((lengths > card.horizon).sum()), len(lengths))} episodes are longer "
                f"than the horizon of {card.horizon} steps (longest {lengths.max()})"
            )
    found += _unseen(data["actions"], card) + _large(data, card)
    if isinstance(observations, Frames):  # successors are next frames by construction
        return found
    apart = 0
    for part in chunks(n - 1):
        stop = min(part.stop, n - 1)
        a = next_observations[part.start : stop].reshape(stop - part.start, -1)
        b = observations[part.start + 1 : stop + 1].reshape(stop - part.start, -1)
        if a.dtype == np.uint8:
            differs = (a != b).any(1)
        else:
            differs = (np.abs(a - b) > TOLERANCE * (1 + np.abs(b))).any(1)
        apart += int((differs & ~ends[part.start : stop]).sum())
    inside = n - int(ends[:-1].sum()) - 1
    if apart:
        found.append(
            f"next_observations disagree with the next row at {_share(apart, inside)} rows inside "
            "episodes: harmless if rows are shuffled transitions (then ignore return statistics), "
            "else the flags or the order of rows are wrong"
        )
    repeats = duplicate_rows(observations, data["actions"], data["rewards"])
    if repeats > 0.001 * n:
        found.append(f"{_share(repeats, n)} rows repeat an earlier row exactly")
    if n > 1 and observations.dtype != np.uint8:
        flat = observations.reshape(n, -1)
        still = np.flatnonzero(flat.min(0) == flat.max(0))
        if len(still):
            found.append(
                f"{len(still)} of {flat.shape[1]} observation columns never change: "
                f"{_listed([_feature(card, int(c)) for c in still])}"
            )
    return found


def _listed(items: Sequence[Any]) -> str:
    return ", ".join(map(str, items[:LISTED])) + (", …" if len(items) > LISTED else "")


def _feature(card: Any, column: int) -> str:
    """A column of observations by its number, and its name where it has one."""
    names = card.features
    return f"{column} ({names[column]})" if column < len(names) else str(column)


def _unseen(actions: np.ndarray, card: Any) -> list[str]:
    """Discrete actions that no row takes, in the user's numbers."""
    if actions.dtype.kind == "f" or not len(actions):
        return []
    counts = np.bincount(actions, minlength=int(card.n_actions or 0))
    unseen = np.flatnonzero(counts == 0)
    if not len(unseen):
        return []
    from_one = not counts[0] and not card.action_start and len(unseen) == 1
    hint = ", or pass action_start=1 if they count from 1" if from_one else ""
    return [
        f"{len(unseen)} of {len(counts)} actions occur in no row: "
        f"{_listed((unseen + card.action_start).tolist())}: nothing is known of what they "
        f"do{hint}"
    ]


def _large(data: dict, card: Any) -> list[str]:
    """Columns with values beyond `LARGE`: wrong units, or codes for what is missing."""
    found = []
    for name in ("observations", "actions", "rewards", "costs"):
        array = data[name]
        if array is None or isinstance(array, Frames) or array.dtype.kind != "f":
            continue
        flat = array.reshape(len(array), -1)
        counts = np.zeros(flat.shape[1], np.int64)
        first: dict[int, Any] = {}
        for part in chunks(len(flat)):
            large = np.abs(flat[part]) > LARGE
            if not large.any():
                continue
            counts += large.sum(0)
            for column in np.flatnonzero(large.any(0)).tolist():
                first.setdefault(column, part.start + int(large[:, column].argmax()))
        for column, row in list(first.items())[:LISTED]:
            where = ""
            if flat.shape[1] > 1:
                where = f" column {_feature(card, column) if name == 'observations' else column}"
            found.append(
                f"{name}{where}: {flat[row, column]:g} at row {row} ({counts[column]} values "
                f"beyond {LARGE:g}): a wrong unit, or a code for a missing value?"
            )
    return found


def cost_problems(costs: np.ndarray | None) -> list[str]:
    """What is odd about costs: all zero, or below zero."""
    if costs is None:
        return []
    if (costs < 0).any():
        return [
            f"{_share(int((costs < 0).sum()), len(costs))} costs are negative (least "
            f"{costs.min():g}): a cost limit is meant for costs of 0 or more"
        ]
    if not costs.any():
        return ["all costs are 0: a cost limit constrains nothing"]
    return []
