"""V-D4RL (Lu et al. 2023, arXiv:2206.04779): episodes of pixels from dm_control.

``load("main/walker_walk/expert/64px")`` reads the folder of that name under
``$SAFERL_DATA_DIR/vd4rl``; ``load_dataset(folder)`` any other. Two layouts, and every episode of T
steps has T + 1 rows: row 0 is the reset, row t holds what led to image t.

- ``.npz``, an episode each: ``image`` [T+1, H, W, 3] uint8, ``action``, ``reward``, ``discount``,
  ``is_first``, ``is_last``, ``is_terminal`` (V-D4RL's 64 pixels, as DreamerV2 writes them);
- ``.hdf5``, shards: ``observation`` [N, 3, H, W] uint8, ``action``, ``reward``, ``discount``,
  ``step_type`` 0 first, 1 between, 2 last (its 84 pixels).

The dataset's observations are stacks of ``frame_stack`` frames, made when they are read (`Frames`).
Nothing is downloaded: V-D4RL is published on file shares without stable addresses.
"""

from __future__ import annotations

import json
import shutil
import uuid
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from saferl.data.card import Card
from saferl.data.dataset import Dataset
from saferl.data.frames import Frames
from saferl.data.sources.fetch import data_dir
from saferl.data.sources.flat import check_memory
from saferl.errors import SaferlError
from saferl.io import write_text

CARD = "saferl_card.json"  # beside episodes that `save` wrote
NPZ = ("image", "action", "reward", "discount", "is_terminal")
HDF5 = ("observation", "action", "reward", "discount", "step_type")
Rows = dict[str, Any]  # image [T+1, …], action, reward, terminal of one episode


def load(
    id: str = "",
    *,
    path: str | Path | None = None,
    frame_stack: int = 3,
    size: int | None = None,
    clip_actions: bool = False,
    **card_fields: Any,
) -> Dataset:
    """Episodes of a folder (or of one file) as a `Dataset` of pixels.

    Args:
        id: the folder under ``$SAFERL_DATA_DIR/vd4rl``, also the dataset's name.
        path: the folder or file, wherever it is.
        frame_stack: frames in one observation; at the start the first is repeated.
        size: stop at the first whole episode that reaches so many transitions; None: all.

    Raises:
        SaferlError: no such folder, no episodes in it, files that cannot be read or that differ in
            the size of images or actions, too little memory.
    """
    for name, value in (("frame_stack", frame_stack), ("size", 1 if size is None else size)):
        if value < 1:
            raise SaferlError(f"{name} must be 1 or more, got {value}")
    place = data_dir("vd4rl") / id if path is None else Path(path).expanduser()
    files = [place] if place.is_file() else sorted(_episodes_in(place))
    if not files:
        raise SaferlError(
            f"no V-D4RL episodes (.npz or .hdf5) in {place}: put the folder there, or give its "
            "path= (saferl downloads none of them)"
        )
    parts, lengths = [], []  # steps of each episode, one more row
    for file in files:
        for span in _spans(file):
            parts.append((file, span))
            lengths.append(span[1] - span[0] - 1)
            if size is not None and sum(lengths) >= size:
                break
        if size is not None and sum(lengths) >= size:
            break
    if not lengths or min(lengths) < 1:
        short = parts[int(np.argmin(lengths))][0] if parts else place
        raise SaferlError(f"{short} holds an episode without steps: delete it")
    return _assemble(place, id, parts, lengths, frame_stack, clip_actions, card_fields)


def _assemble(place, id, parts, lengths, stack, clip_actions, card_fields) -> Dataset:
    from tqdm import tqdm

    first = next(_read([parts[0]]))
    shape, dim = first["image"].shape[1:], first["action"].shape[1:]
    total = sum(lengths)
    check_memory(place, (total + len(lengths)) * int(np.prod(shape)))
    frames = np.empty((total + len(lengths), *shape), np.uint8)
    actions = np.empty((total, *dim), np.float32)
    rewards, terminals = np.empty(total, np.float32), np.zeros(total, bool)
    begins = np.concatenate([[0], np.cumsum(lengths)])
    bar = tqdm(_read(parts), total=len(parts), desc="reading", unit="episode", disable=None)
    for number, (rows, length) in enumerate(zip(bar, lengths)):
        if rows["image"].shape[1:] != shape or rows["action"].shape[1:] != dim:
            raise SaferlError(
                f"{parts[number][0]}: images {rows['image'].shape[1:]} and actions "
                f"{rows['action'].shape[1:]} differ from {shape} and {dim} of the first episode"
            )
        start = begins[number]
        frames[start + number : start + number + length + 1] = rows["image"]
        part = slice(start, start + length)
        actions[part], rewards[part] = rows["action"][1:], rows["reward"][1:]
        terminals[start + length - 1] = rows["terminal"]
    episode = np.repeat(np.arange(len(lengths)), lengths)
    at = np.arange(total) + episode  # each earlier episode has one frame more than steps
    starts = np.repeat(begins[:-1] + np.arange(len(lengths)), np.array(lengths) + 1)
    timeouts = np.zeros(total, bool)
    timeouts[begins[1:] - 1] = ~terminals[begins[1:] - 1]
    card = _card(place, id, shape, stack)
    try:
        return Dataset.from_arrays(
            Frames(frames, at, starts, stack),
            actions,
            rewards,
            terminals,
            timeouts,
            Frames(frames, at + 1, starts, stack),
            card=card.replace(**card_fields),
            clip_actions=clip_actions,
        )
    except SaferlError as error:
        raise SaferlError(f"{place}: {error}") from None


def _card(place: Path, id: str, shape: tuple[int, ...], stack: int) -> Card:
    saved = (place if place.is_dir() else place.parent) / CARD
    if saved.is_file():
        return Card.from_dict(json.loads(saved.read_text(encoding="utf-8")))
    tasks = ("walker_walk", "cheetah_run", "humanoid_walk")
    folder = place.with_suffix("") if place.is_file() else place
    parts = (*folder.parts, *Path(id).parts)
    names = [part for part in parts if part in tasks]
    if names and not id:  # a folder in the published layout: walker_walk/expert/64px
        id = "/".join(parts[parts.index(names[-1]) :])
    pixels = {64: "pixels", 84: "pixels84"}.get(shape[-1])
    env_id = None
    if names and pixels and stack == 3:
        env_id = f"dmc/{names[-1].replace('_', '-')}-{pixels}-v0"
    return Card(
        id=f"vd4rl/{id}" if id else place.name,
        env_id=env_id,
        action_low=(-1.0,),
        action_high=(1.0,),
        horizon=500 if names else None,
        reference_returns=(0.0, 1000.0) if names else None,
        reference_source="V-D4RL, whose scores are returns / 10" if names else None,
        origin=str(place),
    )


# Reading ----------------------------------------------------------------------------------------


def is_folder_of_episodes(folder: Path) -> bool:
    """Whether files in a folder have V-D4RL's names for their contents."""
    names = _episodes_in(folder)
    return bool(names) and is_file_of_episodes(min(names))


def is_file_of_episodes(path: Path) -> bool:
    """Whether one file has V-D4RL's names for its contents."""
    import h5py

    try:
        if path.suffix.lower() == ".npz":
            with zipfile.ZipFile(path) as file:
                return {f"{key}.npy" for key in NPZ} <= set(file.namelist())
        with h5py.File(path, "r") as file:
            return set(HDF5) <= set(file)
    except (OSError, zipfile.BadZipFile):
        return False


def _episodes_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [p for p in folder.iterdir() if p.suffix.lower() in (".npz", ".hdf5", ".h5")]


def _spans(path: Path) -> list[tuple[int, int]]:
    """(start, stop) of the rows of each episode in a file."""
    import h5py

    try:
        if path.suffix.lower() == ".npz":
            with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
                _require(path, NPZ, file.files)
                return [(0, len(file["reward"]))]
        with h5py.File(path, "r") as file:
            _require(path, HDF5, list(file))
            step_type = np.asarray(file["step_type"]).reshape(-1)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise _unreadable(path, error) from error
    starts, stops = np.flatnonzero(step_type == 0), np.flatnonzero(step_type == 2) + 1
    if not len(starts) or len(starts) != len(stops) or (stops <= starts).any() or (
        starts[1:] != stops[:-1]
    ).any():  # fmt: skip
        raise SaferlError(
            f"{path}: step_type does not run 0, 1 … 1, 2 in every episode: the shard is cut or "
            "shuffled"
        )
    return [(int(a), int(b)) for a, b in zip(starts, stops)]


def _read(parts: list[tuple[Path, tuple[int, int]]]) -> Iterator[Rows]:
    """Each episode, channels first."""
    import h5py

    for path, (start, stop) in parts:
        try:
            if path.suffix.lower() == ".npz":
                with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
                    rows = {key: file[key] for key in NPZ}
                image = np.moveaxis(rows["image"], -1, 1)
                terminal = rows["is_terminal"].reshape(-1)[-1] or rows["discount"][-1] == 0
            else:
                with h5py.File(path, "r") as file:
                    rows = {key: file[key][start:stop] for key in HDF5}
                image, terminal = rows["observation"], rows["discount"][-1] == 0
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise _unreadable(path, error) from error
        if image.ndim != 4 or image.dtype != np.uint8:
            raise SaferlError(f"{path}: images are {image.dtype}{list(image.shape)}, not uint8")
        length = stop - start
        action = np.asarray(rows["action"], np.float32)
        reward = np.asarray(rows["reward"], np.float32).reshape(-1)
        if {len(image), len(action), len(reward)} != {length}:
            raise SaferlError(
                f"{path}: {len(image)} images, {len(action)} actions and {len(reward)} rewards: "
                "an episode has one of each per row"
            )
        yield {
            "image": image,
            "action": action.reshape(length, -1),
            "reward": reward,
            "terminal": bool(terminal),
        }


def _require(path: Path, wanted: tuple[str, ...], present: list[str]) -> None:
    missing = [key for key in wanted if key not in present]
    if missing:
        raise SaferlError(
            f"{path} is no V-D4RL episode: missing {', '.join(missing)}; present: "
            f"{', '.join(present) or 'nothing'}"
        )


def _unreadable(path: Path, error: Exception) -> SaferlError:
    reason = str(error).partition("\n")[0]
    return SaferlError(f"{path} cannot be read ({reason}): delete it and fetch it again")


# Writing ----------------------------------------------------------------------------------------


def save(dataset: Dataset, folder: Path) -> Path:
    """Write the complete episodes of a dataset of frames as .npz, with its card beside them.

    The folder appears when all is written; it must not exist.
    """
    if folder.exists():
        raise SaferlError(f"{folder} exists: name a new folder for the episodes")
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.mkdir(parents=True)
        write_text(temporary / CARD, json.dumps(dataset.card.to_dict()))
        pixels: Any = dataset.observations
        after: Any = dataset.next_observations
        for number, (start, stop) in enumerate(dataset.episodes):
            numbers = [*pixels.at[start:stop], after.at[stop - 1]]
            length = len(numbers)
            action = np.zeros((length, dataset.action_dim), np.float32)
            action[1:] = dataset.actions[start:stop]
            reward, discount = np.zeros(length, np.float32), np.ones(length, np.float32)
            reward[1:] = dataset.rewards[start:stop]
            terminal = np.zeros(length, bool)
            terminal[-1] = dataset.terminals[stop - 1]
            discount[-1] = not terminal[-1]
            place = np.arange(length)
            np.savez_compressed(
                temporary / f"{number:06d}-{uuid.uuid4().hex}-{length}.npz",
                image=np.moveaxis(pixels.frames[numbers], 1, -1),
                action=action,
                reward=reward,
                discount=discount,
                is_first=place == 0,
                is_last=place == length - 1,
                is_terminal=terminal,
            )
        temporary.rename(folder)
    except OSError as error:
        raise SaferlError(
            f"cannot write {folder}: {error.strerror or error}; choose a folder with room"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder
