"""Guardians of one formula: polynomial and Gaussian-mixture descriptions of the support.

With e(x) all p = C(D + d, d) monomials of the features up to degree d,

    q(x) = e(x)ᵀ P e(x)

and {q ≤ level} is the support. The back ends differ in P.
"""

from __future__ import annotations

import math
import warnings
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saferl.errors import SaferlError
from saferl.nn.features import FeatureMap
from saferl.safety.guardians.base import Guardian

LARGEST = 2000
"""Most monomials: P has their number squared."""


def exponents(dim: int, degree: int) -> list[tuple[int, ...]]:
    """The factors of each monomial, ``()`` for 1 and ``(0, 0, 2)`` for x_0² x_2."""
    return [c for d in range(degree + 1) for c in combinations_with_replacement(range(dim), d)]


def monomials(x: Tensor, degree: int) -> Tensor:
    """All monomials up to a degree, ``[B, D]`` to ``[B, p]``, in the order of `exponents`."""
    columns, layer = [torch.ones_like(x[:, :1])], [(torch.ones_like(x[:, 0]), 0)]
    for _ in range(degree):
        layer = [(c * x[:, j], j) for c, first in layer for j in range(first, x.shape[1])]
        columns.append(torch.stack([c for c, _ in layer], 1))
    return torch.cat(columns, 1)


def d_optimal(e: Tensor, tolerance: float = 1e-3, limit: int = 10000) -> tuple[Tensor, Tensor]:
    """Weights of the D-optimal design on rows ``e [N, p]``: max log det M(w), M = Σ w_i e_i e_iᵀ.

    With g_i = e_iᵀ M(w)^{-1} e_i, each update is multiplicative, w_i ← w_i g_i / Σ w g, followed by
    vertex exchanges (Böhning, 1986), which move weight from the row of least g to that of greatest;
    alone, multiplicative updates crawl near the optimum. They run on a working set of rows that
    takes in those which violate the Kiefer-Wolfowitz condition max g ≤ (1 + tolerance) p most,
    until none of all N does. By that theorem log det M is then within p · log(1 + tolerance) of its
    maximum.

    Args:
        limit: most updates, after which the weights are returned as they are.

    Returns:
        Weights ``[N]`` and R ``[p, p]`` with R Rᵀ = M^{-1}, float64.
    """
    n, p = e.shape
    root = inverse_root(e.T @ e / n)
    rows = (e @ root).square().sum(1).topk(min(n, 2 * p)).indices
    w = torch.full((len(rows),), 1 / len(rows), dtype=e.dtype, device=e.device)
    goal = 1.0
    for _ in range(limit):
        active = e[rows]
        root = inverse_root(active.T @ (w[:, None] * active))
        g = (active @ root).square().sum(1)
        mean = w @ g  # p, or the rank where monomials depend on each other
        if g.max() > (1 + goal) * mean:
            w = w * g / mean
            w = _exchange(active @ inverse_root(active.T @ (w[:, None] * active)), w, goal)
            continue
        g = (e @ root).square().sum(1)
        if g.max() <= (1 + tolerance) * mean:
            break
        # Working sets that will change need no exact answer: half of the present violation will do.
        goal = max(0.5 * tolerance, 0.5 * float(g.max() / mean - 1))
        worst = g.index_fill(0, rows, 0.0).topk(min(n, p)).indices
        worst = worst[g[worst] > (1 + tolerance) * mean]
        kept = w > 0
        rows, w = torch.cat((rows[kept], worst)), w[kept]
        w = torch.cat((0.99 * w, torch.full_like(worst, 0.01, dtype=w.dtype) / len(worst)))
        w = w / w.sum()
    weights = torch.zeros(n, dtype=e.dtype, device=e.device)
    weights[rows] = w
    return weights, root


def _exchange(rooted: Tensor, weights: Tensor, goal: float) -> Tensor:
    """Vertex exchanges on ``rooted = E R [K, p]``, at most K of them.

    Moving weight δ from row j to row i multiplies det M by (1 + δ g_i)(1 - δ g_j) + δ² g_ij², with
    g_ij = e_iᵀ M^{-1} e_j; that is greatest at δ = (g_i - g_j) / 2(g_i g_j - g_ij²), cut at w_j.
    """
    device, w = weights.device, weights.cpu().numpy().copy()
    gram = (rooted @ rooted.T).cpu().numpy()
    for _ in range(len(w)):
        g = gram.diagonal()
        i, j = int(g.argmax()), int(np.where(w > 0, g, np.inf).argmin())
        if g[i] <= (1 + 0.5 * goal) * (w @ g):
            break
        curvature = 2 * (g[i] * g[j] - gram[i, j] ** 2)
        delta = w[j] if curvature <= 0 else min(w[j], (g[i] - g[j]) / curvature)
        w[i] += delta
        w[j] -= delta
        for row, change in ((i, delta), (j, -delta)):
            column = gram[row].copy()
            gram -= np.outer(column * (change / (1 + change * column[row])), column)
    return torch.from_numpy(w / w.sum()).to(device)


def inverse_root(moment: Tensor, ridge: float = 1e-10) -> Tensor:
    """R with R Rᵀ = (M + ridge · mean diagonal · I)^{-1}."""
    eye = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    factor = torch.linalg.cholesky(moment + ridge * moment.diagonal().mean() * eye)
    return torch.linalg.solve_triangular(factor, eye, upper=False).T.contiguous()


class _Polynomial(Guardian):
    # Tensors once there are data, None before.
    root: Any

    def __init__(self, features: FeatureMap | None = None, degree: int = 2):
        super().__init__(features)
        if degree < 1:
            raise SaferlError(f"degree must be 1 or more, got {degree}")
        self.degree = degree
        self.declare("root")  # P = root @ rootᵀ, float64

    def _monomials(self, features: Tensor) -> Tensor:
        count = math.comb(features.shape[1] + self.degree, self.degree)
        if count > LARGEST:
            raise SaferlError(
                f"degree {self.degree} of {features.shape[1]} features has {count} monomials, more "
                f"than {LARGEST}: take a lower degree or pca=0.95"
            )
        return monomials(features.double(), self.degree)

    def _score(self, features: Tensor, rows: Tensor) -> Tensor:
        return (monomials(features.double(), self.degree) @ self.root).square().sum(1)


class PSoS(_Polynomial):
    """Polynomial sum of squares sublevel set of least volume (OGSRL's theory, arXiv 2505.16242).

    Minimises log det P^{-1} subject to q ≤ 1 at all training rows but a share ``trim``. With all
    rows inside, that is the dual of D-optimal design: P = M(w)^{-1} / max q. The share is left out
    by concentration: drop the rows of largest q (first that of uniform weights), solve, again until
    the set stays the same; the volume never grows, but the end is a local optimum. Degree 1 is the
    minimum-volume ellipsoid; on a support of several parts a low degree is near useless.
    Score: q, at most 1 inside the trimmed set.

    Args:
        degree: d; q has degree 2d. p = C(D + d, d) grows fast: use pca= beyond a few features.
        trim: α_c, the share of training rows that may lie outside.
        rounds: most rounds of concentration.
        tolerance: of the Kiefer-Wolfowitz condition; log det P is within p · tolerance of the best.
    """

    def __init__(
        self,
        features: FeatureMap | None = None,
        degree: int = 2,
        trim: float = 0.05,
        rounds: int = 5,
        tolerance: float = 1e-3,
    ):
        super().__init__(features, degree)
        if not 0 <= trim < 1:
            raise SaferlError(f"trim is a share of rows from 0 to below 1; got {trim}")
        self.trim, self.rounds, self.tolerance = trim, rounds, tolerance

    def _fit(self, features, weights, groups, next_observations) -> None:
        e = self._monomials(features)
        n, p = e.shape
        kept = n - int(self.trim * n)
        if kept < p:
            raise SaferlError(f"{p} monomials need {p} rows after trimming, got {kept}: pass more")
        # Outliers do not stand out of an ellipsoid drawn around them: start from uniform weights.
        q = (e @ inverse_root(e.T @ e / n)).square().sum(1)
        inside = q.argsort(stable=True)[:kept].sort().values
        for round_ in range(self.rounds + 1):
            _, root = d_optimal(e[inside], self.tolerance)
            q = (e @ root).square().sum(1)
            level = q[inside].max()
            nearest = q.argsort(stable=True)[:kept].sort().values
            if round_ == self.rounds or torch.equal(nearest, inside):
                break
            inside = nearest
        self.root = root / level.sqrt()


class Christoffel(_Polynomial):
    """Empirical Christoffel function: P = M^{-1} of the uniform weights, in closed form.

    Score: q, the reciprocal of the Christoffel function; about p on average over training rows.
    Takes weights.

    Args:
        degree: d.
        ridge: added to M's diagonal, times the diagonal's mean.
    """

    weighted = True

    def __init__(self, features: FeatureMap | None = None, degree: int = 2, ridge: float = 1e-6):
        super().__init__(features, degree)
        self.ridge = ridge

    def _fit(self, features, weights, groups, next_observations) -> None:
        e = self._monomials(features)
        w = torch.ones(len(e), dtype=e.dtype, device=e.device) if weights is None else weights
        self.root = inverse_root(e.T @ ((w / w.sum())[:, None] * e), self.ridge)


class Mahalanobis(Guardian):
    """√((x - μ)ᵀ Σ^{-1} (x - μ)) with the training rows' mean and covariance. Takes weights.

    Args:
        ridge: added to Σ's diagonal, times the diagonal's mean.
    """

    # Tensors once there are data, None before.
    mean: Any
    root: Any

    weighted = True

    def __init__(self, features: FeatureMap | None = None, ridge: float = 1e-6):
        super().__init__(features)
        self.ridge = ridge
        self.declare("mean", "root")

    def _fit(self, features, weights, groups, next_observations) -> None:
        x = features.double()
        w = torch.ones(len(x), dtype=x.dtype, device=x.device) if weights is None else weights
        w = w / w.sum()
        self.mean = w @ x
        centred = x - self.mean
        covariance = centred.T @ (w[:, None] * centred)
        if not covariance.diagonal().sum() > 0:
            raise SaferlError("all rows are equal: there is no covariance, take guardian count")
        self.root = inverse_root(covariance, self.ridge)

    def _score(self, features: Tensor, rows: Tensor) -> Tensor:
        return ((features.double() - self.mean) @ self.root).square().sum(1).sqrt()


class GMM(Guardian):
    """-log density of a Gaussian mixture with full covariances, fitted by scikit-learn.

    Args:
        components: of the mixture.
        ridge: added to each covariance's diagonal, in squared feature units.
        seed: of the initial clustering.
    """

    # Tensors once there are data, None before.
    means: Any
    roots: Any
    log_norms: Any

    def __init__(
        self,
        features: FeatureMap | None = None,
        components: int = 20,
        ridge: float = 1e-4,
        seed: int = 0,
    ):
        super().__init__(features)
        if components < 1:
            raise SaferlError(f"components must be 1 or more, got {components}")
        self.components, self.ridge, self.seed = components, ridge, seed
        self.declare("means", "roots", "log_norms")

    def _fit(self, features, weights, groups, next_observations) -> None:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.mixture import GaussianMixture

        if len(features) < max(2, self.components):
            raise SaferlError(
                f"{self.components} components need as many rows, got {len(features)}: pass "
                "components="
            )
        mixture = GaussianMixture(
            self.components, reg_covar=self.ridge, max_iter=200, random_state=self.seed
        )
        with warnings.catch_warnings():
            # A mixture whose last step still gained, or with repeated rows, is a density as well.
            warnings.simplefilter("ignore", ConvergenceWarning)
            mixture.fit(features.double().cpu().numpy())
        roots = torch.from_numpy(mixture.precisions_cholesky_)  # [K, D, D], Σ^{-1} = R Rᵀ
        log_det = roots.diagonal(dim1=1, dim2=2).log().sum(1)
        norm = 0.5 * features.shape[1] * math.log(2 * math.pi)
        self.means = torch.from_numpy(mixture.means_).to(self.device)
        self.roots = roots.contiguous().to(self.device)
        self.log_norms = (torch.from_numpy(mixture.weights_).log() + log_det - norm).to(self.device)

    def _score(self, features: Tensor, rows: Tensor) -> Tensor:
        centred = features.double()[None] - self.means[:, None]
        squares = torch.bmm(centred, self.roots).square().sum(2)
        return -(self.log_norms[:, None] - 0.5 * squares).logsumexp(0)
