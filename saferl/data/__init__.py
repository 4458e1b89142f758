"""Logged decisions: `Dataset`, its card, and `load_dataset` for every source.

from saferl.data import load_dataset
dataset = load_dataset("d4rl/hopper-medium-v2")
dataset = load_dataset("patients.csv", columns={"observations": ["age", "bp"], ...})
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from saferl import registry
from saferl.data.card import Card
from saferl.data.dataset import Dataset
from saferl.errors import SaferlError, nearest

__all__ = ["Card", "Dataset", "load_dataset"]

SUFFIXES = (".hdf5", ".h5", ".npz", ".csv", ".parquet")


def load_dataset(id_or_path: str | Path, **options: Any) -> Dataset:
    """A `Dataset` from an id (``"family/rest"``) or a file (.hdf5, .h5, .npz, .csv, .parquet).

    Families are ``d4rl``, ``minari``, ``dsrl``, ``vd4rl``, ``saferl`` and those that plug-ins
    register. An existing file, or folder of V-D4RL's episodes, wins over an id of the same
    spelling.

    Args:
        options: for any source, fields of `Card` that replace the source's own (``env_id=``,
            ``horizon=``, ``reference_returns=``, ``action_low=`` …) and ``clip_actions=True``; for
            tables those of `Dataset.from_dataframe` (``columns=`` …); for a family those of its
            loader (``path=`` and ``download=`` for d4rl and dsrl).

    Raises:
        SaferlError: an unknown id or file, no network, a damaged file, data that fail validation.
    """
    path = Path(id_or_path).expanduser()
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise SaferlError(
                f"{path}: cannot tell what {path.suffix or 'a file without a suffix'} holds; "
                f"known: {', '.join(SUFFIXES)}"
            )
        if path.suffix.lower() in (".csv", ".parquet"):
            from saferl.data import tables

            return tables.load(path, **options)
        from saferl.data import files

        return files.load(path, **options)
    name = str(id_or_path)
    if path.is_dir():
        from saferl.data import vd4rl

        if vd4rl.is_folder_of_episodes(path):
            return vd4rl.load(path=path, **options)
        raise SaferlError(f"{name} is a folder: name the file in it ({', '.join(SUFFIXES)})")
    if path.suffix.lower() in SUFFIXES or name.startswith((".", "/", "~")):
        raise SaferlError(f"no such file: {path} (looked from {Path.cwd()})")
    prefix, _, rest = name.partition("/")
    if not rest:
        raise _without_family(name)
    return registry.dataset_loader(prefix)(rest, **options)


def _without_family(name: str) -> SaferlError:
    """An id without its family: most often a D4RL or DSRL name as papers print it."""
    from saferl.data import d4rl, dsrl

    known = [*(f"d4rl/{id}" for id in d4rl.ids()), *(f"dsrl/{id}" for id in dsrl.ids())]
    guess = nearest(f"d4rl/{name}", known)
    return SaferlError(
        f"unknown dataset {name!r}: {guess}An id is FAMILY/NAME with a family out of "
        f"{', '.join(registry.names('datasets'))}, or give the path of a file"
    )
