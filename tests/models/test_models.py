"""Learned models: against counts by hand, known dynamics, and the exact tables of ICU-Sepsis."""

from __future__ import annotations

import importlib
import math
from importlib import metadata

import numpy as np
import pytest
import torch

from saferl.data import Dataset
from saferl.errors import SaferlError
from saferl.models import logged as replayed
from saferl.models import make_model
from saferl.models.mdp import exact_evaluate
from saferl.rng import MemberRandom
from saferl.safety.guardians import FeatureMap
from saferl.spec import Spec

DISCRETE = Spec(1, 2, discrete=True)

# (state, action, next, reward, cost, outcome): two episodes that end differently and one cut off.
ROWS = [
    (0, 0, 1, 1.0, 0.0, 0), (1, 0, 2, 2.0, 1.0, 0), (2, 1, 9, 5.0, 2.0, 2),
    (0, 0, 1, 1.5, 0.0, 0), (1, 1, 0, 0.5, 3.0, 0), (0, 0, 9, -1.0, 4.0, 1),
    (1, 0, 2, 2.0, 1.0, 0), (2, 1, 2, 0.0, 0.0, 0),
]  # fmt: skip


def logged() -> tuple[Dataset, np.ndarray]:
    s, a, n, r, c, outcome = (np.array(column) for column in zip(*ROWS))
    timeouts = np.arange(len(ROWS)) == len(ROWS) - 1
    dataset = Dataset.from_arrays(
        s[:, None].astype(np.float32), a, r, outcome > 0, timeouts,
        n[:, None].astype(np.float32), c, n_actions=2,
    )  # fmt: skip
    return dataset, outcome


def seeds(*numbers: int, stream: int = 0) -> MemberRandom:
    return MemberRandom(numbers or (0,), stream=stream)


def fitted(name: str, **options):
    dataset, outcome = logged()
    model = make_model(name, seeds(), DISCRETE, outcomes=2, **options)
    return model.fit(dataset, seeds(), outcomes=outcome)


def ask(model, state: float, action: int, rows: int = 20_000):
    """Many steps from one pair, as a dictionary (next, reward, cost, outcome) → share."""
    step = model.step(
        torch.full((1, rows, 1), float(state)), torch.full((1, rows), action), seeds(3)
    )
    assert step.costs.shape == (1, rows, 1) and step.outcomes.dtype == torch.int64
    assert ((step.outcomes > 0) == (step.terminals == 1)).all()
    columns = torch.stack([step.next_observations[0, :, 0], step.rewards[0], step.costs[0, :, 0],
                           step.outcomes[0].float()], 1)  # fmt: skip
    distinct, count = columns.unique(dim=0, return_counts=True)
    return {tuple(row): n / rows for row, n in zip(distinct.tolist(), count.tolist())}


def close(found: dict, expected: dict) -> None:
    """The same outcomes, with shares within four standard errors of 20 000 draws."""
    assert found.keys() == expected.keys()
    for key, share in expected.items():
        assert found[key] == pytest.approx(share, abs=4 * math.sqrt(0.25 / 20_000))


# Tables ------------------------------------------------------------------------------------------


def test_table_replays_aligned_rows_of_the_pair():
    model = fitted("tabular")
    # Reward, cost and end come from the row of the successor: no mixed-up row is ever seen.
    third = {(1, 1, 0, 0): 1 / 3, (1, 1.5, 0, 0): 1 / 3, (9, -1, 4, 1): 1 / 3}
    close(ask(model, 0, 0), third)
    close(ask(model, 2, 1), {(9, 5, 2, 2): 0.5, (2, 0, 0, 0): 0.5})
    close(ask(model, 1, 1), {(0, 0.5, 3, 0): 1.0})


def test_table_fills_unseen_pairs_with_the_nearest():
    # (0, 1) and (2, 0) were never logged. With a far action the nearest pair has the same action;
    # with a near one it has the same state.
    far = fitted("tabular", features=FeatureMap(n_actions=2, action_weight=100.0))
    close(ask(far, 0, 1), {(0, 0.5, 3, 0): 1.0})
    near = fitted("tabular", features=FeatureMap(n_actions=2, action_weight=0.01))
    assert ask(near, 0, 1).keys() == ask(near, 0, 0).keys()
    close(ask(near, 2, 0), {(9, 5, 2, 2): 0.5, (2, 0, 0, 0): 0.5})


def test_table_with_a_prior_borrows_from_the_state():
    # Pair (1, 1) has one row, state 1 has three, two of them like each other; κ = 2.
    model = fitted("tabular", prior=2.0)
    own, pooled = 1 / 3, 2 / 3
    expected = {(0, 0.5, 3, 0): own + pooled / 3, (2, 2, 1, 0): pooled * 2 / 3}
    close(ask(model, 1, 1), expected)
    mean = model.expect(torch.ones(1, 1, 1), torch.ones(1, 1, dtype=torch.int64))
    assert mean.rewards.item() == pytest.approx(sum(k[1] * p for k, p in expected.items()))
    assert mean.costs.item() == pytest.approx(sum(k[2] * p for k, p in expected.items()))
    mdp, states = model.mdp(), model.states[:, 0].tolist()
    pair = states.index(1) * 2 + 1
    law = mdp.transitions.toarray()[pair]
    assert law[states.index(0)] == pytest.approx(own + pooled / 3)
    assert law[states.index(2)] == pytest.approx(pooled * 2 / 3)
    assert mdp.rewards.ravel()[pair] == pytest.approx(mean.rewards.item())


def test_table_as_an_mdp():
    model = fitted("tabular", states=np.array([[0.0], [1.0], [2.0]]))
    mdp = model.mdp(["harm"])
    assert model.counts.tolist() == [[3, 0], [2, 1], [0, 2]]
    assert mdp.supported.tolist() == [[True, False], [True, True], [False, True], *[[True] * 2] * 2]
    assert mdp.terminal.tolist() == [False] * 3 + [True] * 2
    assert mdp.initial.tolist() == pytest.approx([2 / 3, 1 / 3, 0, 0, 0])  # the third starts in 1
    rows = mdp.transitions.toarray().reshape(5, 2, 5)
    assert rows[0, 0].tolist() == pytest.approx([0, 2 / 3, 0, 1 / 3, 0])  # 3 is outcome 1
    assert rows[2, 1].tolist() == pytest.approx([0, 0, 0.5, 0, 0.5])
    assert mdp.rewards[0, 0] == pytest.approx(0.5) and mdp.costs["harm"][0, 0] == pytest.approx(
        4 / 3
    )
    # By hand: 0 → 1 (⅔) → 2 → half a chance to end at each of its steps. 4 steps from state 0 on
    # average if it survives the first, else one.
    policy = np.array([0, 0, 1, 0, 0])
    assert exact_evaluate(mdp, policy).length == pytest.approx(2 / 3 * (1 + 2 / 3 * 3) + 1 / 3 * 3)
    with pytest.raises(SaferlError, match="1 costs, got 2 names"):
        model.mdp(["a", "b"])


def test_table_likelihood():
    model = fitted("tabular")
    dataset, outcome = logged()
    report = model.validate(dataset, seeds(), outcomes=outcome)
    chances = [2 / 3, 1, 0.5, 2 / 3, 1, 1 / 3, 1, 0.5]
    smooth, total = replayed.SMOOTHING, len(model.states) + 2
    expected = np.mean([math.log((1 - smooth) * p + smooth / total) for p in chances])
    assert report["log_likelihood"] == pytest.approx(expected)


def test_table_of_continuous_actions():
    rng = np.random.default_rng(0)
    s = rng.integers(0, 3, 400)
    a = rng.choice([-1.0, 0.0, 1.0], (400, 1))
    n = (s + a[:, 0]) % 3
    ends = np.arange(400) % 20 == 19
    dataset = Dataset.from_arrays(s[:, None], a, a[:, 0], ends, None, n[:, None],
                                  action_low=-1.0, action_high=1.0)  # fmt: skip
    spec = Spec(1, 1, action_low=(-1.0,), action_high=(1.0,))
    model = make_model("tabular", seeds(), spec, costs=0).fit(dataset, seeds())
    assert sorted(model.actions[:, 0].tolist()) == [-1, 0, 1] and len(model.states) == 3
    step = model.step(torch.tensor([[[2.0], [1.0]]]), torch.tensor([[[0.9], [-0.8]]]), seeds())
    assert step.next_observations.flatten().tolist() == [0.0, 0.0]
    assert step.costs.shape == (1, 2, 0)


# Nearest neighbours ------------------------------------------------------------------------------


def line() -> Dataset:
    """One row per pair on a line of states: 0, 1, 3; the middle row ends an episode."""
    return Dataset.from_arrays(
        np.array([[0.0], [1.0], [3.0]]), np.zeros((3, 1)), np.array([10.0, 20.0, 30.0]),
        np.array([False, True, True]), None, np.array([[5.0], [6.0], [7.0]]), np.array([1.0, 2, 3]),
        action_low=-1.0, action_high=1.0,
    )  # fmt: skip


CONTINUOUS = Spec(1, 1, action_low=(-1.0,), action_high=(1.0,))


def test_one_neighbour_is_a_look_up():
    model = make_model("knn", seeds(0, 1), CONTINUOUS).fit(line(), seeds(0, 1))
    s = torch.tensor([[[0.4], [0.6], [5.0]], [[1.9], [2.1], [-1.0]]])
    step = model.step(s, torch.zeros(2, 3, 1), seeds(0, 1))
    assert step.next_observations[..., 0].tolist() == [[5, 6, 7], [6, 7, 5]]
    assert step.rewards.tolist() == [[10, 20, 30], [20, 30, 10]]
    assert step.costs[..., 0].tolist() == [[1, 2, 3], [2, 3, 1]]
    assert step.terminals.tolist() == [[0, 1, 1], [1, 1, 0]]


def test_rows_that_are_kept_are_evenly_spaced():
    model = make_model("knn", seeds(), CONTINUOUS, rows=2).fit(line(), seeds())
    assert sorted(model.rewards.tolist()) == [10, 30]  # the first and the last of three
    with pytest.raises(SaferlError, match="rows must be 1 or more"):
        make_model("knn", seeds(), CONTINUOUS, rows=0)


def test_neighbours_are_drawn_by_kernel_weight():
    features = FeatureMap()
    model = make_model("knn", seeds(), CONTINUOUS, k=2, bandwidth=1.0, features=features)
    model.fit(line(), seeds())
    std = np.std([0.0, 1.0, 3.0])
    near, far = (math.exp(-((d / std) ** 2) / 2) for d in (0.25, 0.75))
    step = model.step(torch.full((1, 20_000, 1), 0.25), torch.zeros(1, 20_000, 1), seeds())
    share = (step.rewards == 10).float().mean().item()
    assert set(step.rewards.unique().tolist()) == {10, 20}  # the third is never one of two
    assert share == pytest.approx(near / (near + far), abs=0.015)
    mean = model.expect(torch.tensor([[[0.25]]]), torch.zeros(1, 1, 1))
    assert mean.rewards.item() == pytest.approx((10 * near + 20 * far) / (near + far), rel=1e-4)
    assert mean.terminals.item() == pytest.approx(far / (near + far), rel=1e-4)
    # Given that the episode goes on, only the first row speaks.
    assert mean.next_observations.item() == pytest.approx(5.0)


def test_repeated_pairs_count_as_often_as_logged():
    model = fitted("knn", k=2, bandwidth=1e6, features=FeatureMap(n_actions=2))
    # Query between (0, 0), logged three times, and (1, 0), logged twice.
    rows = ask(model, 0.5, 0)
    assert sum(p for key, p in rows.items() if key[0] == 2) == pytest.approx(2 / 5, abs=0.015)
    assert model.pairs.shape[0] == 4


# Ensemble ----------------------------------------------------------------------------------------

ENSEMBLE = dict(hidden=(32,), ensemble=2, batch_size=64, lr=5e-3, epochs=20, patience=4)


def noisy(seed: int, episodes: int = 300) -> Dataset:
    """s' = s + 0.5 a + 0.3 ε; reward -s; cost 1 for a > 0; ends where s + 0.5 a > 1 or at 10."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(episodes):
        s = rng.uniform(-1, 1)
        for t in range(10):
            a = rng.uniform(-1, 1)
            n, end = s + 0.5 * a + 0.3 * rng.standard_normal(), s + 0.5 * a > 1
            # What follows an end is a placeholder, of which a model must learn nothing.
            rows.append((s, a, -s, end, t == 9 and not end, 50.0 if end else n, float(a > 0)))
            s = n
            if end:
                break
    s, a, r, end, cut, n, c = (np.array(column) for column in zip(*rows))
    return Dataset.from_arrays(s[:, None], a[:, None], r, end, cut, n[:, None], c,
                               action_low=-1.0, action_high=1.0)  # fmt: skip


@pytest.fixture(scope="module")
def data() -> tuple[Dataset, Dataset]:
    return noisy(0), noisy(1, 40)


@pytest.fixture(scope="module")
def ensemble(data):
    model = make_model("ensemble", seeds(3, 4), CONTINUOUS, **ENSEMBLE)
    return model.fit(data[0], seeds(3, 4, stream=5))


def test_ensemble_learns_means_noise_costs_and_ends(ensemble):
    n = 4000
    s, a = torch.full((2, n, 1), 0.5), torch.full((2, n, 1), 0.6)
    step = ensemble.step(s, a, seeds(7, 8))
    going = step.terminals == 0
    moved = step.next_observations[..., 0][going]
    assert moved.mean().item() == pytest.approx(0.8, abs=0.06)
    assert moved.std().item() == pytest.approx(0.3, abs=0.05)
    assert step.rewards.mean().item() == pytest.approx(-0.5, abs=0.1)
    assert step.costs.mean().item() == pytest.approx(1.0, abs=0.15)
    assert step.costs.min() >= 0 and step.costs.max() <= 1  # kept to what the data hold
    edge = ensemble.expect(torch.full((2, 1, 1), 0.9), torch.tensor([[[0.9]], [[-0.9]]]))
    ends = edge.terminals[:, 0].tolist()
    assert ends[0] > 0.7 and ends[1] < 0.2
    assert edge.outcomes.sum(-1).flatten().tolist() == pytest.approx([1, 1])


def test_ensemble_report(ensemble, data):
    report = ensemble.validate(data[1], seeds(0, 1))
    std = data[1].observations.std()
    assert report["observation_error"] == pytest.approx(0.3 / std, rel=0.15)  # the noise remains
    assert report["observation_error_no_change"] > 1.2 * report["observation_error"]
    assert report["reward_error"] < 0.1 and report["cost_error"] < 0.35
    assert report["terminal_accuracy"] > 0.93
    assert report["terminal_rate"] == pytest.approx(report["terminal_rate_logged"], abs=0.02)
    truth = -0.5 - math.log(0.3 * math.sqrt(2 * math.pi))
    assert truth - 0.25 < report["log_likelihood"] < truth + 0.05
    assert report["rollout_error_1"] < report["rollout_error_5"]


def test_ensemble_disagrees_where_it_has_not_been(ensemble):
    zero = torch.zeros(2, 1, 1)
    inside, outside = (ensemble.disagreement(zero + s, zero) for s in (0.0, 20.0))
    assert (outside > 5 * inside).all()


def test_members_of_an_ensemble_do_not_meet(ensemble, data):
    alone = make_model("ensemble", seeds(4), CONTINUOUS, **ENSEMBLE)
    alone.fit(data[0], seeds(4, stream=5))
    for one, two in zip(alone.parameters(), ensemble.parameters()):
        assert torch.allclose(one[0], two[1], atol=2e-4)


def test_early_stopping_keeps_the_best_weights(data):
    lines, seen = [], []
    settings = ENSEMBLE | {"epochs": 40, "patience": 2, "lr": 0.1}  # so high that it goes astray
    model = make_model("ensemble", seeds(), CONTINUOUS, **settings)
    held_out = model._held_out

    def watched(*rows):
        seen.append((rows, held_out(*rows)))
        return seen[-1][1]

    model._held_out = watched
    model.fit(data[0], seeds(), say=lines.append)
    assert int(lines[0].split()[1]) == len(seen) < 40
    losses = torch.stack([loss for _, loss in seen])
    least = losses.amin(0)
    kept = held_out(*seen[-1][0])
    assert (kept <= least + 2e-3 * least.abs()).all() and (losses[-1] > least).any()


# All kinds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tabular", "knn", "ensemble"])
def test_state_moves_into_a_fresh_model(name):
    options = {"ensemble": ENSEMBLE | {"epochs": 1}, "knn": {"k": 2}, "tabular": {"prior": 1.0}}[
        name
    ]
    model = fitted(name, **options)
    fresh = make_model(name, seeds(9), DISCRETE, outcomes=2, **options)
    fresh.load_state_dict(model.state_dict())
    s = torch.tensor([[[0.0], [1.0], [2.0], [2.0]]])
    a = torch.tensor([[0, 1, 1, 0]])
    for one, two in zip(model.step(s, a, seeds(1)), fresh.step(s, a, seeds(1))):
        assert torch.equal(one, two)
    for one, two in zip(model.expect(s, a), fresh.expect(s, a)):
        assert torch.equal(one, two)


@pytest.mark.parametrize("name", ["tabular", "knn"])
def test_report_by_hand(name):
    """Deterministic data are told back without error; a shifted copy is off by the shift."""
    s = np.tile(np.arange(5.0), 4)
    ends = np.arange(20) % 5 == 4
    arrays = (s[:, None], np.zeros(20, np.int64), s, ends, None, s[:, None] + 1, 2 * s)
    model = make_model(name, seeds(), DISCRETE).fit(
        Dataset.from_arrays(*arrays, n_actions=2), seeds()
    )
    report = model.validate(Dataset.from_arrays(*arrays, n_actions=2), seeds(), steps=(2, 4))
    for key in ("observation_error", "reward_error", "cost_error", "rollout_error_4"):
        assert report[key] == pytest.approx(0, abs=1e-5)
    assert report["terminal_accuracy"] == 1 and report["terminal_rate_logged"] == 0.2
    assert report["rollout_alive_4"] == report["rollout_alive_4_logged"] == 1
    assert report["rollout_cost_bias_4"] == pytest.approx(0, abs=1e-6)
    std = s.std()
    assert report["observation_error_no_change"] == pytest.approx(1 / std)
    shifted = (arrays[0], arrays[1], arrays[2] + 3, ends, None, arrays[5] + 0.5, arrays[6] - 1)
    report = model.validate(Dataset.from_arrays(*shifted, n_actions=2), seeds(), steps=(2,))
    assert report["observation_error"] == pytest.approx(0.5 / std)
    assert report["rollout_error_2"] == pytest.approx(0.5 / std)
    assert report["reward_error"] == pytest.approx(3) and report["cost_error"] == pytest.approx(1)
    assert report["rollout_cost_bias_2"] == pytest.approx(2)


def test_report_of_a_model_that_ends_too_early():
    def counted(steps: int, terminal: bool, extra: float) -> Dataset:
        s, last = np.arange(float(steps)), np.arange(steps) == steps - 1
        return Dataset.from_arrays(
            s[:, None], np.zeros(steps, int), s, last & terminal, last & (not terminal),
            s[:, None] + 1, 2 * s + extra, n_actions=2,
        )  # fmt: skip

    model = make_model("knn", seeds(), DISCRETE).fit(counted(5, True, 0.0), seeds())
    report = model.validate(counted(7, False, 1.0), seeds(), steps=(4, 7))
    assert report["rollout_alive_4"] == 1 and report["rollout_error_4"] == 0
    assert report["rollout_alive_7"] == 0 and report["rollout_alive_7_logged"] == 1
    assert "rollout_error_7" not in report  # there is nothing to compare
    assert report["rollout_cost_bias_7"] == -5  # the five steps that both lived


def test_several_costs():
    dataset, outcome = logged()
    costs = np.stack([dataset.costs, 10 - dataset.costs], 1)
    model = make_model("tabular", seeds(), DISCRETE, costs=2, outcomes=2)
    model.fit(dataset, seeds(), costs=costs, outcomes=outcome)
    step = model.step(torch.ones(1, 9, 1), torch.ones(1, 9, dtype=torch.int64), seeds())
    assert (step.costs == torch.tensor([3.0, 7.0])).all()
    report = model.validate(dataset, seeds(), costs=costs, outcomes=outcome)
    assert report["cost_error_0"] == pytest.approx(report["cost_error_1"])


def test_wrong_input(monkeypatch):
    dataset, outcome = logged()
    for name, options, message in (
        ("tabula", {}, "did you mean 'tabular'"),
        ("knn", {"neighbours": 3}, "unknown option of the model knn"),
        ("knn", {"k": 0}, "k must be 1 or more"),
        ("knn", {"k": 2, "bandwidth": 0.0}, "bandwidth above 0"),
        ("tabular", {"prior": -1.0}, "0 or more"),
        ("ensemble", {"holdout": 1.0}, "between 0 and 1"),
        ("knn", {"outcomes": 0}, "outcomes 1 or more"),
    ):
        with pytest.raises(SaferlError, match=message):
            make_model(name, seeds(), DISCRETE, **options)
    for name in ("tabular", "knn", "ensemble"):
        with pytest.raises(SaferlError, match="not fitted"):
            make_model(name, seeds(), DISCRETE, outcomes=2).validate(dataset, seeds())
        with pytest.raises(SaferlError, match="made for"):
            make_model(name, seeds(), Spec(2, 2, discrete=True)).fit(dataset, seeds())
        model = make_model(name, seeds(), DISCRETE)
        with pytest.raises(SaferlError, match="0 … 1"):
            model.fit(dataset, seeds(), outcomes=outcome)
        with pytest.raises(SaferlError, match="above 0 at terminal rows"):
            model.fit(dataset, seeds(), outcomes=np.zeros(8, int))
        with pytest.raises(SaferlError, match="1 columns, the model has 2"):
            make_model(name, seeds(), DISCRETE, costs=2).fit(dataset, seeds())
        free = Dataset.from_arrays(np.zeros((4, 1)), np.zeros(4, int), np.zeros(4),
                                   [0, 0, 0, 1], n_actions=2)  # fmt: skip
        with pytest.raises(SaferlError, match="no costs"):
            model.fit(free, seeds())
    monkeypatch.setattr(replayed, "MAX_PAIRS", 3)
    with pytest.raises(SaferlError, match="too many for a table"):
        make_model("tabular", seeds(), DISCRETE).fit(dataset, seeds())


# ICU-Sepsis: planning in the learned table, evaluated in the true one ----------------------------


@pytest.fixture(scope="module")
def bench():
    """The study that plans in learned models of ICU-Sepsis."""
    try:
        metadata.distribution("icu-sepsis")
    except metadata.PackageNotFoundError:
        pytest.skip("needs the tables of icu-sepsis")
    return importlib.import_module("benchmarks.icu.planning")


def test_icu_planning_with_a_guard(bench):
    """Survival within 0.01 of values computed independently (means of three other datasets)."""
    rows = bench.cell(20_000, 0, "mean", True)
    for guard, survival in (
        ("none", 0.782), ("count ≥ 1", 0.783), ("count ≥ 5", 0.797), ("count ≥ 10", 0.818),
        ("count ≥ 20", 0.830), ("kde 13 α 0.05", 0.792), ("kde 13 α 0.10", 0.814),
        ("kde 13 α 0.15", 0.830), ("kde 13 α 0.20", 0.824), ("OGSRL α 0.05", 0.785),
        ("clone", 0.782),
    ):  # fmt: skip
        assert rows[guard]["survival"] == pytest.approx(survival, abs=0.01), guard
    # Unguarded the model promises the moon.
    assert rows["none"]["predicted"] > 0.98 and rows["none"]["ood_rate"] > 0.9
    guarded, kept = rows["kde 13 α 0.15"], rows["kde 13 α 0.15, budget"]
    assert guarded["survival"] >= 0.82 and guarded["ood_rate"] <= 0.08
    assert guarded["predicted"] - guarded["survival"] < 0.07
    # The model keeps the budget and reality does not: a margin is needed.
    assert kept["predicted_cost"] == pytest.approx(0.592, abs=1e-5)
    assert 0.65 < kept["cost"] < guarded["cost"] - 0.02
    assert kept["survival"] > guarded["survival"] - 0.01


@pytest.mark.slow
def test_icu_planning_where_unsupported_actions_kill(bench):
    rows = bench.cell(5000, 0, "terminate", True)
    assert rows["none"]["survival"] < 0.3 and rows["none"]["predicted"] > 0.9
    for n, survival in ((1, 0.801), (5, 0.804), (10, 0.801), (20, 0.794)):
        assert rows[f"count ≥ {n}"]["survival"] == pytest.approx(survival, abs=0.01)
    leaky = rows["kde 13 α 0.01"]
    assert leaky["survival"] == pytest.approx(0.64, abs=0.04)
    assert leaky["ood_rate"] == pytest.approx(0.023, abs=0.01)
