"""Datasets made on first use and kept: a cache that knows by which recipe each was made."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from saferl.data import Card, Dataset
from saferl.data.sources.fetch import data_dir
from saferl.errors import SaferlError
from saferl.io import atomic_write

SIZE = 100_000
"""Transitions of a dataset whose size is not given."""

ADVICE = "set SAFERL_DATA_DIR to a folder that you may write to, with room for the data"


def whole(what: str, value: Any, least: int) -> int:
    """An option that counts; raises `SaferlError` unless it is a whole number of that or more."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise SaferlError(
            f"{what} of a saferl dataset must be a whole number of {least} or more, got {value!r}"
        )
    return int(value)


def show(progress: bool | None) -> bool:
    """Whether to show bars: by default if standard error is a terminal."""
    return sys.stderr.isatty() if progress is None else progress


def generated(
    recipe: dict[str, Any], card: Card, generate: Callable[[], dict[str, Any]]
) -> Dataset:
    """The dataset of a recipe: from the cache, or made by ``generate()`` and kept there.

    ``recipe``: JSON values with ``name``, ``size`` and ``seed``, which name the file in
    ``$SAFERL_DATA_DIR/bundled``, and whatever else decides the data. A file that another recipe
    made, or whose data do not match their fingerprint, is made again and a line says so.

    Raises:
        SaferlError: the folder cannot be written.
    """
    path = data_dir("bundled") / f"{recipe['name']}-{recipe['size']}-seed{recipe['seed']}.npz"
    dataset = _read(path, recipe, card)
    if dataset is None:
        _check_writable(path)  # before, not after a minute's work
        arrays = generate()
        dataset = Dataset.from_arrays(**arrays, card=card)
        meta = {"recipe": recipe, "fingerprint": dataset.fingerprint, "made_with": _versions()}
        # Absent costs stay absent.
        content: dict[str, Any] = {key: array for key, array in arrays.items() if array is not None}
        content["meta"] = json.dumps(meta)
        atomic_write(path, lambda temporary: np.savez(temporary, **content), ADVICE)
    return dataset


def _versions() -> dict[str, str]:
    return {package: version(package) for package in ("saferl", "mujoco", "gymnasium", "torch")}


def _read(path: Path, recipe: dict[str, Any], card: Card) -> Dataset | None:
    """The cached dataset; None if there is none or it must be made again."""
    if not path.exists():
        return None
    try:
        # Opened here because numpy leaves the file of a damaged archive open.
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
            meta = json.loads(str(file["meta"]))
            arrays = {field: file[field] for field in Dataset.FIELDS if field in file.files}
        if meta["recipe"] != recipe:
            reason = "it was made by another recipe"
        else:
            dataset = Dataset.from_arrays(**arrays, card=card)
            if dataset.fingerprint == meta["fingerprint"]:
                return dataset
            reason = "its data do not match its fingerprint"
    except Exception as error:  # a damaged archive raises what its broken bytes happen to cause
        reason = f"it cannot be read ({type(error).__name__})"
    print(f"saferl: generating {path} again: {reason}", file=sys.stderr)
    return None


def _check_writable(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise SaferlError(f"cannot write {path}: {error.strerror or error}; {ADVICE}") from error
