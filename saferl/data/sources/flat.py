"""Flat files with D4RL's keys, HDF5 and npz: read, and written with the dataset's card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from saferl.data.card import Card
from saferl.data.dataset import Dataset
from saferl.data.validate import REQUIRED
from saferl.errors import SaferlError
from saferl.io import atomic_write, free_memory

OPTIONAL = ("timeouts", "next_observations", "costs")


def read_hdf5(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any] | None]:
    """Arrays of a flat HDF5 file (D4RL, DSRL, `Dataset.save`) and the card if one was saved.

    Floats are converted to float32 while they are read. Other keys (``infos/*``, ``metadata/*``)
    are not read. Raises `SaferlError` for a missing file, missing keys (naming those present), a
    truncated or foreign file, and data that do not fit into memory.
    """
    import h5py

    if not path.is_file():
        raise SaferlError(f"{path} does not exist: give the path of an HDF5 file")
    try:
        with h5py.File(path, "r") as file:
            keys: list[str] = []
            file.visititems(lambda k, v: keys.append(k) if isinstance(v, h5py.Dataset) else None)
            missing = [key for key in REQUIRED if key not in keys]
            if missing:
                listed = ", ".join(keys[:12]) + (", …" if len(keys) > 12 else "")
                minari = (
                    " (a Minari file: load it by its id, minari/…)" if "episode_0" in file else ""
                )
                raise SaferlError(
                    f"{path}: missing keys {', '.join(missing)}; "
                    f"present: {listed or 'none'}{minari}"
                )
            wanted = [key for key in (*REQUIRED, *OPTIONAL) if key in keys]
            need = sum(4 * file[key].size for key in wanted)
            check_memory(path, need)
            arrays = {key: _read(file[key]) for key in wanted}
            card = file.attrs.get("saferl_card")
    except (OSError, RuntimeError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        raise SaferlError(
            f"{path} is truncated or not an HDF5 file ({reason}): delete it and fetch it again"
        ) from None
    return arrays, None if card is None else json.loads(card)


def _read(dataset: Any) -> np.ndarray:
    if dataset.dtype.kind != "f" or dataset.dtype == np.float32:
        return dataset[()]
    array = np.empty(dataset.shape, np.float32)
    if array.size:
        dataset.read_direct(array)  # HDF5 converts in small pieces
    return array


def check_memory(path: Path, need: int) -> None:
    """Raises `SaferlError` where so many bytes are not available."""
    free = free_memory()
    if need > free:
        raise SaferlError(
            f"{path} needs {need / 1e9:.1f} GB of memory but {free / 1e9:.1f} GB are available: "
            "close other programs or cut the file"
        )


def from_file(path: Path, arrays: dict, card: Card, clip: bool, card_fields: dict) -> Dataset:
    """`Dataset.from_arrays` with the file named in what goes wrong."""
    try:
        return Dataset.from_arrays(**arrays, card=card, clip_actions=clip, **card_fields)
    except SaferlError as error:
        raise SaferlError(f"{path}: {error}") from None


def read_npz(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any] | None]:
    """Arrays of an ``.npz`` file with D4RL's keys and the card if one was saved."""
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [key for key in REQUIRED if key not in file.files]
            if missing:
                raise SaferlError(
                    f"{path}: missing keys {', '.join(missing)}; present: "
                    f"{', '.join(file.files) or 'none'}"
                )
            arrays = {key: file[key] for key in (*REQUIRED, *OPTIONAL) if key in file.files}
            card = str(file["card"]) if "card" in file.files else None
    except SaferlError:
        raise
    except Exception as error:  # zipfile, zlib, pickle and numpy each have their own
        reason = str(error).partition("\n")[0]
        raise SaferlError(f"{path} is not a readable .npz file ({reason})") from None
    return arrays, None if card is None else json.loads(card)


def load(path: Path, *, clip_actions: bool = False, **card_fields: Any) -> Dataset:
    """A ``.hdf5``, ``.h5`` or ``.npz`` file with D4RL's keys."""
    arrays, saved = read_npz(path) if path.suffix.lower() == ".npz" else read_hdf5(path)
    card = Card(path.name, origin=str(path)) if saved is None else Card.from_dict(saved)
    return from_file(path, arrays, card, clip_actions, card_fields)


def save(dataset: Dataset, path: Path) -> Path:
    """Write arrays and card to ``.npz`` or ``.hdf5``; see `saferl.data.save_dataset`."""
    if path.suffix.lower() not in (".npz", ".hdf5", ".h5"):
        raise SaferlError(f"cannot write {path}: name it .npz or .hdf5")
    arrays = {name: getattr(dataset, name) for name in Dataset.FIELDS}
    arrays = {name: array for name, array in arrays.items() if array is not None}
    card = json.dumps(dataset.card.to_dict())
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if dataset.nbytes > free:
        raise SaferlError(
            f"{path} needs {dataset.nbytes / 1e6:.0f} MB but {free / 1e6:.0f} MB are free"
        )

    def write(temporary: Path) -> None:
        if path.suffix.lower() == ".npz":
            np.savez(temporary, **arrays, card=np.array(card))
        else:
            import h5py

            with h5py.File(temporary, "w") as file:
                for name, array in arrays.items():
                    file.create_dataset(name, data=array)
                file.attrs["saferl_card"] = card

    atomic_write(path, write)
    return path
