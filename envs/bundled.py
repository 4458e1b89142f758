"""Datasets that the library makes itself: ``load_dataset("saferl/hopper-velocity-mixed-v0")``.

Names are ``{hopper,halfcheetah,walker2d}-velocity-{random,medium,expert,mixed}-v0``. The package
ships small behaviour policies, trained with its own SAC; the first load plays them in the simulator
and keeps the transitions in a cache. The four levels:

- random: uniformly random actions;
- medium: a half-trained policy;
- expert: the policy of highest return, whatever its cost;
- mixed: policies from slow and safe to fast and costly, with medium and random ones, so that both
  returns and costs of the episodes are spread widely.

``{robot}-{expert,medium}-random-{1,5,10,25,50}-v0`` hold whole episodes of that level and of the
random one, drawn with replacement, so many per cent of the rows from the better: `Dataset.mix`.

All policies are sampled, not their most likely action taken, as in D4RL. These are not D4RL's data,
though the robots and the reference returns of the normalised score are.

Behaviours, per robot: ``<robot>.safetensors`` holds P stacked ReLU networks, ``weight.0 [P, O, H]``
and ``bias.0 [P, 1, H]``, ``weight.1`` …, of any float type, from raw observations to mean and log σ
side by side, ``2 A`` numbers; the action is ``tanh(mean + exp(clip(log σ, -5, 2)) · noise)``.
``behaviours.json`` says what they are and which level plays what share of its steps with which:

    {"licence": …, "command": …, "robots": {"hopper": {
        "policies": [{"index": 0, "penalty": 0.0, "step": 300000, "return": …, "cost": …}, …],
        "levels": {"medium": [{"policy": 1, "share": 1.0}],
                   "mixed": [{"policy": 0, "share": 0.9}, {"policy": null, "share": 0.1}], …}}}}

where policy null stands for random actions.
"""

from __future__ import annotations

import hashlib
import json
import sys
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from saferl.data import Card, Dataset
from saferl.errors import SaferlError, unknown

from . import HORIZON
from .generated import SIZE, generated, show, whole

BEHAVIOURS = Path(__file__).parent / "behaviours"
LEVELS = ("random", "medium", "expert", "mixed")


@dataclass(frozen=True)
class _Robot:
    env_id: str
    reference_returns: tuple[float, float]  # D4RL's random and expert return
    action_dim: int  # all bounds are ±1, so tanh gives actions without scaling


ROBOTS = {
    "hopper": _Robot("saferl/HopperVelocity-v0", (-20.272305, 3234.3), 3),
    "halfcheetah": _Robot("saferl/HalfCheetahVelocity-v0", (-280.178953, 12135.0), 6),
    "walker2d": _Robot("saferl/Walker2dVelocity-v0", (1.629008, 4592.3), 6),
}

_IDS = {f"{robot}-velocity-{level}-v0": (robot, level) for robot in ROBOTS for level in LEVELS}
_MIXTURES = {  # name → robot, the better level and its share of the rows
    f"{robot}-{level}-random-{percent}-v0": (robot, level, percent / 100)
    for robot in ROBOTS
    for level in ("expert", "medium")
    for percent in (1, 5, 10, 25, 50)
}


def names() -> list[str]:
    """Names of all datasets, without their ``saferl/``."""
    return [*_IDS, *_MIXTURES]


def ids() -> list[str]:
    """Names of the datasets whose behaviours are here, without their ``saferl/``."""
    try:
        robots = _manifest()["robots"]
    except (SaferlError, KeyError):
        robots = {}

    def has(robot: str, level: str) -> bool:
        return level == "random" or level in robots.get(robot, {}).get("levels", {})

    levels = [name for name, (robot, level) in _IDS.items() if has(robot, level)]
    return levels + [name for name, (robot, level, _) in _MIXTURES.items() if has(robot, level)]


def load(
    name: str,
    size: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
    **overrides: Any,
) -> Dataset:
    """A bundled dataset, generated on first use and cached from then on.

    The rows are whole episodes in random order, of which the last is cut at ``size`` and marked as
    a timeout; the shares of the behaviours hold up to one episode each. The same ``name``, ``size``
    and ``seed`` give the same data on one machine; other processors and versions of mujoco or torch
    round differently.

    A mixture is made of ``size`` transitions of each of its two levels and has up to one episode
    more than ``size``; rows of the better level come first, and exceed their share by up to one
    episode.

    Args:
        name: the id without its ``saferl/``, such as ``"hopper-velocity-mixed-v0"``.
        size: number of transitions, 100 000 by default.
        seed: 0 or more; initial states, action noise and the order of episodes follow from it.
        progress: show bars while generating; by default if standard error is a terminal.
        overrides: fields of the `Card` to replace, and ``clip_actions`` (see `load_dataset`).

    The cache is the folder ``$SAFERL_DATA_DIR/bundled``, or ``~/.cache/saferl/bundled``. A file
    there whose data do not match its fingerprint, or that was made with other behaviours, is
    generated again, which a line on standard error says.

    Raises:
        SaferlError: unknown name or card field, a size below 1, behaviours that are missing or
            damaged, or a cache folder that cannot be written.
    """
    if name not in _IDS and name not in _MIXTURES:
        raise unknown("saferl dataset", name, names())
    size = SIZE if size is None else whole("size", size, 1)
    seed = whole("seed", seed, 0)
    clip = overrides.pop("clip_actions", False)
    if name in _MIXTURES:
        return _mixture(name, size, seed, progress, clip, overrides)
    card = _card(name)
    changed = card.replace(**overrides)

    recipe = {
        "name": name,
        "size": size,
        "seed": seed,
        "mix": [[index, share] for index, share in _mix(*_IDS[name])],
        "behaviours": _behaviours_digest(*_IDS[name]),
    }
    dataset = generated(recipe, card, lambda: _generate(recipe, show(progress)))
    if not clip and changed == card:
        return dataset
    arrays = {field: getattr(dataset, field) for field in Dataset.FIELDS}
    return Dataset.from_arrays(**arrays, card=changed, clip_actions=clip)


def _mixture(
    name: str, size: int, seed: int, progress: bool | None, clip: bool, overrides: dict[str, Any]
) -> Dataset:
    """Episodes of a level and of the random one; both are cached, their mixture is not."""
    robot, level, share = _MIXTURES[name]
    good, bad = (f"{robot}-velocity-{source}-v0" for source in (level, "random"))
    better = _card(good)
    card = better.replace(
        id=f"saferl/{name}",
        origin=f"mixed by saferl from its own saferl/{good} and saferl/{bad}; not D4RL data",
        notes=(
            better.notes[0],
            f"whole episodes, drawn with replacement: the {level} level's until they exceed "
            f"{share:.0%} of the size asked for, then random ones until all exceed it, in this "
            "order (the construction of Hong et al., ICLR 2023)",
            *(f"{level}'s {note}" for note in better.notes[2:]),
        ),
    ).replace(**overrides)
    sources = [load(source, size, seed, progress) for source in (good, bad)]
    mixed = Dataset.mix(sources[0], sources[1], share, seed, size)
    arrays = {field: getattr(mixed, field) for field in Dataset.FIELDS}
    card = card.noted(mixed.card.notes[-1])  # how many rows came from the better level
    return Dataset.from_arrays(**arrays, card=card, clip_actions=clip)


def _card(name: str) -> Card:
    robot, level = _IDS[name]
    facts, bound = ROBOTS[robot], (1.0,) * ROBOTS[robot].action_dim
    return Card(
        id=f"saferl/{name}",
        env_id=facts.env_id,
        action_low=tuple(-b for b in bound),
        action_high=bound,
        horizon=HORIZON,
        reference_returns=facts.reference_returns,
        reference_source="D4RL reference returns",
        licence="Apache-2.0" if level == "random" else _manifest().get("licence", "Apache-2.0"),
        origin="generated by saferl with its own behaviour policies (SAC); not D4RL data",
        notes=(
            "scores use D4RL's reference returns, but published D4RL scores are not comparable: "
            "the data differ",
            "the last episode is cut at the size asked for and marked as a timeout",
            "behaviours: " + "; ".join(_describe(robot, *part) for part in _mix(robot, level)),
        ),
    )


# Behaviours -------------------------------------------------------------------------------------


@cache
def _manifest_at(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / "behaviours.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _incomplete(folder / "behaviours.json", error) from error


def _manifest() -> dict[str, Any]:
    return _manifest_at(BEHAVIOURS)


def _incomplete(path: Path, error: object) -> SaferlError:
    return SaferlError(
        f"the behaviour policies of saferl's datasets are incomplete, reinstall saferl ({path}: "
        f"{error})"
    )


def _mix(robot: str, level: str) -> list[tuple[int | None, float]]:
    """(policy index, or None for random actions; share) of a level, shares summing to 1."""
    if level == "random":
        return [(None, 1.0)]
    try:
        levels = _manifest()["robots"][robot]["levels"]
        parts = [(part["policy"], float(part["share"])) for part in levels[level]]
    except (KeyError, TypeError, ValueError) as error:
        raise _incomplete(BEHAVIOURS / "behaviours.json", f"{robot} {level}: {error!r}") from error
    total = sum(share for _, share in parts)
    return [(index, share / total) for index, share in parts]


def _describe(robot: str, index: int | None, share: float) -> str:
    text = f"{share:.0%} of the steps "
    if index is None:
        return text + "random actions"
    policies = _manifest()["robots"][robot].get("policies", [])
    facts: dict[str, Any] = next(
        (policy for policy in policies if policy.get("index") == index), {}
    )
    known = [f"{k} {facts[k]:g}" for k in ("penalty", "step", "return", "cost") if k in facts]
    return text + f"policy {index}" + (f" ({', '.join(known)})" if known else "")


def _behaviours_digest(robot: str, level: str) -> str:
    """SHA-256 of the robot's weights; empty for random data, which do without."""
    if level == "random":
        return ""
    path = BEHAVIOURS / f"{robot}.safetensors"
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise _incomplete(path, error.strerror) from error


class Behaviour:
    """One of the stacked policies: a tanh-Gaussian actor on raw observations, of one member."""

    members = 1

    def __init__(self, robot: str, index: int):
        from safetensors.torch import load_file

        path = BEHAVIOURS / f"{robot}.safetensors"
        try:
            tensors = load_file(path)
            count = sum(key.startswith("weight.") for key in tensors)
            # Slices [1, in, out] and [1, 1, out]: the member axis stays.
            self.layers = [
                tuple(
                    tensors[f"{kind}.{i}"][index : index + 1].float() for kind in ("weight", "bias")
                )
                for i in range(count)
            ]
            if not 0 <= index < len(tensors["weight.0"]):
                raise IndexError(f"no policy {index}")
        except Exception as error:  # safetensors raises a type of its own, which differs by version
            raise _incomplete(path, error) from error

    def _head(self, observations):
        x = observations
        for i, (weight, bias) in enumerate(self.layers):
            x = (x.relu() if i else x) @ weight + bias
        mean, log_std = x.chunk(2, -1)
        return mean, log_std.clamp(-5.0, 2.0)

    def __call__(self, observations):
        """Most likely actions: tensor ``[1, B, O]`` to ``[1, B, A]`` in [-1, 1]."""
        return self._head(observations)[0].tanh()

    def sample(self, observations, random):
        """Actions drawn with ``random``, a `MemberRandom` of one seed."""
        mean, log_std = self._head(observations)
        return (mean + log_std.exp() * random.normal(*mean.shape[1:])).tanh()


# Generation -------------------------------------------------------------------------------------


def _generate(recipe: dict[str, Any], progress: bool) -> dict[str, np.ndarray]:
    """Arrays of `Dataset` for a recipe."""
    import torch

    from saferl.evaluation import collect_transitions

    name, size = recipe["name"], recipe["size"]
    robot = _IDS[name][0]
    counts = _apportion(size, [share for _, share in recipe["mix"]])
    if progress:
        print(f"making {name}: {size} transitions, kept for the next time", file=sys.stderr)
    runs, threads = [], torch.get_num_threads()
    # Sums over several threads round differently, and a handful of rows is faster on one.
    torch.set_num_threads(1)
    try:
        for part, ((index, _), steps) in enumerate(zip(recipe["mix"], counts)):
            if steps == 0:
                continue
            # A stream of its own for each dataset, seed and part.
            key = [zlib.crc32(name.encode()), recipe["seed"], part]
            runs.append(
                collect_transitions(
                    None if index is None else Behaviour(robot, index),
                    ROBOTS[robot].env_id,
                    steps,
                    int(np.random.SeedSequence(key).generate_state(1)[0]),
                    stochastic=index is not None,
                    # Long episodes run side by side; no more of them than there are rows for.
                    envs=min(16, -(-steps // HORIZON)),
                    progress=progress,
                )
            )
    finally:
        torch.set_num_threads(threads)
    arrays = {field: np.concatenate([run[field] for run in runs]) for field in Dataset.FIELDS}
    stops = np.flatnonzero(arrays["terminals"] | arrays["timeouts"]) + 1
    spans = np.stack([np.concatenate([[0], stops[:-1]]), stops], 1)
    np.random.default_rng(recipe["seed"]).shuffle(spans)
    rows = np.concatenate([np.arange(start, stop) for start, stop in spans])[:size]
    arrays = {field: array[rows] for field, array in arrays.items()}
    arrays["timeouts"][-1] = not arrays["terminals"][-1]
    return arrays


def _apportion(size: int, shares: list[float]) -> list[int]:
    """``size`` split by shares into whole numbers (largest remainders)."""
    exact = size * np.asarray(shares)
    counts = np.floor(exact).astype(int)
    counts[np.argsort(counts - exact, kind="stable")[: size - counts.sum()]] += 1
    return counts.tolist()
