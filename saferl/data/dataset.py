"""`Dataset`: an immutable set of transitions and the card that says what they are.

    observations [N, *O]  actions [N, A] | [N]  rewards [N]  costs [N] | None
    next_observations [N, *O]  terminals [N]  timeouts [N]

``terminals`` stop bootstrapping; ``timeouts`` end an episode and do not. Costs are in the user's
units; absent costs are None, never zeros.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from saferl.data import validate
from saferl.data.card import Card
from saferl.data.frames import Frames, blocks, is_image, nbytes, take
from saferl.errors import SaferlError
from saferl.spec import Spec, Units

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class Dataset:
    """Immutable transitions and their `Card`. Made by `from_arrays` and `load_dataset`.

    Attributes:
        observations, next_observations: ``[N, *O]`` float32, or uint8 for pixels; `Frames` where
            single frames are held and stacked on reading.
        actions: ``[N, A]`` float32, or ``[N]`` int64 when discrete.
        rewards: ``[N]`` float32. costs: ``[N]`` float32, or None where there are none.
        terminals, timeouts: ``[N]`` bool, never both at one row.
        card: the `Card`. problems: what the validator found and did not refuse.

    The arrays are read-only views: a caller's own array of the right type is not copied, so do not
    write to it afterwards.
    """

    observations: np.ndarray | Frames
    actions: np.ndarray
    rewards: np.ndarray
    costs: np.ndarray | None
    next_observations: np.ndarray | Frames
    terminals: np.ndarray
    timeouts: np.ndarray

    FIELDS = ("observations", "actions", "rewards", "costs", "next_observations", "terminals",
              "timeouts")  # fmt: skip

    def __init__(
        self,
        observations: np.ndarray | Frames,
        actions: np.ndarray,
        rewards: np.ndarray,
        terminals: np.ndarray,
        timeouts: np.ndarray,
        next_observations: np.ndarray | Frames,
        costs: np.ndarray | None = None,
        card: Card | None = None,
        problems: Sequence[str] = (),
    ):
        """Arrays that are prepared and checked already; users call `from_arrays`."""
        values = locals()
        for name in self.FIELDS:
            array = values[name]
            if array is not None:
                array = array.view()
                array.flags.writeable = False
            setattr(self, name, array)
        self.card = card or Card()
        self.problems = tuple(problems)

    # Sources -----------------------------------------------------------------------------------

    @classmethod
    def from_arrays(
        cls,
        observations: Any,
        actions: Any,
        rewards: Any,
        terminals: Any,
        timeouts: Any = None,
        next_observations: Any = None,
        costs: Any = None,
        *,
        card: Card | None = None,
        clip_actions: bool = False,
        **card_fields: Any,
    ) -> Dataset:
        """Validated transitions from arrays of N rows in the order in which they happened.

        Args:
            observations: ``[N, *O]``; float32 in the dataset unless uint8.
            actions: ``[N, A]`` floats, or ``[N]`` (or ``[N, 1]``) integers for discrete actions,
                which count from ``action_start`` (0; in the dataset always from 0). ``[N, K]``
                integers become one integer where ``action_levels`` says how many levels each
                column has: the first column is the slowest.
            rewards, costs: ``[N]`` or ``[N, 1]``. ``costs=None``: there are no costs.
            terminals, timeouts: ``[N]`` of 0/1. ``timeouts=None`` means every ``horizon``-th step
                of an episode where a horizon is given, and none otherwise.
            next_observations: None takes the next row; timeout rows then have no successor and are
                left out as D4RL's ``qlearning_dataset`` does (their predecessor becomes the
                timeout), and so is a last row without an end. At a terminal row, whose successor
                nothing may read, the row's own observation stands in.
            card: what is known about the data; ``card_fields`` replace single fields of it.
                Without ``action_low``/``action_high`` the bounds are those of the data.
            clip_actions: clip actions outside the bounds instead of refusing them.

        Raises:
            SaferlError: lengths that differ, values that are not finite, actions out of bounds, no
                episode end at all. What is merely suspicious goes to ``problems``.
        """
        card = (card or Card("arrays")).replace(**card_fields)
        arrays = dict(
            observations=observations,
            actions=actions,
            rewards=rewards,
            terminals=terminals,
            timeouts=timeouts,
            next_observations=next_observations,
            costs=costs,
        )
        # Of a card alone, the arrays are those of a dataset and count from 0 already.
        start = card_fields.get("action_start", 0)
        arrays, facts, notes, problems = validate.prepare(arrays, card, clip_actions, start)
        return cls(**arrays, card=card.replace(**facts).noted(*notes), problems=problems)

    # Sizes and episodes ------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.rewards)

    def __repr__(self) -> str:
        costs = "no costs" if self.costs is None else "costs"
        return (
            f"Dataset({self.card.id!r}, {len(self)} rows, {len(self.episodes)} episodes, {costs})"
        )

    def _arrays(self) -> dict[str, np.ndarray]:
        arrays = {name: getattr(self, name) for name in self.FIELDS}
        return {name: array for name, array in arrays.items() if array is not None}

    @property
    def discrete(self) -> bool:
        """True where an action is one integer."""
        return self.actions.dtype.kind == "i"

    @property
    def observation_dim(self) -> int:
        """Numbers in one flattened observation."""
        return int(np.prod(self.observations.shape[1:], dtype=int))

    @property
    def action_dim(self) -> int:
        """Components of a continuous action, or the number of discrete actions."""
        return int(self.card.n_actions or 0) if self.discrete else self.actions.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes that the arrays occupy."""
        return nbytes(self._arrays().values())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of names, types, shapes and contents of the arrays, without the card."""
        digest = hashlib.sha256()
        for name, array in self._arrays().items():
            digest.update(f"{name}{array.dtype.str}{array.shape}".encode())
            for block in blocks(array):
                digest.update(np.ascontiguousarray(block).data)
        return digest.hexdigest()

    @cached_property
    def episodes(self) -> np.ndarray:
        """``[E, 2]`` int64, (start, stop) of each complete episode in order, stop exclusive."""
        stops = np.flatnonzero(self.terminals | self.timeouts) + 1
        return np.stack([np.concatenate([[0], stops])[:-1], stops], axis=1).astype(np.int64)

    @property
    def fragment(self) -> tuple[int, int] | None:
        """(start, stop) of rows after the last episode end, trained on but in no statistic."""
        start = int(self.episodes[-1, 1]) if len(self.episodes) else 0
        return (start, len(self)) if start < len(self) else None

    def _sums(self, values: np.ndarray) -> np.ndarray:
        total = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
        return total[self.episodes[:, 1]] - total[self.episodes[:, 0]]

    def episode_returns(self) -> np.ndarray:
        """``[E]`` float64, the undiscounted sum of rewards of each complete episode."""
        return self._sums(self.rewards)

    def episode_costs(self) -> np.ndarray | None:
        """``[E]`` float64, the undiscounted sum of costs of each complete episode; None if none."""
        return None if self.costs is None else self._sums(self.costs)

    def episode_lengths(self) -> np.ndarray:
        """``[E]`` int64, steps of each complete episode."""
        return self.episodes[:, 1] - self.episodes[:, 0]

    @property
    def horizon(self) -> int:
        """Steps of an episode: the card's, or those of the longest complete one; 0 without one."""
        return int(self.card.horizon or max(self.episode_lengths(), default=0))

    def episode_ids(self) -> np.ndarray:
        """``[N]`` int64, the number of each row's episode; a trailing fragment has its own."""
        ends = self.terminals | self.timeouts
        return np.cumsum(ends) - ends

    def normalised_score(self, value: Any) -> Any:
        """100 · (return − random) / (expert − random) with the card's reference; None without one.

        Takes a number or an array. For DSRL the reference is the least and the greatest return in
        the data, and DSRL's papers print the score without the factor 100.
        """
        if self.card.reference_returns is None:
            return None
        low, high = self.card.reference_returns
        return 100.0 * (value - low) / (high - low)

    def spec(self, config: Units) -> Spec:
        """Sizes and units of the data under an agent's configuration.

        ``config.normalize_observations`` standardises with (s - mean) / (std + 1e-3) over the
        dataset, as TD3+BC does; ``config.normalize_rewards`` scales rewards by 1000 / (largest -
        smallest episode return), as IQL does, before ``reward_scale`` and ``reward_shift``.

        Raises:
            SaferlError: pixels are to be normalised, or all returns are equal.
        """
        mean: tuple[float, ...] = ()
        std: tuple[float, ...] = ()
        image = self.observations.shape[1:] if is_image(self.observations) else ()
        if image and config.normalize_observations:
            raise SaferlError(
                "pixels are not normalised: set normalize_observations=false, and use an agent "
                "that takes pixels (`saferl list`)"
            )
        if config.normalize_observations:
            mean, std = _moments(np.asarray(self.observations))
        scale = float(config.reward_scale)
        if config.normalize_rewards:
            returns = self.episode_returns()
            spread = float(returns.max() - returns.min()) if len(returns) else 0.0
            if spread <= 0:
                raise SaferlError(
                    "normalize_rewards needs episodes of different return, but all returns are "
                    "equal: pass --set normalize_rewards=false"
                )
            scale *= 1000.0 / spread
        card = self.card
        return Spec(
            observation_dim=self.observation_dim,
            action_dim=self.action_dim,
            discrete=self.discrete,
            action_low=() if self.discrete else tuple(map(float, card.action_low or ())),
            action_high=() if self.discrete else tuple(map(float, card.action_high or ())),
            observation_mean=mean,
            observation_std=std,
            reward_scale=scale,
            reward_shift=float(config.reward_shift),
            horizon=self.horizon,
            image=tuple(int(size) for size in image),
            frame_stack=getattr(self.observations, "stack", 1),
        )

    def summary(self) -> dict[str, float]:
        """Sizes and the distribution of return, cost and length over the complete episodes."""
        values: dict[str, float] = {
            "transitions": len(self),
            "episodes": len(self.episodes),
            "fragment_rows": 0 if self.fragment is None else len(self) - self.fragment[0],
            "terminals": int(self.terminals.sum()),
            "timeouts": int(self.timeouts.sum()),
            "observation_dim": self.observation_dim,
            "action_dim": self.action_dim,
            "bytes": self.nbytes,
        }
        columns = {"return": self.episode_returns(), "length": self.episode_lengths()}
        if self.costs is not None:
            columns["cost"] = self._sums(self.costs)
        if self.card.reference_returns is not None:
            columns["score"] = self.normalised_score(columns["return"])
        for name, column in columns.items():
            if len(column):
                values |= {
                    f"{name}_mean": float(column.mean()),
                    f"{name}_std": float(column.std()),
                    f"{name}_min": float(column.min()),
                    f"{name}_max": float(column.max()),
                }
                for q, value in zip(QUANTILES, np.quantile(column, QUANTILES)):
                    values[f"{name}_q{round(100 * q):02d}"] = float(value)
        return values

    # Derived datasets --------------------------------------------------------------------------

    def with_card(self, **fields: Any) -> Dataset:
        """The same arrays under a card with other fields."""
        return Dataset(**self._arrays(), card=self.card.replace(**fields), problems=self.problems)

    def with_costs(self, costs: Callable[..., Any] | Any) -> Dataset:
        """The same transitions with costs: ``[N]``, or a function that returns them.

        ``costs(observations, actions, next_observations)`` gets the whole read-only arrays, so it
        is written with numpy operations: ``lambda s, a, n: abs(n[:, 5]) > 1.0``. Old costs are
        replaced.
        """
        source = "an array"
        if callable(costs):
            source = getattr(costs, "__name__", type(costs).__name__)
            costs = costs(self.observations, self.actions, self.next_observations)
        costs = validate.column("costs", costs, len(self))
        validate.check_finite("costs", costs)
        known = [p for p in self.problems if p not in validate.cost_problems(self.costs)]
        return Dataset(
            **(self._arrays() | {"costs": costs}),
            card=self.card.noted(f"costs attached by the user from {source}"),
            problems=(*known, *validate.cost_problems(costs)),
        )

    def with_rewards(self, rewards: Any) -> Dataset:
        """The same transitions with other rewards ``[N]``."""
        rewards = validate.column("rewards", rewards, len(self))
        validate.check_finite("rewards", rewards)
        return Dataset(
            **(self._arrays() | {"rewards": rewards}),
            card=self.card.noted("rewards replaced by the user"),
            problems=self.problems,
        )

    def subset(self, rows: Any = None, *, episodes: Any = None) -> Dataset:
        """Some rows, or some complete episodes, in the order given.

        Args:
            rows: a number (the first n rows), row numbers, or an ``[N]`` mask. An episode that is
                cut this way ends in a timeout, so its return is that of the part that was kept.
            episodes: a number (the first n), episode numbers, or an ``[E]`` mask.
        """
        if (rows is None) == (episodes is None):
            raise SaferlError("subset takes either rows or episodes")
        if rows is not None:
            index = _index("rows", rows, len(self))
            cut = np.ones(len(index), bool)
            cut[:-1] = np.diff(index) != 1
            return self._take(index, cut, f"{len(index)} of {len(self)} rows")
        chosen = _index("episodes", episodes, len(self.episodes))
        total = len(self.episodes)
        return self._take(self.rows_of(chosen), None, f"{len(chosen)} of {total} episodes")

    def rows_of(self, episodes: np.ndarray) -> np.ndarray:
        """Numbers of the rows of complete episodes, which are given by number."""
        spans = self.episodes[episodes]
        lengths = spans[:, 1] - spans[:, 0]
        offset = np.repeat(spans[:, 0] - np.concatenate([[0], lengths.cumsum()[:-1]]), lengths)
        return np.arange(lengths.sum()) + offset

    def _take(self, index: np.ndarray, cut: np.ndarray | None, note: str) -> Dataset:
        if not len(index):
            raise SaferlError(f"subset of {self.card.id} is empty: choose at least one row")
        arrays: dict[str, Any] = {
            name: take(array, index) for name, array in self._arrays().items()
        }
        if cut is not None:
            arrays["timeouts"] = (arrays["timeouts"] | cut) & ~arrays["terminals"]
        return Dataset(**arrays, card=self.card.noted(f"subset: {note}"), problems=self.problems)

    @staticmethod
    def mix(
        good: Dataset, bad: Dataset, ratio: float, seed: int = 0, size: int | None = None
    ) -> Dataset:
        """Whole trajectories of two datasets, ``ratio`` of the rows from ``good``.

        As in Hong et al. (ICLR 2023): good trajectories are drawn uniformly with replacement until
        their rows exceed ``ratio * size``, then bad ones until the total exceeds ``size`` (default
        ``len(good)``). Good rows come first: sample uniformly. The card is good's.
        """
        if not 0 < ratio < 1:
            raise SaferlError(f"ratio is the share of good rows, between 0 and 1; got {ratio}")
        if isinstance(good.observations, Frames) or isinstance(bad.observations, Frames):
            raise SaferlError("cannot mix datasets of frames: load their folders into one dataset")
        for name in ("observations", "actions"):
            a, b = getattr(good, name), getattr(bad, name)
            if a.shape[1:] != b.shape[1:] or a.dtype != b.dtype:
                raise SaferlError(
                    f"cannot mix: {name} are {a.dtype}{list(a.shape[1:])} in {good.card.id} but "
                    f"{b.dtype}{list(b.shape[1:])} in {bad.card.id}"
                )
        same = ("n_actions",) if good.discrete else ("action_low", "action_high")
        for name in same:
            if getattr(good.card, name) != getattr(bad.card, name):
                raise SaferlError(
                    f"cannot mix: {name} of {good.card.id} and {bad.card.id} differ; give both "
                    f"the same {name}="
                )
        if (good.costs is None) != (bad.costs is None):
            without = good if good.costs is None else bad
            raise SaferlError(
                f"cannot mix: {without.card.id} has no costs, the other has; attach with_costs"
            )
        size = len(good) if size is None else int(size)
        random = np.random.default_rng(seed)
        rows, total = [], 0
        for source, enough in ((good, ratio * size), (bad, size)):
            lengths, drawn = source.episode_lengths(), []
            if not len(lengths):
                raise SaferlError(f"cannot mix: {source.card.id} has no complete episode")
            while total <= enough:
                drawn.append(int(random.integers(len(lengths))))
                total += int(lengths[drawn[-1]])
            rows.append(source.rows_of(np.array(drawn, dtype=np.int64)))
        arrays = {}
        for name, array in good._arrays().items():
            arrays[name] = np.empty((total, *array.shape[1:]), array.dtype)
            np.take(array, rows[0], axis=0, out=arrays[name][: len(rows[0])], mode="clip")
            np.take(
                getattr(bad, name), rows[1], axis=0, out=arrays[name][len(rows[0]) :], mode="clip"
            )
        card = good.card.replace(id=f"mix({good.card.id}, {bad.card.id}, {ratio:g})").noted(
            f"{len(rows[0])} of {total} rows from {good.card.id}, seed {seed}, with replacement"
        )
        return Dataset(
            **arrays, card=card, problems=tuple(dict.fromkeys(good.problems + bad.problems))
        )


def _index(name: str, which: Any, total: int) -> np.ndarray:
    """Row numbers from a count, a list of numbers or a mask."""
    array = np.asarray(which)
    if array.ndim == 0 and array.dtype.kind in "iu":
        return np.arange(min(int(array), total))
    if array.dtype == bool and array.shape == (total,):
        return np.flatnonzero(array)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise SaferlError(f"{name} must be a number, a list of numbers or a mask of {total} values")
    if array.size and (array.min() < 0 or array.max() >= total):
        raise SaferlError(f"{name} must lie in 0 … {total - 1}, got {array.min()} … {array.max()}")
    return array.astype(np.int64)


def _moments(
    observations: np.ndarray, chunk: int = 65536
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation (+ 1e-3) per component, in float64 without a full-size copy."""
    n = len(observations)
    flat = observations.reshape(n, -1)
    blocks = [slice(i, i + chunk) for i in range(0, n, chunk)]
    mean = sum(flat[b].sum(0, dtype=np.float64) for b in blocks) / n
    variance = sum(((flat[b] - mean) ** 2).sum(0) for b in blocks) / n
    return tuple(mean.tolist()), tuple((np.sqrt(variance) + 1e-3).tolist())
