"""`Guardian`: how far a state-action pair is from the data, and which distance is too far.

A back end scores, higher meaning further from the data. `Guardian.calibrate` turns scores into a
decision by split-conformal prediction over whole episodes (Dunn, Wasserman and Ramdas, JASA 2022;
Lee, Barber and Willett, arXiv 2306.06342): with G calibration episodes, episode g holding n_g rows,

    p(x) = 1/(G+1) · (1 + Σ_g share of the rows of episode g that score at least as high as x)
    x is out of the data  ⇔  p(x) ≤ α  ⇔  score(x) > τ,
    τ = least score t with Σ_g (share of g at t or below) ≥ (1 - α)(G + 1)

An episode counts once, however many rows it has, so correlated rows are not taken for independent
ones. With one row per episode τ is the ⌈(n+1)(1-α)⌉-th smallest score of n.

Guarantee: if calibration episodes and the next one are exchangeable and none was used in `fit`, a
row drawn uniformly from the next episode is flagged with probability at most α, over calibration
and next episode together. (Let row x be drawn from episode G+1. With τ* from all G+1 episodes,
exchangeability gives P(score(x) ≤ τ*) = E[mean share at or below τ*] ≥ 1-α; and τ* ≤ τ, since τ
puts the mass of episode G+1 at infinity.) Price: resolution and spread are those of G numbers, not
of Σ n_g, so α needs G ≥ 1/α - 1 episodes, and the rate is up to about 2/(G+1) below α. Nothing is
promised of pairs that are not from the data: a false accept has no such bound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saferl.errors import SaferlError, unknown
from saferl.nn.data_buffers import DataBuffers, as_tensor, in_kind
from saferl.nn.features import FeatureMap
from saferl.nn.search import Search, distinct_rows, hash_multipliers, row_keys

TIE = 1e-5
"""Scores closer than this times max(1, |score|) are ties: devices round differently, and tabular
data have many rows at exactly the threshold. Ties are not flagged."""
BLOCK_ROWS = 8192


class Explanation(NamedTuple):
    """The logged rows nearest to a query, nearest first; tensors, or arrays for array queries."""

    indices: Any  # [*, k] int64, row numbers as passed to fit
    distances: Any  # [*, k], in the feature map's units
    observation_differences: Any  # [*, k, O], query minus row, raw units
    action_differences: Any  # [*, k, A], query minus row; of the factors' levels when discrete


class Guardian(DataBuffers):
    """Base of all back ends, which provide ``_fit`` and ``_score``.

    Fit on training episodes, calibrate on other episodes, then ask. All that is learnt, with the
    rows of `fit` for `explain`, is in buffers: ``state_dict`` holds plain tensors and loads into a
    fresh guardian made with the same options. `to` moves scoring to a device. Numpy in, numpy out.

    Args:
        features: the `FeatureMap`; standard scaling of continuous actions if None.
    """

    threshold: Tensor
    temperature: Tensor
    alpha: Tensor
    # Tensors once there are data, None before.
    rows: Any
    calibration_scores: Any
    calibration_mass: Any

    weighted: ClassVar[bool] = False  # whether fit takes weights

    def __init__(self, features: FeatureMap | None = None):
        super().__init__()
        self.feature_map = features if features is not None else FeatureMap()
        self.declare("rows", "calibration_scores", "calibration_mass")
        for name in ("threshold", "temperature", "alpha"):
            self.register_buffer(name, torch.tensor(math.nan))
        self._search: Search | None = None
        self._groups: np.ndarray | None = None

    # What a back end provides.

    def _fit(
        self,
        features: Tensor,
        weights: Tensor | None,
        groups: np.ndarray | None,
        next_observations: Any,
    ) -> None:
        """Learn from features ``[N, D]`` and weights ``[N]``; ``self.rows`` holds the raw rows."""
        raise NotImplementedError

    def _score(self, features: Tensor, rows: Tensor) -> Tensor:
        """Scores ``[B]`` of features ``[B, D]`` and the raw rows ``[B, R]`` they came from."""
        raise NotImplementedError

    # What they share.

    @property
    def fitted(self) -> bool:
        return self.rows is not None

    @property
    def calibrated(self) -> bool:
        return self.calibration_scores is not None

    @torch.no_grad()
    def fit(
        self,
        observations: Any,
        actions: Any,
        weights: Any = None,
        *,
        groups: Any = None,
        next_observations: Any = None,
    ) -> Guardian:
        """Learn the support of observations ``[N, O]`` and actions ``[N, A]`` (discrete ``[N]``).

        Args:
            weights: ``[N]``, positive: how often a row counts. Not every back end takes them.
            groups: ``[N]`` episode ids; what is held out inside `fit` is then whole episodes, and
                `calibrate` refuses episodes with the same ids.
            next_observations: ``[N, O]``, for the back end that predicts them.

        Raises:
            SaferlError: arrays that do not fit together, values that are not finite, weights where
                the back end takes none.
        """
        if weights is not None:
            if not self.weighted:
                raise SaferlError(
                    f"{type(self).__name__} takes no weights: leave rows out or repeat them, or "
                    "choose count, kde, christoffel or mahalanobis"
                )
            weights = as_tensor(weights, self.device).double()
            if weights.shape != (len(observations),) or not bool((weights > 0).all()):
                raise SaferlError("weights must be one positive number per row: drop other rows")
        groups = None if groups is None else _groups(groups, len(observations))
        self._forget()
        self.rows = self.feature_map.fit(observations, actions)
        self._groups = None if groups is None else np.unique(groups)
        self._fit(self.feature_map.encode(self.rows), weights, groups, next_observations)
        return self

    def _forget(self) -> None:
        self.calibration_scores = self.calibration_mass = self._search = None
        for name in ("threshold", "temperature", "alpha"):
            getattr(self, name).fill_(math.nan)

    @torch.no_grad()
    def score(self, observations: Any, actions: Any) -> Any:
        """Distance from the data ``[*]`` of ``[*, O]`` and ``[*, A]`` (discrete ``[*]``).

        Leading axes are any and broadcast: ``score(s[:, None], torch.arange(n))`` is all actions at
        every state. A row that is not finite, or an action that does not exist, scores infinity.

        Raises:
            SaferlError: not fitted; sizes that do not fit.
        """
        rows = self._rows(observations, actions)
        return in_kind(self._scores(rows), observations)

    def _rows(self, observations: Any, actions: Any) -> Tensor:
        if not self.fitted:
            raise SaferlError("the guardian is not fitted: call fit(observations, actions) first")
        return self.feature_map.rows(observations, actions)

    def _scores(self, rows: Tensor) -> Tensor:
        valid = self.feature_map.valid(rows).flatten()
        flat = rows.reshape(-1, rows.shape[-1])
        flat = torch.where(valid[:, None], flat, 0.0)
        scores = torch.cat([
            self._score(self.feature_map.encode(block), block).float()
            for block in flat.split(BLOCK_ROWS)
        ])  # fmt: skip
        scores = torch.where(valid & ~scores.isnan(), scores, math.inf)
        return scores.reshape(rows.shape[:-1])

    @torch.no_grad()
    def calibrate(
        self, observations: Any, actions: Any, alpha: float = 0.05, groups: Any = None
    ) -> Guardian:
        """Set the threshold so that at most a share ``alpha`` of supported rows is flagged.

        Args:
            observations, actions: rows of episodes that `fit` has not seen.
            alpha: level of false alarms; this module's docstring says of what exactly.
            groups: ``[N]`` episode ids, numbers or words. None takes every row for an episode of
                its own, which is right only for independent rows.

        Raises:
            SaferlError: not fitted; alpha outside (0, 1); fewer than 1/alpha - 1 episodes; episodes
                that `fit` has seen. Those are found by id if both calls were given ids (ids of
                `fit` are not saved with the state). Otherwise by equal rows: an error if clearly
                more calibration rows are copies of training rows than training rows are copies of
                each other. In tabular data most rows are copies anyway, so there pass ids.
        """
        if not 0 < alpha < 1:
            raise SaferlError(f"alpha is a share of false alarms between 0 and 1; got {alpha}")
        rows = self._rows(observations, actions)
        if rows.dim() != 2:
            raise SaferlError(f"calibration rows must be [N, O] and [N, A], got {list(rows.shape)}")
        self.feature_map.check(rows)
        groups = None if groups is None else _groups(groups, len(rows))
        self._check_overlap(rows, groups)
        groups = np.arange(len(rows)) if groups is None else groups
        _, first, index, _ = distinct_rows(rows)  # tabular data have few different ones
        self._calibrate(self._scores(rows[first])[index], alpha, groups)
        return self

    def _check_overlap(self, rows: Tensor, groups: np.ndarray | None) -> None:
        if self._groups is not None and groups is not None:
            common = np.intersect1d(self._groups, groups)
            if len(common):
                raise SaferlError(
                    f"{len(common)} calibration episodes, {common[0]} first, were used in fit: "
                    "calibrate on other episodes"
                )
            return
        multipliers = hash_multipliers(rows.shape[1]).to(self.device)
        known, mine = row_keys(self.rows, multipliers), row_keys(rows, multipliers)
        _, index, counts = known.unique(return_inverse=True, return_counts=True)
        repeated = float((counts[index] > 1).float().mean())
        fresh = int((~torch.isin(mine, known)).sum())
        # By exchangeability a share 1 - repeated is expected to be fresh. The slack of ten standard
        # deviations allows for the rows of an episode being alike.
        expected = len(rows) * (1 - repeated)
        if fresh < 0.9 * expected - 10 * math.sqrt(expected * repeated):
            raise SaferlError(
                f"{len(rows) - fresh} of {len(rows)} calibration rows were used in fit: calibrate "
                "on other episodes (pass groups= to both if rows repeat by nature)"
            )

    def _calibrate(self, scores: Tensor, alpha: float, groups: np.ndarray) -> None:
        _, members, sizes = np.unique(groups, return_inverse=True, return_counts=True)
        count = len(sizes)
        if count < 1 / alpha - 1 - 1e-9:
            raise SaferlError(
                f"alpha={alpha} needs at least {math.ceil(1 / alpha - 1 - 1e-9)} calibration "
                f"episodes, got {count}: pass more of them or a larger alpha"
            )
        scores, order = scores.double().cpu().sort()
        mass = torch.from_numpy(1 / ((count + 1) * sizes[members]))[order]
        below = mass.cumsum(0)
        index = int((below < 1 - alpha - 1e-9).sum())
        # The last entry is the share of the next episode, which might score anything.
        tail = torch.cat((mass.flip(0).cumsum(0).flip(0), torch.zeros(1))) + 1 / (count + 1)
        threshold = scores[index]
        if not threshold.isfinite():
            raise SaferlError("the threshold is infinite: take a lower degree or another guardian")
        spread = (threshold - scores[int((below < 0.5 * below[-1]).sum())]) / 4
        self.calibration_scores = scores.float().to(self.device)
        self.calibration_mass = tail.float().to(self.device)
        self.threshold.fill_(float(threshold))
        # The median calibration row gets a soft cost of sigmoid(-4) = 0.018.
        self.temperature.fill_(max(float(spread), 1e-3 * max(1.0, abs(float(threshold)))))
        self.alpha.fill_(alpha)

    def _asked(self, observations: Any, actions: Any) -> Tensor:
        rows = self._rows(observations, actions)
        if not self.calibrated:
            raise SaferlError(
                "the guardian has no threshold: call calibrate(observations, actions, alpha, "
                "groups) with episodes that fit has not seen"
            )
        return self._scores(rows)

    @torch.no_grad()
    def is_ood(self, observations: Any, actions: Any) -> Any:
        """``[*]`` bool, score > τ; shapes as in `score`.

        Raises:
            SaferlError: not fitted or not calibrated; sizes that do not fit.
        """
        scores = self._asked(observations, actions)
        return in_kind(self.flag(scores), observations)

    def flag(self, scores: Tensor) -> Tensor:
        """`is_ood` of what `score` returned, a tensor."""
        return scores > self.threshold + TIE * self.threshold.abs().clamp_min(1)

    @torch.no_grad()
    def p_value(self, observations: Any, actions: Any) -> Any:
        """``[*]`` conformal p-values, at least 1/(G+1); p ≤ α is `is_ood`."""
        return in_kind(self._p(self._asked(observations, actions)), observations)

    def _p(self, scores: Tensor) -> Tensor:
        scores = scores - TIE * scores.abs().clamp_min(1)
        scores = torch.where(scores.isnan(), math.inf, scores)  # infinity minus infinity
        return self.calibration_mass[torch.searchsorted(self.calibration_scores, scores)]

    @torch.no_grad()
    def cost(
        self, observations: Any, actions: Any, mode: str = "hard", temperature: float | None = None
    ) -> Any:
        """``[*]`` float32 cost of leaving the data.

        Args:
            mode: "hard" is 1 where score > τ, else 0; "soft" is sigmoid((score - τ) / T).
            temperature: T in the score's units; None takes a quarter of the distance from the
                median calibration score to τ.

        Raises:
            SaferlError: not fitted or not calibrated; an unknown mode.
        """
        if mode not in ("hard", "soft"):
            raise unknown("cost mode", mode, ("hard", "soft"))
        scores = self._asked(observations, actions)
        if mode == "hard":
            return in_kind(self.flag(scores).float(), observations)
        if temperature is not None and temperature <= 0:
            raise SaferlError(f"temperature must be positive, got {temperature}")
        width = self.temperature if temperature is None else temperature
        return in_kind(((scores - self.threshold) / width).sigmoid(), observations)

    @torch.no_grad()
    def explain(self, observations: Any, actions: Any, k: int = 5) -> Explanation:
        """The k rows of `fit` that are nearest in the feature map, whatever the back end.

        Raises:
            SaferlError: not fitted; k outside 1 … number of rows; a query that is not finite.
        """
        rows = self._rows(observations, actions)
        if not 1 <= k <= len(self.rows):
            raise SaferlError(f"explain takes k from 1 to {len(self.rows)} rows, got {k}")
        flat = rows.reshape(-1, rows.shape[-1])
        self.feature_map.check(flat)
        distances, indices = self.search()(self.feature_map.encode(flat), k)
        near = self.rows[indices]
        o = self.feature_map.observation_dim
        levels = self.feature_map.action_levels
        parts = (
            indices,
            distances,
            flat[:, None, :o] - near[..., :o],
            levels(flat)[:, None] - levels(near),
        )
        shape = rows.shape[:-1]
        return Explanation(*[in_kind(p.reshape(*shape, *p.shape[1:]), observations) for p in parts])

    def search(self) -> Search:
        """Neighbour search among the features of `fit`'s rows, on the guardian's device."""
        if self._search is None or self._search.references.device != self.rows.device:
            self._search = Search(self.feature_map.encode(self.rows))
        return self._search

    def prepare_load(self, state: dict[str, Tensor]) -> None:
        self._search = self._groups = None


class Composite(Guardian):
    """The most alarmed of several guardians: score = -log min_j p_j, p_j each part's p-value.

    p-values put unlike scores on one scale, and the threshold of their minimum, from the same
    calibration rows, accounts for looking at several. It keeps the guarantee: a calibration row's
    own p-value leaves out the term 1/(G+1) of the unseen episode, so a calibration row never looks
    less extreme than the next episode's row would in its place. Among rows beyond all calibration
    scores the composite has no order.

    Args:
        parts: guardians, which this one fits and calibrates together.
    """

    def __init__(self, parts: Sequence[Guardian]):
        if not parts:
            raise SaferlError("a composite needs parts: parts=('knn', 'mahalanobis')")
        super().__init__()
        self.parts: Any = torch.nn.ModuleList(parts)

    @property
    def rows(self) -> Tensor | None:
        """The first part's, which `explain` refers to."""
        return self.parts[0].rows

    @property
    def fitted(self) -> bool:
        return all(part.fitted for part in self.parts)

    def fit(
        self, observations: Any, actions: Any, weights: Any = None, **options: Any
    ) -> Composite:
        """`Guardian.fit` of every part."""
        self._forget()
        for part in self.parts:
            part.fit(observations, actions, weights, **options)
        return self

    def _rows(self, observations: Any, actions: Any) -> Tensor:
        return self.parts[0]._rows(observations, actions)

    @torch.no_grad()
    def calibrate(
        self, observations: Any, actions: Any, alpha: float = 0.05, groups: Any = None
    ) -> Composite:
        """`Guardian.calibrate` of every part and of their maximum, on the same rows."""
        for part in self.parts:
            part.calibrate(observations, actions, alpha, groups)
        rows = self._rows(observations, actions)
        least = torch.stack([
            part._p(part._scores(rows)) - part.calibration_mass[-1] for part in self.parts
        ]).amin(0)  # fmt: skip
        groups = np.arange(len(rows)) if groups is None else _groups(groups, len(rows))
        self._calibrate(-least.clamp_min(1e-12).log(), alpha, groups)
        return self

    def _scores(self, rows: Tensor) -> Tensor:
        if not all(part.calibrated for part in self.parts):
            raise SaferlError("a composite scores by p-values: call calibrate first")
        return -torch.stack([part._p(part._scores(rows)) for part in self.parts]).amin(0).log()

    def explain(self, observations: Any, actions: Any, k: int = 5) -> Explanation:
        """`Guardian.explain` of the first part."""
        return self.parts[0].explain(observations, actions, k)


def _groups(groups: Any, count: int) -> np.ndarray:
    groups = np.asarray(groups.cpu() if isinstance(groups, Tensor) else groups)
    if groups.shape != (count,):
        raise SaferlError(
            f"groups must be one episode id per row, [{count}], got {list(groups.shape)}"
        )
    return groups
