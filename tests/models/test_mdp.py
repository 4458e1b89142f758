"""Exact evaluation and planning, against closed forms, enumeration and a linear program."""

from __future__ import annotations

import dataclasses
import itertools
from importlib import metadata

import numpy as np
import pytest
from scipy.optimize import linprog

from saferl.errors import SaferlError
from saferl.models.mdp import TabularMDP, exact_evaluate, mixture, sample_episodes
from saferl.models.planning import plan, plan_constrained


def chain(stay: float = 0.75) -> TabularMDP:
    """State 0 waits (action 0: stays with probability ``stay``) or ends at once (action 1).

    Waiting pays 1 and costs 2 per step; ending pays 3. States 1 and 2 are ends.
    """
    transitions = np.zeros((3, 2, 3))
    transitions[0, 0] = [stay, 1 - stay, 0]
    transitions[0, 1, 2] = 1
    rewards = np.array([[1.0, 3.0], [9.0, 9.0], [9.0, 9.0]])
    costs = {"wait": np.array([[2.0, 0.0], [9.0, 9.0], [9.0, 9.0]])}
    supported = np.array([[False, True], [True, True], [True, True]])
    return TabularMDP(transitions, rewards, [1, 0, 0], [False, True, True], costs, supported)


def random_mdp(seed: int, states: int = 4, actions: int = 3) -> TabularMDP:
    """Random transitions; the last state ends the episode and is reached from everywhere."""
    rng = np.random.default_rng(seed)
    transitions = rng.dirichlet(np.ones(states) * 0.5, (states, actions))
    transitions[..., -1] += 0.1
    transitions /= transitions.sum(-1, keepdims=True)
    terminal = np.arange(states) == states - 1
    costs = {"a": rng.random((states, actions)), "b": rng.random((states, actions))}
    initial = np.append(rng.dirichlet(np.ones(states - 1)), 0)
    return TabularMDP(transitions, rng.random((states, actions)), initial, terminal, costs)


def test_closed_forms():
    mdp = chain(0.75)
    found = exact_evaluate(mdp, np.array([0, 0, 0]))
    # Waiting lasts 1 / (1 - 0.75) = 4 steps; the ends pay and cost nothing.
    assert found.length == pytest.approx(4) and found.value == pytest.approx(4)
    assert found.costs["wait"] == pytest.approx(8)
    assert found.ood == pytest.approx(4) and found.ood_rate == pytest.approx(1)
    assert found.visits[0].tolist() == pytest.approx([4, 0])
    discounted = exact_evaluate(mdp, np.array([0, 0, 0]), discount=0.9)
    assert discounted.value == pytest.approx(1 / (1 - 0.9 * 0.75))
    # With probability ½ each: 1 / (1 - ½·¾) steps, half of them of either kind.
    half = np.full((3, 2), 0.5)
    found, steps = exact_evaluate(mdp, half), 1 / (1 - 0.375)
    assert found.value == pytest.approx(0.5 * steps * 1 + 0.5 * steps * 3)
    assert found.ood_rate == pytest.approx(0.5)
    other = dataclasses.replace(mdp, supported=np.array([[True, False]] * 3))
    assert exact_evaluate(other, half).ood == pytest.approx(0.5 * steps)
    assert exact_evaluate(dataclasses.replace(mdp, supported=None), half).ood == 0


def test_sparse_and_dense_transitions_are_the_same():
    dense = random_mdp(0)
    rows = dense.transitions.toarray().reshape(4, 3, 4)
    again = TabularMDP(rows, dense.rewards, dense.initial, dense.terminal, dense.costs)
    assert exact_evaluate(again, [0, 1, 2, 0]).value == exact_evaluate(dense, [0, 1, 2, 0]).value


@pytest.mark.parametrize("discount", [1.0, 0.9])
@pytest.mark.parametrize("seed", range(3))
def test_plan_is_the_best_of_all_policies(seed, discount):
    mdp = random_mdp(seed)
    allowed = np.random.default_rng(seed).random((4, 3)) < 0.7
    allowed[:, 0] = True

    def best(choices):
        policies = itertools.product(*choices, [0])
        return max(exact_evaluate(mdp, np.array(p), discount).value for p in policies)

    found = plan(mdp, discount=discount)
    assert exact_evaluate(mdp, found.policy, discount).value == pytest.approx(best([range(3)] * 3))
    assert mdp.initial @ found.values == pytest.approx(best([range(3)] * 3))
    guarded = plan(mdp, allowed=allowed, discount=discount)
    assert allowed[np.arange(3), guarded.policy[:3]].all()
    some = best([np.flatnonzero(row) for row in allowed[:3]])
    assert exact_evaluate(mdp, guarded.policy, discount).value == pytest.approx(some)
    least = plan(mdp, -mdp.costs["a"], discount=discount, start=found.policy)
    worst = exact_evaluate(mdp, least.policy, discount).costs["a"]
    everything = [exact_evaluate(mdp, np.array([*p, 0]), discount).costs["a"]
                  for p in itertools.product(range(3), repeat=3)]  # fmt: skip
    assert worst == pytest.approx(min(everything))


def occupancy_optimum(mdp: TabularMDP, budgets: dict[str, float], discount: float) -> float:
    """The best return under budgets by the linear program over visits, state by state."""
    states, actions = mdp.rewards.shape
    live = np.flatnonzero(~mdp.terminal)
    flow = np.zeros((len(live), states * actions))
    rows = mdp.transitions.toarray()
    for i, state in enumerate(live):
        flow[i, state * actions : (state + 1) * actions] += 1
        for pair in range(states * actions):
            flow[i, pair] -= discount * rows[pair, state] * (not mdp.terminal[pair // actions])
    found = linprog(
        -mdp.rewards.ravel(),
        A_ub=np.array([mdp.costs[name].ravel() for name in budgets]),
        b_ub=list(budgets.values()),
        A_eq=flow,
        b_eq=mdp.initial[live],
        bounds=[(0, 0 if mdp.terminal[p // actions] else None) for p in range(states * actions)],
    )
    assert found.status == 0
    return -found.fun


@pytest.mark.parametrize("discount", [1.0, 0.95])
@pytest.mark.parametrize("seed", range(4))
def test_constrained_plan_is_the_optimum_of_the_linear_program(seed, discount):
    mdp = random_mdp(seed, 6, 4)
    best = exact_evaluate(mdp, plan(mdp, discount=discount).policy, discount)
    budgets = {}
    for name in ("a", "b"):
        least = plan(mdp, -mdp.costs[name], discount=discount).policy
        low = exact_evaluate(mdp, least, discount).costs[name]
        budgets[name] = 0.5 * low + 0.5 * best.costs[name]
    wanted = {"a": budgets["a"]} if seed % 2 else budgets
    try:
        found = plan_constrained(mdp, wanted, discount=discount)
    except SaferlError:
        pytest.fail("these budgets can be kept")
    value = occupancy_optimum(mdp, wanted, discount)
    assert found.evaluation.value == pytest.approx(value, abs=2e-6)
    for name, limit in wanted.items():
        assert found.evaluation.costs[name] <= limit + 1e-6
        if found.multipliers[name] > 1e-6:  # a price is paid only where the budget binds
            assert found.evaluation.costs[name] == pytest.approx(limit, abs=1e-6)
    # The mixture of deterministic policies and the one stochastic policy are worth the same.
    parts = [(w, exact_evaluate(mdp, p, discount)) for w, p in found.mixture]
    assert sum(w for w, _ in parts) == pytest.approx(1)
    assert sum(w * e.value for w, e in parts) == pytest.approx(value, abs=2e-6)
    for name in wanted:
        spent = sum(w * e.costs[name] for w, e in parts)
        assert spent == pytest.approx(found.evaluation.costs[name], abs=1e-6)


def test_budgets_that_bind_nothing_and_none_at_all():
    mdp = random_mdp(1)
    best = exact_evaluate(mdp, plan(mdp).policy)
    for budgets in ({}, {"a": best.costs["a"] + 1}):
        found = plan_constrained(mdp, budgets)
        assert found.evaluation.value == pytest.approx(best.value)
        assert all(price == pytest.approx(0, abs=1e-9) for price in found.multipliers.values())


def test_budget_at_and_below_the_lowest_cost():
    mdp = random_mdp(2)
    low = exact_evaluate(mdp, plan(mdp, -mdp.costs["a"]).policy).costs["a"]
    found = plan_constrained(mdp, {"a": low})
    assert found.evaluation.costs["a"] == pytest.approx(low, abs=1e-6)
    with pytest.raises(SaferlError, match=f"lowest reachable cost is a {low:.4g}"):
        plan_constrained(mdp, {"a": low - 0.01})
    other = exact_evaluate(mdp, plan(mdp, -mdp.costs["b"]).policy).costs["b"]
    with pytest.raises(SaferlError, match=f"a {low:.4g}, b {other:.4g} .each on its own"):
        plan_constrained(mdp, {"a": low, "b": other})


def test_samples_agree_with_exact_values():
    mdp = random_mdp(3)
    policy = np.random.default_rng(0).dirichlet(np.ones(3), 4)
    exact = exact_evaluate(mdp, policy)
    log = sample_episodes(mdp, policy, 20_000, seed=1)
    pairs = np.zeros((4, 3))
    np.add.at(pairs, (log["states"], log["actions"]), 1 / 20_000)
    assert np.abs(pairs - exact.visits).max() < 0.03
    assert (log["terminals"] == mdp.terminal[log["next_states"]]).all()
    inside = ~log["terminals"][:-1]
    assert (log["next_states"][:-1][inside] == log["states"][1:][inside]).all()
    assert log["terminals"].sum() == 20_000 and not log["timeouts"].any()


def test_samples_stop_at_the_horizon():
    log = sample_episodes(chain(0.9), np.array([0, 0, 0]), 500, seed=0, horizon=3)
    ends = np.flatnonzero(log["terminals"] | log["timeouts"])
    lengths = np.diff(np.concatenate([[-1], ends]))
    assert len(ends) == 500 and lengths.max() == 3
    assert (log["timeouts"][ends] == (log["next_states"][ends] == 0)).all()
    assert not (log["timeouts"] & log["terminals"]).any()
    assert log["timeouts"].sum() == pytest.approx(500 * 0.9**3, abs=35)


def test_mixture_of_policies():
    mdp = chain()
    mixed = mixture(mdp, np.array([0, 0, 0]), 0.2)
    assert mixed[0].tolist() == pytest.approx([0.9, 0.1])
    other = mixture(mdp, np.array([0, 0, 0]), 0.25, np.array([1, 1, 1]))
    assert other[0].tolist() == pytest.approx([0.75, 0.25])


def test_wrong_input():
    mdp = chain()
    good = mdp.transitions.toarray().reshape(3, 2, 3)
    for transitions, message in (
        (good[:, :1], "must be"),
        (good * 2, "sum to one"),
        (np.where(good == 1, 1.5, good) - 0.5 * (good == 1)[..., ::-1], "0 or more"),
    ):
        with pytest.raises(SaferlError, match=message):
            TabularMDP(transitions, mdp.rewards, mdp.initial, mdp.terminal)
    with pytest.raises(SaferlError, match="initial"):
        TabularMDP(good, mdp.rewards, [1, 1, 0], mdp.terminal)
    with pytest.raises(SaferlError, match="cost wait"):
        TabularMDP(good, mdp.rewards, mdp.initial, mdp.terminal, {"wait": np.zeros(3)})
    for policy, message in (
        (np.zeros((2, 2)), "has shape"),
        (np.full((3, 2), 0.4), "sum to one"),
        (np.array([2, 0, 0]), "action 2 in state 0 is outside the table"),
        (np.array([0.0, 1.0, 0.0]), "has shape"),
    ):
        with pytest.raises(SaferlError, match=message):
            exact_evaluate(mdp, policy)
    with pytest.raises(SaferlError, match="never end"):
        exact_evaluate(chain(1.0), np.array([0, 0, 0]))
    assert exact_evaluate(chain(1.0), np.array([0, 0, 0]), 0.5).value == pytest.approx(2)
    with pytest.raises(SaferlError, match="1 states have no allowed action .state 0"):
        plan(mdp, allowed=np.zeros((3, 2), bool))
    with pytest.raises(SaferlError, match="did you mean 'wait'"):
        plan_constrained(mdp, {"wat": 1.0})
    with pytest.raises(SaferlError, match="1 or more"):
        sample_episodes(mdp, np.array([0, 0, 0]), 0)
    with pytest.raises(SaferlError, match="seed"):
        sample_episodes(mdp, np.array([0, 0, 0]), 1, seed=-1)


# The constrained frontier of ICU-Sepsis ----------------------------------------------------------


@pytest.fixture
def icu():
    try:
        metadata.distribution("icu-sepsis")
    except metadata.PackageNotFoundError:
        pytest.skip("needs the tables of icu-sepsis")
    from saferl.envs import icu_sepsis

    return icu_sepsis


@pytest.mark.parametrize(("share", "survival"), [(1.0, 0.8745), (0.8, 0.8711), (0.6, 0.8529)])
def test_icu_frontier(icu, share, survival):
    """Best survival at a share of the clinicians' SOFA ≥ 10 steps, computed independently."""
    mdp, budget = icu.mdp(), share * 0.740
    found = plan_constrained(mdp, {"sofa10": budget})
    assert found.evaluation.value == pytest.approx(survival, abs=1e-3)
    assert found.evaluation.costs["sofa10"] == pytest.approx(budget, abs=1e-6)
    safe = plan_constrained(mdp, {"sofa10": budget}, mdp.supported).evaluation
    assert safe.ood == 0 and safe.value == pytest.approx(found.evaluation.value, abs=3e-4)


def test_icu_least_cost_and_infeasible_budget(icu):
    mdp = icu.mdp()
    least = exact_evaluate(mdp, plan(mdp, -mdp.costs["sofa10"]).policy)
    assert least.costs["sofa10"] == pytest.approx(0.375, abs=1e-3)
    assert least.value == pytest.approx(0.792, abs=1e-3)
    with pytest.raises(SaferlError, match="lowest reachable cost is sofa10 0.3754"):
        plan_constrained(mdp, {"sofa10": 0.5 * 0.740})


@pytest.mark.parametrize(
    ("price", "survival", "sofa10", "urine"),
    [(0.05, 0.8668, 0.556, 1.774), (0.1, 0.8586, 0.509, 1.710), (0.2, 0.8404, 0.449, 1.642)],
)
def test_icu_two_costs(icu, price, survival, sofa10, urine):
    mdp = icu.mdp()
    rewards = mdp.rewards - price * (mdp.costs["sofa10"] + mdp.costs["urine"])
    priced = exact_evaluate(mdp, plan(mdp, rewards, mdp.supported).policy)
    assert priced.value == pytest.approx(survival, abs=1e-3)
    assert priced.costs["sofa10"] == pytest.approx(sofa10, abs=1e-3)
    assert priced.costs["urine"] == pytest.approx(urine, abs=1e-3)
    # Its costs as budgets lead back to its survival: the multipliers are found, not given.
    budgets = {name: priced.costs[name] for name in ("sofa10", "urine")}
    found = plan_constrained(mdp, budgets, mdp.supported)
    assert found.evaluation.value == pytest.approx(survival, abs=1e-3)
    for name, limit in budgets.items():
        assert found.evaluation.costs[name] <= limit + 1e-6
