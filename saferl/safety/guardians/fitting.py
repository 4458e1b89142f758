"""Guardians of a dataset: fitted to some of its episodes, calibrated by others."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from saferl.data.dataset import Dataset
from saferl.data.frames import Frames
from saferl.errors import SaferlError
from saferl.safety.guardians import Guardian, make_guardian


def split(dataset: Dataset, share: float) -> tuple[Dataset, Dataset]:
    """Training and calibration episodes, the same for every member and run.

    Raises:
        SaferlError: a share outside (0, 1), or fewer than two episodes.
    """
    if not 0 < share < 1:
        raise SaferlError(f"calibration = {share} is not in (0, 1): 0.2 keeps a fifth aside")
    count = len(dataset.episodes)
    if count < 2:
        raise SaferlError(
            f"{dataset.card.id} has {count} complete episode(s): two are needed, one to learn from "
            "and one to calibrate on"
        )
    order = np.random.default_rng(0).permutation(count)
    held = min(max(1, round(share * count)), count - 1)
    return (
        dataset.subset(episodes=np.sort(order[held:])),
        dataset.subset(episodes=np.sort(order[:held])),
    )


def guardian_for(name: str, spec: Any, levels: tuple[int, ...] = (), **settings: Any) -> Guardian:
    """A guardian of the task's kind of actions.

    Args:
        spec: a `Spec` or `Dataset`.
        levels: numbers of levels of the factors of a discrete action, slowest first; empty: the
            actions have no order.
        settings: of `make_guardian`.

    Raises:
        SaferlError: levels that make another number of actions than the task's; what
            `make_guardian` raises.
    """
    chosen: dict[str, Any] = {}
    if spec.discrete:
        if levels and math.prod(levels) != spec.action_dim:
            raise SaferlError(
                f"levels = {','.join(map(str, levels))} make {math.prod(levels)} actions, but the "
                f"task has {spec.action_dim}: give the number of levels of each factor"
            )
        chosen = {"n_actions": levels or spec.action_dim}
        chosen["action_encoding"] = "levels" if levels else "onehot"
    return make_guardian(name, **chosen | settings)


def fit_guardian(
    guardian: Guardian,
    train: Dataset,
    held: Dataset,
    alpha: float,
    say: Callable[[str], None],
    most: int | None = None,
) -> None:
    """Fit to the episodes of one `Dataset` and set the threshold by those of another.

    ``most``: rows of either that are looked at, evenly spaced; all of them where None.

    With G held-out episodes no level below 1/(G+1) can be had; the next possible one is then taken,
    which flags more, and said.
    """
    count = len(held.episodes)
    least = 1 / (count + 1)
    if 0 < alpha < least:
        say(
            f"warning: alpha = {alpha:g} needs {int(np.ceil(1 / alpha)) - 1} calibration episodes "
            f"but there are {count}: the guardian takes {least:.3g} and flags more"
        )
        alpha = least
    seen, asked = (slice(None, None, -(-len(d) // (most or len(d)))) for d in (train, held))
    guardian.fit(
        flat(train.observations[seen]),
        train.actions[seen],
        groups=train.episode_ids()[seen],
        next_observations=flat(train.next_observations[seen]),
    )
    others = held.episode_ids()[asked] + len(train.episodes)  # no number of theirs was fitted
    guardian.calibrate(flat(held.observations[asked]), held.actions[asked], alpha, others)
    rows = len(guardian.rows)
    say(
        f"guardian: {type(guardian).__name__} of {rows} rows, alpha {alpha:.3g} by {count} "
        f"episodes, threshold {float(guardian.threshold):.4g}"
    )


def flat(observations: np.ndarray | Frames) -> np.ndarray:
    """Observations ``[N, *O]`` as float32 rows ``[N, O]``."""
    return np.asarray(observations, np.float32).reshape(len(observations), -1)
