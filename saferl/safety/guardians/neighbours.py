"""Guardians that compare a query with the logged rows themselves: counts, distances, kernels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saferl.errors import SaferlError
from saferl.nn.features import FeatureMap
from saferl.nn.search import (
    Search,
    blocks,
    distinct_rows,
    row_keys,
    squared_distances,
)
from saferl.safety.guardians.base import Guardian

BANDWIDTHS = tuple(2.0 ** (i / 2) for i in range(-8, 5))
"""Bandwidths tried, as multiples of Scott's rule."""
HELD_OUT = 500


class Count(Guardian):
    """score = -log(1 + number of logged rows that are exactly equal): 0 where there is none.

    For tabular data: discrete states (an index or codes) with discrete actions. Raw rows are
    compared, so the feature map serves `explain` alone. Takes weights: a row then counts as much.
    """

    # Tensors once there are data, None before.
    keys: Any
    distinct: Any
    counts: Any
    multipliers: Any

    weighted = True

    def __init__(self, features: FeatureMap | None = None):
        super().__init__(features)
        self.declare("keys", "distinct", "counts", "multipliers")

    def _fit(self, features, weights, groups, next_observations) -> None:
        self.keys, first, index, self.multipliers = distinct_rows(self.rows)
        self.distinct = self.rows[first]
        weights = torch.ones_like(index) if weights is None else weights
        counts = torch.zeros(len(first), dtype=torch.float64, device=self.device)
        self.counts = counts.index_add_(0, index, weights.double()).float()

    def _score(self, features: Tensor, rows: Tensor) -> Tensor:
        index = torch.searchsorted(self.keys, row_keys(rows, self.multipliers))
        index = index.clamp_max(len(self.keys) - 1)
        found = (self.distinct[index] == rows).all(1)
        return -torch.log1p(self.counts[index] * found)


class KNN(Guardian):
    """Distance to the nearest logged rows, the robust default.

    Args:
        neighbours: k. Few rows make a local guard, many a smooth one.
        reduce: "mean" of the k distances, or the "kth" alone.
    """

    def __init__(
        self, features: FeatureMap | None = None, neighbours: int = 10, reduce: str = "mean"
    ):
        super().__init__(features)
        if neighbours < 1:
            raise SaferlError(f"neighbours must be 1 or more, got {neighbours}")
        if reduce not in ("mean", "kth"):
            raise SaferlError(f"reduce must be 'mean' or 'kth', got {reduce!r}")
        self.neighbours, self.reduce = neighbours, reduce

    def _fit(self, features, weights, groups, next_observations) -> None:
        if len(features) < self.neighbours:
            raise SaferlError(
                f"{self.neighbours} neighbours need as many rows, got {len(features)}: pass more "
                "rows or a smaller neighbours="
            )

    def _score(self, features: Tensor, rows: Tensor) -> Tensor:
        distances, _ = self.search()(features, self.neighbours)
        return distances.mean(1) if self.reduce == "mean" else distances[:, -1]


class KDE(Guardian):
    """score = -log f(x), f(x) = Σ_i w_i N(x; x_i, σ²I) / Σ_i w_i, natural logarithm.

    OGSRL (arXiv 2505.16242) guards with this density at σ = 0.535 on columns scaled to [-1, 1] and
    the 5-percentile of the training densities as threshold: ``make_guardian("ogsrl")``. The
    threshold here comes from held-out episodes, since a training row's density includes its own
    kernel.

    Args:
        bandwidth: σ in the feature map's units; None chooses it in `fit` by the likelihood of held
            -out training rows (of whole held-out episodes if `fit` gets groups), among multiples
            2^-4 … 2^2 of Scott's rule. Exact copies of a held-out row are left out of its density,
            else repeated rows would drive σ to 0.
        neighbours: sum over so many nearest different rows; None sums over all, in blocks.
        seed: of the held-out choice.
    """

    # Tensors once there are data, None before.
    bandwidth: Any
    distinct: Any
    log_weights: Any

    weighted = True

    def __init__(
        self,
        features: FeatureMap | None = None,
        bandwidth: float | None = None,
        neighbours: int | None = 100,
        seed: int = 0,
    ):
        super().__init__(features)
        if bandwidth is not None and not bandwidth > 0:
            raise SaferlError(f"bandwidth must be positive, got {bandwidth}")
        if neighbours is not None and neighbours < 1:
            raise SaferlError(f"neighbours must be 1 or more, or None for all, got {neighbours}")
        self.given, self.neighbours, self.seed = bandwidth, neighbours, seed
        self.declare("bandwidth", "distinct", "log_weights")
        self._kernels: Search | None = None

    def _fit(self, features, weights, groups, next_observations) -> None:
        n = len(features)
        weights = torch.ones(n, device=self.device) if weights is None else weights
        weights = weights.double() / weights.sum()
        # Equal rows are one kernel of their total weight: tabular data have few different ones.
        _, self.distinct, index, _ = distinct_rows(self.rows)
        self.log_weights = (
            weights.new_zeros(len(self.distinct)).index_add_(0, index, weights).log().float()
        )
        self._kernels = None
        sigma = self.given
        if sigma is None:
            sigma = self._likeliest(features, weights, index, groups)
        self.bandwidth = torch.tensor(sigma, dtype=torch.float32, device=self.device)

    def _likeliest(
        self, x: Tensor, weights: Tensor, index: Tensor, groups: np.ndarray | None
    ) -> float:
        """The bandwidth of greatest held-out likelihood; row i is different row ``index[i]``."""
        n, dim = x.shape
        random = np.random.default_rng(self.seed)
        groups = np.arange(n) if groups is None else np.unique(groups, return_inverse=True)[1]
        count = int(groups.max()) + 1
        if count < 2:
            raise SaferlError("the bandwidth needs two rows or episodes: pass bandwidth=")
        chosen = random.permutation(count)[: max(1, count // 5)]
        mask = np.isin(groups, chosen)
        chosen_rows = random.permutation(np.flatnonzero(mask))[:HELD_OUT]
        held = torch.from_numpy(chosen_rows).to(x.device)
        others = torch.from_numpy(~mask).to(x.device)
        queries, references = x[held], x[self.distinct]
        total = weights.new_zeros(len(references))
        log_w = total.index_add_(0, index[others], weights[others]).log().float()
        log_w = log_w - log_w.logsumexp(0)
        scott = float(x.std(0, correction=0).mean()) * n ** (-1 / (dim + 4))
        if not scott > 0:
            raise SaferlError(
                "all rows are equal: there is no bandwidth to choose, pass bandwidth="
            )
        sigmas = [scott * factor for factor in BANDWIDTHS]
        logs = [torch.full((len(queries),), -math.inf, device=x.device) for _ in sigmas]
        _, step = blocks(len(queries), len(references))
        for start in range(0, len(references), step):
            squares = squared_distances(queries, references[start : start + step])
            squares = torch.where(squares > 0, squares, math.inf)
            for i, sigma in enumerate(sigmas):
                block = (log_w[start : start + step] - squares / (2 * sigma**2)).logsumexp(1)
                logs[i] = torch.logaddexp(logs[i], block)
        totals = [float(log.double().sum()) - len(log) * _log_norm(dim, s)
                  for log, s in zip(logs, sigmas)]  # fmt: skip
        best = int(np.argmax(totals))
        return sigmas[best] if math.isfinite(totals[best]) else scott

    def _score(self, features: Tensor, rows: Tensor) -> Tensor:
        n, dim = len(self.log_weights), features.shape[1]
        scale = 2 * self.bandwidth.square()
        norm = dim * (0.5 * math.log(2 * math.pi) + self.bandwidth.log())
        if self.neighbours is not None and self.neighbours < n:
            distances, index = self.kernels()(features, self.neighbours)
            return norm - (self.log_weights[index] - distances.square() / scale).logsumexp(1)
        references = self.kernels().references
        total = torch.full((len(features),), -math.inf, device=features.device)
        _, step = blocks(len(features), n)
        for start in range(0, n, step):
            squares = squared_distances(features, references[start : start + step])
            block = (self.log_weights[start : start + step] - squares / scale).logsumexp(1)
            total = torch.logaddexp(total, block)
        return norm - total

    def kernels(self) -> Search:
        """Neighbour search among the features of the different rows."""
        if self._kernels is None or self._kernels.references.device != self.rows.device:
            self._kernels = Search(self.feature_map.encode(self.rows[self.distinct]))
        return self._kernels

    def prepare_load(self, state: dict[str, Tensor]) -> None:
        super().prepare_load(state)
        self._kernels = None


def _log_norm(dim: int, sigma: float) -> float:
    return dim * (0.5 * math.log(2 * math.pi) + math.log(sigma))
