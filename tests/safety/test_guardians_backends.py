"""Each back end against an independent computation, and on supports of known shape."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist
from sklearn.datasets import make_moons
from sklearn.metrics import roc_auc_score
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KernelDensity

from saferl.safety.guardians import make_guardian
from saferl.safety.guardians.ellipsoids import d_optimal, exponents, monomials


def moons(n, seed):
    return make_moons(n, noise=0.05, random_state=seed)[0].astype(np.float32)


def ring(n, seed):
    random = np.random.default_rng(seed)
    angle, radius = random.uniform(0, 2 * np.pi, n), 1 + 0.05 * random.normal(size=n)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).astype(np.float32)


def split(x):
    """A pair: one observation number, one action number."""
    return x[:, :1], x[:, 1:]


def auroc(guardian, shape):
    """How well scores tell fresh rows of a shape from uniform ones that are 0.15 away from it."""
    fresh = shape(500, 2)
    anywhere = np.random.default_rng(5).uniform(-2, 3, (2000, 2)).astype(np.float32)
    outside = anywhere[cKDTree(shape(10000, 9)).query(anywhere)[0] > 0.15]
    x = np.concatenate([fresh, outside])
    return roc_auc_score(np.arange(len(x)) >= len(fresh), guardian.score(*split(x)))


@pytest.mark.parametrize("shape", [moons, ring])
def test_supports_of_several_parts_or_with_a_hole(shape):
    train = split(shape(1000, 0))
    value = {
        name: auroc(make_guardian(kind, **options).fit(*train), shape)
        for name, kind, options in [
            ("knn", "knn", {}),
            ("kde", "kde", {}),
            ("gmm", "gmm", {}),
            ("psos 1", "psos", {"degree": 1}),
            ("psos 3", "psos", {"degree": 3}),
            ("psos 4", "psos", {"degree": 4}),
        ]
    }
    assert min(value["knn"], value["kde"], value["gmm"]) > 0.98
    assert value["psos 1"] < value["psos 3"] - 0.005 and value["psos 1"] < 0.985
    assert value["psos 3"] > 0.98 and value["psos 4"] > 0.99


# Counts, distances, kernels --------------------------------------------------------------------


def test_count():
    random = np.random.default_rng(0)
    s, a = random.integers(0, 6, (400, 2)).astype(np.float32), random.integers(0, 3, 400)
    weights = random.uniform(0.5, 2, 400)
    queries = random.integers(0, 8, (200, 2)).astype(np.float32), random.integers(0, 3, 200)
    for w in (None, weights):
        seen = Counter()
        for row, action, weight in zip(s.tolist(), a.tolist(), np.ones(400) if w is None else w):
            seen[(*row, action)] += weight
        guardian = make_guardian("count", n_actions=3).fit(s, a, w)
        expected = [-math.log1p(seen[(*r, b)]) for r, b in zip(queries[0].tolist(), queries[1])]
        assert np.allclose(guardian.score(*queries), expected, rtol=1e-5)
        assert (guardian.score(*queries) == 0).any() and len(guardian.keys) == len(seen)
    assert guardian.score(np.float32([[-0.0, 0]]), np.array([0])) == guardian.score(
        np.float32([[0.0, 0]]), np.array([0]))  # fmt: skip


@pytest.mark.parametrize("reduce", ["mean", "kth"])
def test_knn(reduce):
    x, queries = moons(300, 0), ring(50, 1)
    guardian = make_guardian("knn", neighbours=4, reduce=reduce, scaling="minmax").fit(*split(x))
    low, high = x.min(0), x.max(0)
    scaled = [2 * (v.astype(np.float64) - low) / (high - low) - 1 for v in (queries, x)]
    nearest = np.sort(cdist(*scaled), 1)[:, :4]
    expected = nearest.mean(1) if reduce == "mean" else nearest[:, 3]
    assert np.allclose(guardian.score(*split(queries)), expected, atol=1e-5)


def test_kde_is_a_density():
    x, queries = moons(300, 0), ring(50, 1)
    weights = np.random.default_rng(0).uniform(0.1, 3, 300)
    for w in (None, weights):
        exact = make_guardian("kde", bandwidth=0.3, neighbours=None).fit(*split(x), w)
        points, there = exact.feature_map(*split(x)), exact.feature_map(*split(queries))
        reference = KernelDensity(bandwidth=0.3).fit(points, sample_weight=w)
        assert np.allclose(exact.score(*split(queries)), -reference.score_samples(there), atol=1e-4)
    # Equal rows are one kernel: weights and repetitions are the same.
    times = np.random.default_rng(0).integers(1, 4, 300)
    minmax = {"bandwidth": 0.3, "neighbours": 20, "scaling": "minmax"}
    repeated = make_guardian("kde", **minmax).fit(*split(x.repeat(times, 0)))
    weighted = make_guardian("kde", **minmax).fit(*split(x), times)
    assert len(repeated.distinct) == 300
    assert np.allclose(repeated.score(*split(queries)), weighted.score(*split(queries)), atol=1e-5)
    nearest = make_guardian("kde", bandwidth=0.3, neighbours=20).fit(*split(x), weights)
    distances = cdist(there, points)
    order = distances.argsort(1)[:, :20]
    kernels = np.exp(-(np.take_along_axis(distances, order, 1) ** 2) / (2 * 0.3**2))
    density = (kernels * (weights / weights.sum())[order]).sum(1) / (2 * math.pi * 0.3**2)
    assert np.allclose(nearest.score(*split(queries)), -np.log(density), atol=1e-3)


def test_kde_bandwidth():
    for shape in (moons, ring):
        x = shape(600, 0)
        guardian = make_guardian("kde", neighbours=None).fit(*split(x))
        sigma = float(guardian.bandwidth)
        points = guardian.feature_map(*split(x))
        grid = [sigma * 2 ** (i / 2) for i in range(-4, 5)]
        search = GridSearchCV(KernelDensity(), {"bandwidth": grid}, cv=5).fit(points)
        assert 0.65 < search.best_params_["bandwidth"] / sigma < 1.5
    # Rows that occur many times must not drive the bandwidth to zero.
    copies = np.repeat(x[:60], 10, axis=0)
    tabular = make_guardian("kde", neighbours=None).fit(*split(copies))
    assert float(tabular.bandwidth) > sigma


def test_kde_bandwidth_holds_out_whole_episodes():
    random = np.random.default_rng(0)
    place = random.normal(size=(60, 2))
    x = (place.repeat(15, 0) + 0.01 * random.normal(size=(900, 2))).astype(np.float32)
    by_row = make_guardian("kde").fit(*split(x))
    by_episode = make_guardian("kde").fit(*split(x), groups=np.arange(60).repeat(15))
    assert by_episode.bandwidth > 2 * by_row.bandwidth  # neighbours in time give the rows away


def test_ogsrl_preset():
    x = moons(200, 0)
    guardian = make_guardian("ogsrl").fit(*split(x))
    assert float(guardian.bandwidth) == pytest.approx(0.535)
    assert guardian.feature_map.scaling == "minmax" and guardian.neighbours is None
    scaled = 2 * (x - x.min(0)) / (x.max(0) - x.min(0)) - 1
    f = np.exp(-(cdist(scaled, scaled) ** 2) / (2 * 0.535**2)).mean(1)
    order = np.argsort(-f, kind="stable")
    assert (np.diff(guardian.score(*split(x))[order]) >= -1e-5).all()


# Polynomials and mixtures ----------------------------------------------------------------------


def test_monomials():
    x = torch.tensor([[2.0, 3.0], [5.0, 7.0]])
    expected = [[1, 2, 3, 4, 6, 9, 8, 12, 18, 27], [1, 5, 7, 25, 35, 49, 125, 175, 245, 343]]
    assert monomials(x, 3).tolist() == expected
    assert len(exponents(4, 3)) == monomials(torch.ones(1, 4), 3).shape[1] == math.comb(7, 3)


def conic_reference(e: np.ndarray) -> float:
    """max log det P, e_iᵀ P e_i ≤ 1, by SLSQP over the Cholesky factor of P."""
    p = e.shape[1]
    rows, columns = np.tril_indices(p)
    diagonal = rows == columns

    def factor(v):
        lower = np.zeros((p, p))
        lower[rows, columns] = v
        return lower

    def slack(v):
        return 1 - ((e @ factor(v)) ** 2).sum(1)

    def slope(v):
        return -2 * (e[:, rows] * (e @ factor(v))[:, columns])

    start = np.linalg.cholesky(np.linalg.inv(e.T @ e / len(e)))
    start = (start / np.sqrt(((e @ start) ** 2).sum(1).max() * 1.01))[rows, columns]
    result = minimize(
        lambda v: -2 * np.log(np.abs(v[diagonal])).sum(), start,
        jac=lambda v: np.where(diagonal, -2 / np.where(diagonal, v, 1), 0), method="SLSQP",
        constraints={"type": "ineq", "fun": slack, "jac": slope},
        options={"maxiter": 500, "ftol": 1e-10},
    )  # fmt: skip
    # Shrunk to be feasible for certain, so that it is a lower bound of the optimum.
    return -result.fun - p * math.log1p(max(0.0, -slack(result.x).min()))


@pytest.mark.parametrize("degree", [1, 2])
def test_psos_against_a_conic_problem(degree):
    x = np.random.default_rng(degree).normal(size=(80, 2)).astype(np.float32)
    guardian = make_guardian("psos", degree=degree, trim=0.0, tolerance=1e-5).fit(*split(x))
    e = monomials(torch.tensor(guardian.feature_map(*split(x))).double(), degree).numpy()
    ours = 2 * torch.linalg.slogdet(guardian.root)[1].item()
    assert -1e-4 < ours - conic_reference(e) < 1e-3
    scores = guardian.score(*split(x))
    assert math.isclose(scores.max(), 1, rel_tol=1e-5)  # all rows inside, the outermost on the edge


@pytest.mark.parametrize(("degree", "dim", "rows"), [(1, 2, 60), (2, 3, 3000), (3, 2, 1000)])
def test_design_has_the_kiefer_wolfowitz_certificate(degree, dim, rows):
    x = torch.tensor(np.random.default_rng(0).normal(size=(rows, dim)))
    e = monomials(x, degree)
    weights, root = d_optimal(e, tolerance=1e-3)
    assert (weights >= 0).all() and abs(weights.sum() - 1) < 1e-9
    moment = e.T @ (weights[:, None] * e)
    g = (e * torch.linalg.solve(moment, e.T).T).sum(1)
    assert g.max() <= e.shape[1] * (1 + 1e-3) * (1 + 1e-6)
    assert torch.allclose(root @ root.T, torch.linalg.inv(moment), rtol=1e-4, atol=1e-6)


def test_psos_leaves_out_what_it_may():
    random = np.random.default_rng(0)
    x = np.concatenate([random.normal(size=(190, 2)), random.uniform(8, 9, (10, 2))])
    trimmed = make_guardian("psos", degree=1, trim=0.05).fit(*split(x))
    whole = make_guardian("psos", degree=1, trim=0.0).fit(*split(x))
    q = trimmed.score(*split(x))
    assert (q > 1 + 1e-6).sum() == 10 and (q[190:] > 1).all()
    volume = [-torch.linalg.slogdet(g.root)[1] for g in (trimmed, whole)]
    assert volume[0] < volume[1] - 1


def test_psos_with_a_constant_column():
    x = moons(300, 0)
    s = np.concatenate([x[:, :1], np.full((300, 1), 3.0, np.float32)], 1)
    guardian = make_guardian("psos", degree=2).fit(s, x[:, 1:])
    guardian.calibrate(np.c_[moons(200, 1)[:, :1], np.full(200, 3.0)], moons(200, 1)[:, 1:], 0.1)
    assert guardian.is_ood(s, x[:, 1:]).mean() < 0.2
    assert guardian.is_ood(s + np.float32([0, 1]), x[:, 1:]).all()


def test_christoffel_and_mahalanobis():
    x = moons(400, 0)
    weights = np.random.default_rng(1).integers(1, 4, 400)
    repeated = x.repeat(weights, 0)
    # Weights are repeated rows; the feature map is the same if it does not look at the spread.
    same = {"scaling": "minmax"}
    for name in ("christoffel", "mahalanobis"):
        weighted = make_guardian(name, **same).fit(*split(x), weights).score(*split(x))
        expected = make_guardian(name, **same).fit(*split(repeated)).score(*split(x))
        assert np.allclose(weighted, expected, rtol=1e-4)
    christoffel = make_guardian("christoffel", degree=3).fit(*split(x))
    assert math.isclose(christoffel.score(*split(x)).mean(), 10, rel_tol=1e-3)
    centred = x - x.mean(0)
    inverse = np.linalg.inv(np.cov(x.T, bias=True))
    expected = np.sqrt(np.einsum("ni,ij,nj->n", centred, inverse, centred))
    scores = make_guardian("mahalanobis").fit(*split(x)).score(*split(x))
    assert np.allclose(scores, expected, rtol=1e-3)


def test_gmm_is_the_density_of_scikit_learn():
    x, queries = moons(300, 0), ring(50, 1)
    guardian = make_guardian("gmm", components=5).fit(*split(x))
    points, there = guardian.feature_map(*split(x)), guardian.feature_map(*split(queries))
    mixture = GaussianMixture(5, reg_covar=1e-4, max_iter=200, random_state=0)
    expected = -mixture.fit(points.astype(np.float64)).score_samples(there.astype(np.float64))
    assert np.allclose(guardian.score(*split(queries)), expected, rtol=1e-4, atol=1e-4)


# Networks --------------------------------------------------------------------------------------


def test_ensemble_of_a_given_model():
    x = moons(100, 0)
    calls = []

    def model(observations, actions):
        calls.append((observations, actions))
        return torch.stack([observations + k * actions for k in (0.0, 1.0, 5.0)])

    guardian = make_guardian("ensemble", model=model).fit(*split(x))
    expected = np.abs(x[:, 1]) * np.std([0, 1, 5]) / x[:, 0].std()
    assert np.allclose(guardian.score(*split(x)), expected, rtol=1e-4)
    assert torch.equal(calls[0][0], torch.tensor(x[:, :1]))
    assert not [key for key in guardian.state_dict() if "model" in key or "network" in key]


def test_ensemble_disagrees_where_there_are_no_data():
    random = np.random.default_rng(0)
    s, a = random.uniform(-1, 1, (400, 1)), random.uniform(-1, 1, (400, 1))
    guardian = make_guardian("ensemble", steps=250, hidden=(32,), batch_size=64, lr=1e-2)
    guardian.fit(s, a, next_observations=np.sin(3 * s) + a)
    inside, outside = guardian.score(s, a), guardian.score(s + 4, a)
    assert np.median(outside) > 5 * np.median(inside)


def test_vae():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    guardian = make_guardian("vae", steps=300, batch_size=128, lr=1e-2, hidden=(32, 32))
    guardian.fit(*split(ring(1000, 0)))
    assert auroc(guardian, ring) > 0.95
    assert torch.equal(before, torch.get_rng_state())  # it has a random stream of its own
    x = torch.tensor(guardian.feature_map(*split(ring(20, 3))))
    mean, log_std = guardian.encoder(x[None])[0, 0].chunk(2, -1)
    code = torch.distributions.Normal(mean, log_std.exp())
    divergence = torch.distributions.kl_divergence(code, torch.distributions.Normal(0.0, 1.0))
    decoded = torch.distributions.Normal(guardian.decoder(mean[None])[0, 0], guardian.log_std.exp())
    expected = divergence.sum(1) - decoded.log_prob(x).sum(1) - math.log(2 * math.pi)
    assert np.allclose(guardian.score(*split(ring(20, 3))), expected, rtol=1e-4, atol=1e-4)
    few = [make_guardian("vae", steps=5).fit(*split(moons(50, 0))) for _ in range(2)]
    assert torch.equal(*[guardian.decoder.weights[0] for guardian in few])
