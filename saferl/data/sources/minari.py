"""Minari: local and remote datasets in, any `Dataset` out.

Costs travel in ``infos["cost"]``, which has one entry more than the episode has steps (the first
belongs to the reset). Dictionary and tuple observations are flattened as
``gymnasium.spaces.flatten`` does: keys in the order of the space, each part flattened, one-hot for
``Discrete``; so pointmaze is achieved_goal, desired_goal, observation. Evaluate with
``gymnasium.wrappers.FlattenObservation``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import warnings
from typing import Any

import numpy as np

from saferl.data.card import Card
from saferl.data.dataset import Dataset
from saferl.data.sources import fetch
from saferl.errors import SaferlError, nearest
from saferl.spec import action_levels

_MAZES = [f"pointmaze/{m}{d}" for m in ("open", "umaze", "medium", "large") for d in ("", "-dense")]
_HANDS = [
    f"{hand}/{level}"
    for hand in ("door", "hammer", "pen", "relocate")
    for level in ("human", "cloned", "expert")
]
_KITCHEN = [f"kitchen/{level}" for level in ("complete", "mixed", "partial")]
_ROBOTS = [
    f"mujoco/{robot}/{level}-v0"
    for robot in ("hopper", "halfcheetah", "walker2d")
    for level in ("simple", "medium", "expert")
]
PUBLISHED = [*(f"D4RL/{name}-v2" for name in _MAZES + _HANDS + _KITCHEN), *_ROBOTS]
"""Some ids of the public server, to guess what a mistyped one meant."""


def load(
    source: Any,
    *,
    download: bool = True,
    cost_key: str = "cost",
    clip_actions: bool = False,
    **card_fields: Any,
) -> Dataset:
    """A Minari dataset.

    ``MultiDiscrete`` and ``MultiBinary`` actions become one integer, the first number slowest,
    where ``action_levels`` is given: the levels of each number.

    Args:
        source: an id such as ``D4RL/door/human-v2``, or a ``MinariDataset``. An id is looked for
            under ``MINARI_DATASETS_PATH`` (default ``~/.minari/datasets``), then downloaded.
        download: False refuses to use the network.
        cost_key: the entry of ``infos`` that holds costs; without it the dataset has none.

    Raises:
        SaferlError: an unknown id, no network (within 5 s), spaces that are not supported, and what
            `Dataset.from_arrays` refuses.
    """
    dataset = _open(source, download) if isinstance(source, str) else source
    if not hasattr(dataset, "iterate_episodes"):
        raise SaferlError(
            f"from_minari takes an id or a MinariDataset, got {type(source).__name__}"
        )
    card = _card(dataset)
    levels = card_fields.get("action_levels", card.action_levels)
    arrays = _arrays(dataset, cost_key, levels)
    card_fields.pop("action_start", None)  # the space says, and `_arrays` has taken it off
    return Dataset.from_arrays(
        **arrays, card=card.replace(**card_fields), clip_actions=clip_actions
    )


def _open(id: str, download: bool) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # minari's own
        import minari
        from minari.storage.datasets_root_dir import get_dataset_path

        try:
            minari.dataset.minari_dataset.parse_dataset_id(id)
        except (TypeError, ValueError):
            raise SaferlError(
                f"malformed Minari id {id!r}: it is NAMESPACE/NAME-vN, as in D4RL/door/human-v2"
            ) from None
        path = get_dataset_path(id)
        try:
            if not (path / "data").exists():
                _fetch(minari, id, path, download)
            return minari.load_dataset(id)
        except SaferlError:
            raise
        except Exception as error:  # h5py, json and minari raise many kinds on damaged files
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise SaferlError(f"{path} is not a readable Minari dataset: {reason}") from None


def _fetch(minari: Any, id: str, path: Any, download: bool) -> None:
    local = minari.list_local_datasets()
    guess = "" if id in PUBLISHED else nearest(id, {*PUBLISHED, *local})
    if not download:
        raise SaferlError(f"Minari dataset {id!r} is not at {path}: {guess}Allow the download")
    remote = os.environ.get("MINARI_REMOTE", "hf://farama-minari")
    url = "https://storage.googleapis.com"
    if remote.startswith("hf://"):
        url = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        module, extra = "huggingface_hub", "hf"
    else:
        module, extra = "google.cloud.storage", "gcp"
    reason = fetch.unreachable(url)
    if reason:
        raise SaferlError(
            f"Minari dataset {id!r} is not at {path} and {url} cannot be reached ({reason}): "
            f"{guess}Copy the dataset's folder there from a machine with a network"
        )
    if importlib.util.find_spec(module.split(".")[0]) is None:
        raise SaferlError(f"downloading {id} needs {module}: pip install 'minari[{extra}]'")
    try:
        minari.download_dataset(id)
    except Exception as error:  # each remote has exceptions of its own
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise SaferlError(f"Minari could not download {id!r} to {path}: {guess}{reason}") from None


def _card(dataset: Any) -> Card:
    metadata = dataset.storage.metadata
    if "saferl_card" in metadata:
        return Card.from_dict(json.loads(metadata["saferl_card"]))
    spec = getattr(dataset, "_eval_env_spec", None) or dataset.env_spec
    notes = []
    if spec is not None and spec.kwargs:
        notes.append(f"the environment was made with {spec.kwargs}: {spec.id} alone may differ")
    if _composite(dataset.observation_space):
        notes.append("observations flattened as gymnasium.spaces.flatten does")
    if dataset.id.startswith("mujoco/"):
        notes.append("re-collected by Minari on -v5 environments: not D4RL's v2 data or scores")
    low, high = metadata.get("ref_min_score"), metadata.get("ref_max_score")
    card = Card(
        id=f"minari/{dataset.id}",
        env_id=None if spec is None else spec.id,
        horizon=None if spec is None else spec.max_episode_steps,
        reference_returns=None if None in (low, high) else (low, high),
        reference_source=None if None in (low, high) else "Minari",
        origin=f"Minari {dataset.id}",
        notes=tuple(notes),
    )
    space = dataset.action_space
    if isinstance(getattr(space, "n", None), (int, np.integer)) and hasattr(space, "start"):
        return card.replace(n_actions=int(space.n), action_start=int(space.start))
    if not hasattr(space, "low"):
        return card  # `_arrays` refuses it
    low, high = np.ravel(space.low), np.ravel(space.high)
    if np.isfinite(low).all() and np.isfinite(high).all():
        return card.replace(action_low=low, action_high=high)
    return card


def _composite(space: Any) -> bool:
    from gymnasium import spaces

    return isinstance(space, (spaces.Dict, spaces.Tuple))


def _parts(space: Any) -> list[tuple[Any, Any]]:
    return list(space.items() if hasattr(space, "items") else enumerate(space.spaces))


def _width(space: Any) -> int:
    from gymnasium import spaces

    if _composite(space):
        return sum(_width(part) for _, part in _parts(space))
    if isinstance(space, (spaces.Box, spaces.Discrete)):
        return spaces.flatdim(space)
    raise SaferlError(f"observation space {space} is not supported: Box, Discrete, Dict or Tuple")


def _flatten(space: Any, values: Any) -> np.ndarray:
    """``[T, width]`` of the stacked observations of one episode."""
    if _composite(space):
        parts = [_flatten(part, values[key]) for key, part in _parts(space)]
        return np.concatenate(parts, axis=1)
    values = np.asarray(values)
    if hasattr(space, "n"):
        return np.eye(int(space.n), dtype=np.float32)[values - int(space.start)]
    return values.reshape(len(values), -1).astype(np.float32, copy=False)


def _arrays(dataset: Any, cost_key: str, levels: Any) -> dict[str, Any]:
    from gymnasium import spaces

    space, actions_space = dataset.observation_space, dataset.action_space
    several = isinstance(actions_space, (spaces.MultiDiscrete, spaces.MultiBinary))
    if several:
        found = action_levels(actions_space)
        if levels is None or tuple(np.ravel(levels).tolist()) != found:
            raise SaferlError(
                f"action space {actions_space} has several numbers per action: pass "
                f"action_levels={found} to make one integer of each combination"
            )
    elif not isinstance(actions_space, (spaces.Box, spaces.Discrete)):
        raise SaferlError(
            f"action space {actions_space} is not supported: Box, Discrete, MultiDiscrete or "
            "MultiBinary only"
        )
    n = dataset.total_steps
    pixels = isinstance(space, spaces.Box) and space.dtype == np.uint8 and len(space.shape) > 1
    shape = space.shape if pixels else (_width(space),)
    kind = np.uint8 if pixels else np.float32
    discrete = several or isinstance(actions_space, spaces.Discrete)
    action_shape = tuple(actions_space.shape or ()) and (int(np.prod(actions_space.shape or ())),)
    out: dict[str, Any] = {
        "observations": np.empty((n, *shape), kind),
        "next_observations": np.empty((n, *shape), kind),
        "actions": np.empty((n, *action_shape), np.int64 if discrete else np.float32),
        "rewards": np.empty(n, np.float32),
        "terminals": np.empty(n, bool),
        "timeouts": np.empty(n, bool),
        "costs": np.empty(n, np.float32),
    }
    # Of `Discrete` one number, of `MultiDiscrete` one for each.
    offset = np.ravel(getattr(actions_space, "start", 0)) if discrete else 0
    with_costs, start = [], 0
    for episode in dataset.iterate_episodes():
        stop = start + len(episode)
        if stop == start:
            continue
        states = episode.observations
        states = np.asarray(states) if pixels else _flatten(space, states)
        out["observations"][start:stop] = states[:-1]
        out["next_observations"][start:stop] = states[1:]
        actions = np.asarray(episode.actions)
        out["actions"][start:stop] = actions.reshape(stop - start, *action_shape) - offset
        out["rewards"][start:stop] = episode.rewards
        out["terminals"][start:stop] = episode.terminations
        out["timeouts"][start:stop] = episode.truncations
        costs = (episode.infos or {}).get(cost_key)
        with_costs.append(costs is not None)
        if costs is not None:
            out["costs"][start:stop] = np.asarray(costs).reshape(-1)[-(stop - start) :]
        # Rows of two episodes must not run together; only the data's last episode may stay open.
        if stop < n and not out["terminals"][stop - 1]:
            out["timeouts"][stop - 1] = True
        start = stop
    if not start:
        raise SaferlError(f"Minari dataset {dataset.id} has no steps")
    if any(with_costs) and not all(with_costs):
        raise SaferlError(
            f"{with_costs.count(False)} of {len(with_costs)} episodes of {dataset.id} have no "
            f"infos[{cost_key!r}]: costs must be in all episodes or in none"
        )
    if not any(with_costs):
        out["costs"] = None
    return out


def export(dataset: Dataset, id: str, **options: Any) -> Any:
    """Write a `Dataset` to the local Minari store and return the ``MinariDataset``.

    The card travels along, so that ``load_dataset("minari/" + id)`` gives the same dataset back.
    Episodes are stored as T+1 observations, so ``next_observations`` must be the next row inside an
    episode. ``options`` go to ``minari.create_dataset_from_buffers`` (author, description …).

    Raises:
        SaferlError: an id that exists or is malformed; successors that are not the next row.
    """
    import gymnasium

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # minari asks for author, description … as warnings
        import minari
        from minari.data_collector import EpisodeBuffer

        inside = ~(dataset.terminals | dataset.timeouts)[:-1]
        follow = (dataset.next_observations[:-1][inside], dataset.observations[1:][inside])
        if not np.array_equal(*follow):
            raise SaferlError(
                f"{dataset.card.id} cannot be written to Minari: next_observations differ from the "
                "next row inside an episode, and Minari keeps one sequence of states per episode"
            )
        pixels = dataset.observations.dtype == np.uint8
        low, high, kind = (0, 255, np.uint8) if pixels else (-np.inf, np.inf, np.float32)
        shape = dataset.observations.shape[1:]
        options.setdefault("observation_space", gymnasium.spaces.Box(low, high, shape, kind))
        actions: Any
        if dataset.discrete:
            actions = gymnasium.spaces.Discrete(int(dataset.action_dim))
        else:
            card = dataset.card
            least, most = (np.array(b, np.float32) for b in (card.action_low, card.action_high))
            actions = gymnasium.spaces.Box(least, most, dtype=np.float32)
        options.setdefault("action_space", actions)
        options.setdefault("jpeg_encoding", False)  # JPEG would change the pixels
        spans = [tuple(span) for span in dataset.episodes.tolist()]
        if dataset.fragment is not None:
            spans.append(dataset.fragment)
        buffers: list[Any] = []
        for start, stop in spans:
            part = slice(start, stop)
            states = (dataset.observations[part], dataset.next_observations[stop - 1 : stop])
            infos = {}
            if dataset.costs is not None:
                infos["cost"] = np.concatenate([np.zeros(1, np.float32), dataset.costs[part]])
            buffers.append(
                EpisodeBuffer(
                    id=len(buffers),
                    observations=np.concatenate(states),
                    actions=dataset.actions[part],
                    rewards=dataset.rewards[part],
                    terminations=dataset.terminals[part],
                    truncations=dataset.timeouts[part],
                    infos=infos,
                )
            )
        try:
            written = minari.create_dataset_from_buffers(id, buffers, **options)
        except Exception as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise SaferlError(f"cannot write Minari dataset {id!r}: {reason}") from None
        extra: dict[str, Any] = {"saferl_card": json.dumps(dataset.card.to_dict())}
        if dataset.card.reference_returns is not None:
            low, high = dataset.card.reference_returns
            extra |= {"ref_min_score": low, "ref_max_score": high}
        if dataset.card.env_id in gymnasium.registry:
            extra["env_spec"] = gymnasium.spec(dataset.card.env_id).to_json()
        written.storage.update_metadata(extra)
        return minari.load_dataset(id)
