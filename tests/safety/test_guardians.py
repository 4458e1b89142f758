"""What all guardians share: features, calibration, explanation, state, search, errors."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from saferl.errors import SaferlError
from saferl.nn import search as search_module
from saferl.nn.search import Search
from saferl.safety.guardians import FeatureMap, Guardian, guardian_names, make_guardian

RNG = np.random.default_rng(0)
S = RNG.normal(size=(120, 3)).astype(np.float32) * [1, 10, 0.1]
A = RNG.uniform(-2, 2, (120, 2)).astype(np.float32)
S, A = S.astype(np.float32), A.astype(np.float32)
OTHER_S = (RNG.normal(size=(80, 3)) * [1, 10, 0.1]).astype(np.float32)
OTHER_A = RNG.uniform(-2, 2, (80, 2)).astype(np.float32)
SMALL = {
    "gmm": {"components": 3},
    "ensemble": {"steps": 5, "hidden": (8,), "size": 3},
    "vae": {"steps": 5, "hidden": (8,)},
    "composite": {"parts": ("knn", "mahalanobis")},
}


def made(name: str, **options) -> Guardian:
    guardian = make_guardian(name, **SMALL.get(name, {}), **options)
    guardian.fit(S, A, next_observations=S + 0.1 * RNG.normal(size=S.shape))
    return guardian.calibrate(OTHER_S, OTHER_A, alpha=0.1)


# Features --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", ["minmax", "standard", "whiten"])
def test_scaling(scaling):
    features = FeatureMap(scaling)
    features.fit(S, A)
    x = features(S, A)
    if scaling == "minmax":
        assert np.allclose(x.min(0), -1, atol=1e-5) and np.allclose(x.max(0), 1, atol=1e-5)
    else:
        assert np.allclose(x.mean(0), 0, atol=1e-5) and np.allclose(x.std(0), 1, atol=1e-4)
    covariance = np.cov(x[:, :3].T, bias=True)
    assert np.allclose(covariance, np.eye(3), atol=1e-4) == (scaling == "whiten")
    tensors = features(torch.tensor(S), torch.tensor(A))
    assert isinstance(x, np.ndarray) and torch.equal(tensors, torch.tensor(x))


@pytest.mark.parametrize("scaling", ["minmax", "standard", "whiten"])
def test_a_column_without_range_is_left_as_it_is(scaling):
    constant = S.copy()
    constant[:, 1] = 7.5
    features = FeatureMap(scaling)
    features.fit(constant, A)
    moved = constant[:1] + np.float32([0, 2, 0])
    step = features(moved, A[:1]) - features(constant[:1], A[:1])
    assert math.isclose(np.linalg.norm(step), 2, rel_tol=1e-5)
    if scaling != "whiten":
        assert np.array_equal(features(constant, A)[:, 1], constant[:, 1])


def test_actions_in_the_distance():
    state, both = np.zeros((2, 3), np.float32), np.array([3, 14])  # levels (0, 3) and (2, 4)
    table = np.arange(15).repeat(8)

    def distance(**options):
        features = FeatureMap(**options)
        features.fit(S, table)
        x = features(state, both)
        return np.linalg.norm(x[0] - x[1])

    # With "standard", one level is as far as one standard deviation of a feature.
    assert np.isclose(distance(n_actions=(3, 5)), math.sqrt(2**2 + 1**2))
    assert np.isclose(distance(n_actions=(3, 5), action_weight=3.0), 3 * math.sqrt(5))
    assert np.isclose(distance(n_actions=15), 11)
    assert np.isclose(distance(n_actions=15, scaling="minmax"), 2 * 11 / 14)
    assert np.isclose(distance(n_actions=15, action_encoding="onehot", action_weight=0.7), 0.7)
    assert np.isclose(distance(n_actions=(3, 5), action_encoding="onehot"), math.sqrt(2))
    assert distance(n_actions=15, action_weight=0.0) == 0


def test_pca_keeps_the_share_of_variance():
    from sklearn.decomposition import PCA

    mixed = (RNG.normal(size=(200, 2)) @ RNG.normal(size=(2, 6))).astype(np.float32)
    mixed += 0.2 * RNG.normal(size=mixed.shape).astype(np.float32)
    plain, reduced = FeatureMap(), FeatureMap(pca=0.95)
    plain.fit(mixed, A[:1].repeat(200, 0))
    reduced.fit(mixed, A[:1].repeat(200, 0))
    x, z = plain(mixed, A[:1]), reduced(mixed, A[:1])
    reference = PCA(0.95, svd_solver="full").fit(x)
    assert z.shape[1] == reference.n_components_ < x.shape[1]
    assert np.allclose(np.abs(z - z.mean(0)), np.abs(reference.transform(x)), atol=1e-3)


# Calibration -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "alpha"), [(9, 0.1), (19, 0.05), (80, 0.1), (37, 0.3), (50, 0.5)])
def test_threshold_is_the_order_statistic(n, alpha):
    guardian = make_guardian("mahalanobis").fit(S, A)
    guardian.calibrate(OTHER_S[:n], OTHER_A[:n], alpha)
    scores = np.sort(guardian.score(OTHER_S[:n], OTHER_A[:n]))
    rank = math.ceil(round((n + 1) * (1 - alpha), 9))
    assert float(guardian.threshold) == scores[rank - 1]
    assert guardian.is_ood(OTHER_S[:n], OTHER_A[:n]).sum() == n - rank


def test_p_values_by_their_definition():
    groups = RNG.integers(0, 24, 80)
    guardian = make_guardian("mahalanobis").fit(S, A)
    guardian.calibrate(OTHER_S, OTHER_A, 0.2, groups)
    calibration = guardian.score(OTHER_S, OTHER_A)
    s, a = S * 1.3, A
    scores, p = guardian.score(s, a), guardian.p_value(s, a)
    names = np.unique(groups)
    expected = [
        (1 + sum((calibration[groups == g] >= x).mean() for g in names)) / (len(names) + 1)
        for x in scores
    ]
    assert np.allclose(p, expected, atol=1e-6)
    assert np.array_equal(p <= 0.2 + 1e-7, guardian.is_ood(s, a))


def rates(name, draw, groups_of, alpha, repeats=200, **options):
    """Mean share of flagged rows per episode, of each repeat; every repeat calibrates afresh."""
    random = np.random.default_rng(1)
    out = np.zeros(repeats)
    guardian = make_guardian(name, **options)
    guardian.fit(*draw(random, 60)[:2])
    for i in range(repeats):
        s, a, episodes = draw(random, 19)
        guardian.calibrate(s, a, alpha, groups_of(episodes))
        s, a, episodes = draw(random, 60)
        flags = guardian.is_ood(s, a)
        out[i] = np.mean([flags[episodes == e].mean() for e in np.unique(episodes)])
    return out.mean(), out.std() / math.sqrt(repeats)


def independent(random, n):
    return random.normal(size=(n, 2)), random.normal(size=(n, 1)), np.arange(n)


def correlated(random, n):
    """Episodes that stay near a place of their own; those in the outskirts are short."""
    place = random.normal(size=(n, 2))
    episodes = np.repeat(np.arange(n), np.where(np.abs(place).max(1) > 1, 6, 30))
    s = place[episodes] + 0.1 * random.normal(size=(len(episodes), 2))
    return s, 0.1 * random.normal(size=(len(episodes), 1)), episodes


def test_false_alarms_on_independent_rows():
    mean, error = rates("mahalanobis", independent, lambda e: None, 0.1)
    assert abs(mean - 0.1) < 3 * error  # (n + 1)(1 - α) is whole, so the rate is α itself


def test_false_alarms_on_correlated_episodes():
    mean, error = rates("mahalanobis", correlated, lambda e: e, 0.1)
    assert 0.1 - 2 / 20 - 3 * error < mean < 0.1 + 3 * error
    # Rows taken for independent: the level is broken.
    mean, error = rates("mahalanobis", correlated, lambda e: None, 0.1, repeats=80)
    assert mean > 0.1 + 3 * error


def test_false_alarms_of_a_composite():
    options = {"parts": [make_guardian("mahalanobis"), make_guardian("knn", neighbours=3)]}
    mean, error = rates("composite", independent, lambda e: None, 0.2, 100, **options)
    assert 0.2 - 2 / 20 - 3 * error < mean < 0.2 + 3 * error


def test_composite_is_the_most_alarmed_part():
    guardian = made("composite")
    assert guardian.rows is guardian.parts[0].rows and len(guardian.rows) == 120
    s, a = np.float32(S[:20] * 3), A[:20]
    least = np.minimum(*[part.p_value(s, a) for part in guardian.parts])
    assert np.allclose(guardian.score(s, a), -np.log(least), rtol=1e-6)
    assert guardian.is_ood(np.float32([[50, 0, 0]]), A[:1]).all()
    # A calibration row's own p-value has no term for the unseen episode, see the class.
    own = [part.score(OTHER_S, OTHER_A) for part in guardian.parts]
    least = np.minimum(*[(x >= x[:, None]).sum(1) for x in own]) / 81
    assert np.isclose(float(guardian.threshold), np.sort(-np.log(least))[73 - 1], rtol=1e-5)


def test_costs():
    guardian = made("mahalanobis")
    far = np.float32([[100, 0, 0]])
    hard = guardian.cost(S, A)
    assert np.array_equal(hard, guardian.is_ood(S, A).astype(np.float32)) and 0 < hard.mean() < 0.5
    score, threshold = guardian.score(S, A), float(guardian.threshold)
    soft = guardian.cost(S, A, mode="soft", temperature=0.5)
    assert np.allclose(soft, 1 / (1 + np.exp(-(score - threshold) / 0.5)), atol=1e-5)
    assert guardian.cost(far, A[:1], mode="soft") > 0.999
    assert 0.01 < np.median(guardian.cost(OTHER_S, OTHER_A, mode="soft")) < 0.03


# Shapes and odd values -------------------------------------------------------------------------


def test_leading_axes_broadcast():
    guardian = make_guardian("knn", n_actions=4, neighbours=2).fit(S, np.arange(120) % 4)
    table = guardian.score(S[:6].reshape(2, 3, 1, 3), np.arange(4))
    assert table.shape == (2, 3, 4) and table.dtype == np.float32
    assert table[1, 0, 2] == guardian.score(S[3], np.int64(2))
    assert guardian.score(S[:0], np.arange(0)).shape == (0,)


def test_values_that_are_not_finite_are_out_of_the_data():
    guardian = make_guardian("knn", n_actions=4, neighbours=2).fit(S, np.arange(120) % 4)
    guardian.calibrate(OTHER_S, np.arange(80) % 4, 0.1)
    s = S[:4].copy()
    s[0, 1], s[1, 0] = np.nan, np.inf
    actions = np.array([0, 1, 9, 3])
    assert guardian.is_ood(s, actions)[:3].all()
    assert np.isposinf(guardian.score(s, actions)[:3]).all()
    assert guardian.cost(s, actions, mode="soft")[0] == 1
    assert guardian.p_value(s, actions)[0] == np.float32(1 / 81)


def test_ties_at_the_threshold_are_not_flagged():
    """Tabular data: a share of the calibration rows sits exactly at the threshold."""
    s = np.repeat(np.float32([0, 1, 2, 3]), [40, 30, 20, 10])[:, None]
    a = np.zeros(100, np.int64)
    guardian = make_guardian("count", n_actions=1).fit(s, a, groups=np.arange(100))
    guardian.calibrate(s[::2], a[::2], 0.15, groups=np.arange(100, 150))
    states, actions = np.float32([[0], [1], [2], [3], [4]]), np.zeros(5, np.int64)
    assert guardian.is_ood(states, actions).tolist() == [False, False, False, True, True]
    guardian.threshold.mul_(1 + 1e-6)  # what another device may round to
    assert guardian.is_ood(states, actions).tolist() == [False, False, False, True, True]


# Explanation and search ------------------------------------------------------------------------


def test_explain_names_the_nearest_rows():
    guardian = made("gmm", scaling="minmax", action_weight=0.5)
    found = guardian.explain(OTHER_S, OTHER_A, k=4)
    x, queries = guardian.feature_map(S, A), guardian.feature_map(OTHER_S, OTHER_A)
    distances = np.linalg.norm(queries[:, None].astype(np.float64) - x[None], axis=2)
    nearest = distances.argsort(1)[:, :4]
    assert np.array_equal(found.indices, nearest)
    assert np.allclose(found.distances, np.take_along_axis(distances, nearest, 1), atol=1e-5)
    assert np.allclose(found.observation_differences, OTHER_S[:, None] - S[nearest], atol=1e-5)
    assert np.allclose(found.action_differences, OTHER_A[:, None] - A[nearest], atol=1e-5)
    single = guardian.explain(torch.tensor(OTHER_S[7]), torch.tensor(OTHER_A[7]), k=4)
    assert single.indices.tolist() == nearest[7].tolist()


def test_explain_tells_levels_of_discrete_actions():
    actions = np.arange(120) % 6
    guardian = make_guardian("mahalanobis", n_actions=(2, 3)).fit(S, actions)
    found = guardian.explain(S[4], np.int64(4), k=1)
    assert found.indices == 4 and found.distances == 0
    assert found.action_differences.tolist() == [[0, 0]]
    found = guardian.explain(S[4], np.int64(1), k=1)
    row = actions[found.indices[0]]
    assert found.action_differences.tolist() == [[0 - row // 3, 1 - row % 3]]


@pytest.mark.parametrize("block", [2**24, 64])
def test_trees_and_blocks_find_the_same(block, monkeypatch):
    monkeypatch.setattr(search_module, "BLOCK", block)
    x = torch.tensor(RNG.normal(size=(300, 4)), dtype=torch.float32)
    x = torch.cat((x, x[:20], 1000 + x[:40]))  # equal rows; a cluster far from the origin
    queries = torch.cat((x[::3], 1.5 * torch.randn(40, 4, generator=torch.Generator())))
    brute = torch.cdist(queries.double(), x.double()).sort(1)
    results = [Search(x, tree)(queries, 7) for tree in (True, False)]
    for distances, rows in results:
        assert torch.allclose(distances.double(), brute.values[:, :7], atol=1e-4)
        assert (distances.diff(dim=1) >= 0).all()
        exact = (queries[:, None].double() - x[rows].double()).norm(dim=2)
        assert torch.allclose(distances.double(), exact, atol=1e-5)
    assert torch.equal(results[0][0], results[1][0])
    assert Search(x, False).index is None and Search(x, True).index is not None


@pytest.mark.parametrize("name", ["knn", "kde"])
def test_a_guardian_scores_the_same_on_both_paths(name, monkeypatch):
    monkeypatch.setattr(search_module, "TREE_ROWS", 1)
    trees = made(name)
    scores = trees.score(OTHER_S, OTHER_A)
    used = trees.search if name == "knn" else trees.kernels
    assert used().index is not None
    monkeypatch.setattr(search_module, "TREE_ROWS", 10**9)
    blocks = made(name)
    assert np.array_equal(scores, blocks.score(OTHER_S, OTHER_A))
    used = blocks.search if name == "knn" else blocks.kernels
    assert used().index is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", guardian_names())
def test_a_cuda_guardian_agrees(name):
    guardian = made(name)
    expected, flags = guardian.score(OTHER_S, OTHER_A), guardian.is_ood(OTHER_S, OTHER_A)
    guardian.to("cuda")
    s, a = torch.tensor(OTHER_S, device="cuda"), torch.tensor(OTHER_A, device="cuda")
    scores = guardian.score(s, a)
    assert scores.device.type == "cuda"
    assert np.allclose(scores.cpu(), expected, rtol=1e-4, atol=1e-4)
    assert np.array_equal(guardian.is_ood(s, a).cpu(), flags)


# State -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", guardian_names())
def test_state_round_trip(name, tmp_path: Path):
    options = {"pca": 0.9} if name == "knn" else {"scaling": "whiten"} if name == "gmm" else {}
    guardian = made(name, **options)
    save_file(guardian.state_dict(), tmp_path / "state.safetensors")
    fresh = make_guardian(name, **SMALL.get(name, {}), **options)
    fresh.load_state_dict(load_file(tmp_path / "state.safetensors"))
    queries = np.float32(OTHER_S * 1.2), OTHER_A
    assert np.array_equal(guardian.score(*queries), fresh.score(*queries))
    assert np.array_equal(guardian.is_ood(*queries), fresh.is_ood(*queries))
    assert np.array_equal(
        guardian.cost(*queries, mode="soft"), fresh.cost(*queries, mode="soft"))  # fmt: skip
    assert np.array_equal(guardian.explain(*queries).indices, fresh.explain(*queries).indices)
    assert not list(fresh.parameters()) or not any(p.requires_grad for p in fresh.parameters())
    assert fresh.state_dict().keys() == guardian.state_dict().keys()


def test_a_state_replaces_what_was_there():
    fitted = made("knn")
    fitted.score(S, A)
    empty = make_guardian("knn")
    other = make_guardian("knn").fit(S[:50] + 1, A[:50])
    fitted.load_state_dict(other.state_dict())
    assert np.array_equal(fitted.score(S, A), other.score(S, A)) and not fitted.calibrated
    fitted.load_state_dict(empty.state_dict())
    assert not fitted.fitted


# Mistakes --------------------------------------------------------------------------------------

IDS = np.arange(120) // 4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_guardian("knm"), "did you mean 'knn'"),
        (lambda: make_guardian("knn", neighbors=3), "did you mean 'neighbours'"),
        (lambda: make_guardian("knn", scaling="minmx"), "did you mean 'minmax'"),
        (lambda: make_guardian("knn", reduce="median"), "'mean' or 'kth'"),
        (lambda: make_guardian("knn", pca=0.9, scaling="whiten"), "whitening"),
        (lambda: make_guardian("composite"), "parts="),
        (lambda: make_guardian("knn").score(S, A), "call fit"),
        (lambda: make_guardian("knn").calibrate(S, A), "call fit"),
        (lambda: make_guardian("composite", parts=["knn"]).score(S, A), "call fit"),
        (lambda: FeatureMap()(S, A), "call fit"),
        (lambda: make_guardian("knn").fit(S, A).is_ood(S, A), "calibrate"),
        (lambda: make_guardian("knn").fit(S, A).cost(S, A), "calibrate"),
        (lambda: make_guardian("knn").fit(S, A).p_value(S, A), "calibrate"),
        (lambda: made("knn").cost(S, A, mode="sofd"), "did you mean 'soft'"),
        (lambda: made("knn").score(S[:, :2], A), "fitted on 3 and 2"),
        (lambda: made("knn").score(S, A[:, :1]), "fitted on 3 and 2"),
        (lambda: made("knn").score(S, A[:7]), "leading axes"),
        (lambda: made("knn").explain(S, A, k=121), "k from 1 to 120"),
        (lambda: make_guardian("knn").fit(S, A[:, 0]), "n_actions"),
        (lambda: make_guardian("knn").fit(S[:, :, None], A), r"\[N, O\]"),
        (lambda: make_guardian("knn", n_actions=3).fit(S, np.arange(120)), "do not exist"),
        (lambda: make_guardian("knn", n_actions=3).fit(S, np.zeros(120)), "int type"),
        (lambda: make_guardian("knn").fit(S * np.nan, A), "not finite"),
        (lambda: make_guardian("knn").fit(S[:5], A[:5]), "pass more rows"),
        (lambda: make_guardian("knn").fit(S, A, np.ones(120)), "takes no weights"),
        (lambda: make_guardian("count").fit(S, A, np.zeros(120)), "positive"),
        (lambda: make_guardian("knn").fit(S, A, groups=IDS[:9]), "one episode id per row"),
        (lambda: make_guardian("psos", degree=9).fit(S, A), "lower degree"),
        (lambda: make_guardian("ensemble").fit(S, A), "next_observations="),
        (lambda: made("knn").calibrate(OTHER_S, OTHER_A, alpha=1.0), "between 0 and 1"),
        (lambda: made("knn").calibrate(OTHER_S, OTHER_A, 0.1, IDS[:80] // 10), "at least 9"),
        (lambda: made("knn").calibrate(OTHER_S, OTHER_A, 0.01), "at least 99"),
        (lambda: made("knn").calibrate(S, A, 0.1), "used in fit"),
        (lambda: made("knn").calibrate(np.r_[OTHER_S, S[:40]], np.r_[OTHER_A, A[:40]], 0.1),
         "40 of 120"),
        (lambda: make_guardian("knn").fit(S, A, groups=IDS).calibrate(
            OTHER_S, OTHER_A, 0.1, np.arange(80) // 4 + 28), "2 calibration episodes, 28"),
    ],
)  # fmt: skip
def test_mistakes_are_told_in_one_line(call, message):
    with pytest.raises(SaferlError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_tabular_rows_that_repeat_are_no_overlap():
    random = np.random.default_rng(0)
    s, a = random.integers(0, 5, (600, 1)).astype(np.float32), random.integers(0, 4, 600)
    guardian = make_guardian("count", n_actions=4).fit(s[:300], a[:300])
    guardian.calibrate(s[300:], a[300:], 0.1)
    # Words are ids too, and ids decide where both calls have them.
    ids = np.array([f"stay {i // 10}" for i in range(600)])
    guardian.fit(s[:300], a[:300], groups=ids[:300])
    guardian.calibrate(s[300:], a[300:], 0.1, groups=ids[300:])
    with pytest.raises(SaferlError, match="stay 29"):
        guardian.calibrate(s[295:], a[295:], 0.1, groups=ids[295:])
