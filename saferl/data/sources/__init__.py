"""Where datasets come from: one file per format, and the choice between them.

`load_dataset` and `save_dataset` are the two entries; formats do not know each other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from saferl import registry
from saferl.data.dataset import Dataset
from saferl.data.frames import Frames
from saferl.errors import SaferlError, nearest

SUFFIXES = (".hdf5", ".h5", ".npz", ".csv", ".parquet")


def load_dataset(id_or_path: str | Path, **options: Any) -> Dataset:
    """A `Dataset` from an id (``"family/rest"``) or a file (.hdf5, .h5, .npz, .csv, .parquet).

    Families are ``d4rl``, ``minari``, ``dsrl``, ``vd4rl``, ``saferl`` and those that plug-ins
    register. An existing file wins over an id of the same spelling; an id of a family wins over a
    folder (write ``./`` in front of a folder's name to mean the folder).

    Args:
        options: for any source, fields of `Card` that replace the source's own (``env_id=``,
            ``horizon=``, ``reference_returns=``, ``action_low=`` …) and ``clip_actions=True``; for
            tables those of `from_dataframe` (``columns=`` …); for a family those of its
            loader (``path=`` and ``download=`` for d4rl and dsrl).

    Raises:
        SaferlError: an unknown id or file, no network, a damaged file, data that fail validation.
    """
    path, name = Path(id_or_path).expanduser(), str(id_or_path)
    prefix, _, rest = name.partition("/")
    if path.is_file():
        return _load_file(path, options)
    if rest and prefix in registry.names("datasets"):
        return registry.dataset_loader(prefix)(rest, **options)
    if path.is_dir():
        from saferl.data.sources import vd4rl

        if vd4rl.is_folder_of_episodes(path):
            return vd4rl.load(path=path, **options)
        raise SaferlError(f"{name} is a folder: name the file in it ({', '.join(SUFFIXES)})")
    if path.suffix.lower() in SUFFIXES or name.startswith((".", "/", "~")):
        raise SaferlError(f"no such file: {path} (looked from {Path.cwd()})")
    if not rest:
        raise _without_family(name)
    return registry.dataset_loader(prefix)(rest, **options)


def _load_file(path: Path, options: dict[str, Any]) -> Dataset:
    """A file by its suffix; one that D4RL, DSRL or V-D4RL publish gets its card."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise SaferlError(
            f"{path}: cannot tell what {path.suffix or 'a file without a suffix'} holds; "
            f"known: {', '.join(SUFFIXES)}"
        )
    if suffix in (".csv", ".parquet"):
        from saferl.data.sources import tables

        return tables.load(path, **options)
    from saferl.data.sources import d4rl, dsrl, flat, vd4rl

    if vd4rl.is_file_of_episodes(path):
        return vd4rl.load(path=path, **options)
    if suffix != ".npz":
        if id := d4rl.id_of_file(path.name):
            return d4rl.load(id, path=path, **options)
        if id := dsrl.id_of_file(path.name):
            return dsrl.load(id, path=path, **options)
    return flat.load(path, **options)


def save_dataset(dataset: Dataset, path: str | Path) -> Path:
    """Write arrays and card to ``.npz`` or ``.hdf5`` (D4RL's keys); `load_dataset` reads both.

    Written to a temporary name first, so that an interrupted write leaves no half a file. A
    dataset of frames becomes a folder of V-D4RL's episodes.

    Raises:
        SaferlError: another suffix, no room on the disk, or a folder that cannot be written.
    """
    from saferl.data.sources import flat, vd4rl

    frames = isinstance(dataset.observations, Frames)
    return (vd4rl.save if frames else flat.save)(dataset, Path(path))


def _without_family(name: str) -> SaferlError:
    """An id without its family: most often a D4RL or DSRL name as papers print it."""
    from saferl.data.sources import d4rl, dsrl

    known = [*(f"d4rl/{id}" for id in d4rl.ids()), *(f"dsrl/{id}" for id in dsrl.ids())]
    guess = nearest(f"d4rl/{name}", known)
    return SaferlError(
        f"unknown dataset {name!r}: {guess}An id is FAMILY/NAME with a family out of "
        f"{', '.join(registry.names('datasets'))}, or give the path of a file"
    )
