"""OGSRL: what reaches what, budgets, toys with known answers, checkpoints and errors."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from saferl.agents.ogsrl.agent import DiscreteOGSRL
from saferl.agents.ogsrl.limits import MARGIN_RATE, Limits, ood_budget, share_leaving
from saferl.agents.ogsrl.simulate import advantages
from saferl.data import Dataset
from saferl.errors import SaferlError
from saferl.safety.guardians.fitting import split

from .plain import MEMBERS
from .test_ogsrl import LENGTH, SMALL, logged, make, quiet

# What reaches what -------------------------------------------------------------------------------


def after(updates: int = 1, discrete: bool = True, **settings):
    agent = make(discrete, **settings)
    for _ in range(updates):
        agent.update(None)
    return agent


def same(one, two, element: int | None = None, part: str = "critic") -> bool:
    pick = slice(None) if element is None else element
    pairs = zip(getattr(one, part).parameters(), getattr(two, part).parameters())
    return all(torch.equal(a[:, pick], b[:, pick]) for a, b in pairs)


def test_each_signal_reaches_its_own_critic_and_multiplier():
    base = {"optimiser": "ppo_lag", "cost_limit": 1.0, "episodes": 40}
    dataset = logged(True)
    costlier = dataset.with_costs(np.clip(3 * dataset.costs, 0, 2))
    plain = after(**base)
    for changed, critic in (
        (after(**base, reward_shift=0.5), 0),
        (after(**base, dataset=costlier), 2),
    ):
        assert [same(plain, changed, k) for k in range(3)] == [k != critic for k in range(3)]
        assert not same(plain, changed, part="actor") or critic == 0
    dearer, rarer = after(**base, dataset=costlier), after(**base | {"ood_probability": 0.5})
    level = plain.multipliers.level
    assert (dearer.multipliers.level[:, 1] > level[:, 1]).all()
    assert torch.equal(dearer.multipliers.level[:, 0], level[:, 0])
    assert (rarer.multipliers.level[:, 0] < level[:, 0]).all()
    assert torch.equal(rarer.multipliers.level[:, 1], level[:, 1])


@pytest.mark.parametrize("discrete", [True, False])
def test_guard_and_limit_reach_the_policy(discrete):
    tight = {"cost_limit": 0.2, "ood_probability": 0.9}
    guarded, free = after(discrete=discrete, **tight), after(
        discrete=discrete, guardian="none", **tight
    )  # fmt: skip
    assert not same(guarded, free, part="actor")
    loose = after(discrete=discrete, **tight | {"cost_limit": 100.0})
    assert not same(guarded, loose, part="actor")
    hard = after(discrete=discrete, **tight | {"cost_limit": 100.0, "ood_probability": 1e-6})
    assert not same(loose, hard, part="actor")
    unguarded = {"optimiser": "trpo", "discrete": discrete}
    absorbed = after(**unguarded, ood_mode="penalty", ood_penalty=0.0)
    penalised = after(**unguarded, ood_mode="penalty", ood_penalty=25.0)
    assert not same(absorbed, penalised, 0) and not same(absorbed, penalised, part="actor")


def test_limits_of_members_are_their_own():
    """The first member's cost limit binds and the second has none."""
    agent = make(True, cost_limit=[0.2, math.inf], ood_probability=0.9)
    # One without a limit has a critic less, so its initial weights differ: a limit too far to bind.
    alone = [make(True, members=(seed,), cost_limit=limit, ood_probability=0.9)
             for seed, limit in zip(MEMBERS, (0.2, 1e9))]  # fmt: skip
    for _ in range(4):
        agent.update(None)
        for one in alone:
            one.update(None)
    for m, one in enumerate(alone):
        for ours, theirs in zip(agent.actor.parameters(), one.actor.parameters()):
            torch.testing.assert_close(ours[m], theirs[0], rtol=1e-4, atol=1e-5)


# Budgets -----------------------------------------------------------------------------------------


def test_budgets_are_the_users_limits_in_the_units_of_the_estimates():
    lines: list[str] = []
    cls, dataset = DiscreteOGSRL, logged(True)
    config = cls.make_config(SMALL | {"cost_limit": [1.0, 2.0], "cost_discount": 0.8,
                                      "discount": [0.9, 0.95], "horizon": 7})  # fmt: skip
    agent = cls(dataset.spec(config), config, 2)
    agent.fit(dataset, lines.append)
    cost = sum(0.8**t for t in range(LENGTH)) / LENGTH  # logged episodes last four steps
    expected = torch.tensor([[0.05 * 0.9**7, cost], [0.05 * 0.95**7, 2 * cost]])
    torch.testing.assert_close(agent.limits.budget, expected)
    undiscounted = make(True, cost_limit=3.0, cost_discount=0.999999)
    torch.testing.assert_close(undiscounted.limits.budget[:, 1], torch.full((2,), 3.0), rtol=1e-4,
                               atol=0)  # fmt: skip
    assert any(line.startswith("budget of cost: 0.738, 1.476") for line in lines), lines


def test_the_margin_comes_from_models_of_episodes_kept_aside():
    dataset = logged(True)
    agent = make(True, dataset, cost_limit=2.0, margin_models=3, calibration=0.4)
    train, held = split(dataset, 0.4)
    assert not set(train.rewards) & set(held.rewards)
    assert set(agent.models[0].rewards.tolist()) == set(train.rewards.tolist())
    others = [set(model.rewards.tolist()) for model in agent.models[1:]]
    assert all(other < set(held.rewards.tolist()) for other in others)
    assert others[0] != others[1] != others[2]
    for update in range(1, 7):
        metrics = agent.update(None)
        assert (agent.limits.seen.sum(1) == update).all()
    assert (agent.limits.seen == 2).all()
    torch.testing.assert_close(metrics["margin"] * agent.limits.unit, agent.limits.margin())

    limits = Limits(1, ("ood", "cost"), 2)
    limits.budget.copy_(torch.tensor([[0.3, 2.0]]))
    for gap in (1.0, 3.0):
        limits.observe(0, torch.tensor([gap]))
    limits.observe(1, torch.tensor([0.5]))
    assert limits.gaps[0].tolist() == [2.0, 0.5]  # means while there are few
    torch.testing.assert_close(limits.margin(), torch.tensor([0.5 + 0.9 * 1.5]))
    torch.testing.assert_close(limits.tightened(), torch.tensor([[0.3, 2.0 - 1.85]]))
    for _ in range(400):
        limits.observe(0, torch.tensor([-1.0]))
        limits.observe(1, torch.tensor([-1.0]))
    assert float(limits.margin()) == 0  # a model that is too pessimistic loosens nothing
    limits.observe(0, torch.tensor([0.0]))
    assert float(limits.gaps[0, 0]) == pytest.approx(MARGIN_RATE - 1, abs=1e-6)
    assert not make(True, cost_limit=2.0).limits.margin().any()


def test_integral_term_grows_with_a_standing_excess():
    """Budgets 2, 10 and none; J of the first stays at 3 for three updates and then falls."""
    limits = Limits(1, ("ood", "cost", "other"), 0)
    limits.budget.copy_(torch.tensor([[2.0, 10.0, math.inf]]))
    plain, helpless = Limits(1, limits.names, 0), Limits(1, limits.names, 0)
    plain.budget.copy_(limits.budget)
    helpless.budget.copy_(limits.budget)
    found, bare = [], []
    acted = torch.ones(1, 3, dtype=torch.bool)
    for total in (3.0, 3.0, 3.0, 1.0, 1.0, 1.0):
        totals = torch.tensor([[total, 3 * total, 5.0]])
        found.append(limits.excess(totals, 1.0)[0].tolist())
        limits.integrate(0.25, acted)
        bare.append(plain.excess(totals, 0.5)[0].tolist())
        plain.integrate(0.0, acted)
        helpless.excess(totals, 1.0)
        helpless.integrate(0.25, ~acted)
        assert not helpless.integral.any()  # no step could have cured it
    first, second, third = zip(*found)
    assert first == (1.0, 1.25, 1.5, -0.25, -0.5, -0.75)
    assert second == (-1.0, -1.0, -1.0, -7.0, -7.0, -7.0)  # within its budget
    assert set(third) == {-math.inf}
    # Running means: 3, 3, 3, then halfway to 1 each time.
    assert [row[0] for row in bare] == [1.0, 1.0, 1.0, 0.0, -0.5, -0.75]
    for _ in range(100):
        limits.excess(torch.tensor([[30.0, 0.0, 5.0]]), 1.0)
        limits.integrate(0.25, acted)
    assert limits.integral[0].tolist() == [2.0, 0.0, 0.0]  # no more than the budget
    limits.excess(torch.tensor([[1.0, 0.0, 5.0]]), 1.0)
    limits.integrate(0.25, ~acted)
    assert limits.integral[0].tolist() == [1.75, 0.0, 0.0]  # worked off whether acted on or not


@pytest.mark.parametrize("optimiser", ["cpo", "ppo_lag"])
def test_the_margin_tightens_what_training_keeps(optimiser):
    settings = {"optimiser": optimiser, "cost_limit": 3.0, "ood_probability": 0.9, "kl": 0.1}
    settings |= {"margin_models": 2, "episodes": 30}
    plain, tight = make(True, **settings), make(True, **settings)
    tight.limits.gaps.fill_(2.5)
    tight.limits.seen.fill_(1000)
    tight.limits.observe = lambda model, gap: None
    one, two = plain.update(None), tight.update(None)
    assert (two["margin"] > 2).all() and torch.equal(one["predicted_cost"], two["predicted_cost"])
    if optimiser == "cpo":
        assert (one["recovery"] == 0).all() and (two["recovery"] == 1).all()
    else:
        assert (two["multiplier_cost"] > one["multiplier_cost"]).all()
    assert not same(plain, tight, part="actor")


def exits(hazard: np.ndarray, gamma: float, absorb: bool) -> tuple[float, float]:
    """V_ĝ and the chance of at least one unsupported step of a chain whose step h is unsupported
    with chance ``hazard[h]``."""
    alive = np.concatenate([[1.0], np.cumprod(1 - hazard)[:-1]])
    weight = hazard * (alive if absorb else 1.0)
    return float((gamma ** np.arange(len(hazard)) * weight).sum()), 1 - float(np.prod(1 - hazard))


def test_how_often_logged_episodes_leave_the_data():
    episodes, outside = np.array([[0, 4], [4, 6]]), np.zeros(7, bool)
    outside[[2, 5, 6]] = True  # the last is of a fragment
    assert share_leaving(outside, episodes, 2, "initial") == 1 / 2  # (0 1) (4 5)
    assert share_leaving(outside, episodes, 3, "initial") == 1
    assert share_leaving(outside, episodes, 2, "any") == 4 / 6  # all but (0 1) and (3)


def test_a_probability_that_the_data_do_not_keep_is_told():
    def lines(**settings) -> list[str]:
        said = []
        make(True, **settings).fit(logged(True), said.append)
        return [line for line in said if line.startswith("note")]

    (line,) = lines(alpha=0.6, ood_probability=0.01)
    assert "of logged stretches of" in line and "more than ood_probability = 0.01" in line
    assert lines(alpha=0.6, ood_probability=0.999) == []
    assert lines(alpha=0.6, ood_mode="penalty", optimiser="trpo") == []


@pytest.mark.parametrize("absorb", [True, False])
def test_the_ood_budget_bounds_the_chance_of_leaving(absorb):
    """Chains whose V is the budget exactly leave with chance β at most, simulated too."""
    random = np.random.default_rng(0)
    gamma, horizon, beta = 0.97, 20, 0.1
    budget = ood_budget(beta, gamma, horizon)
    shares = []
    for _ in range(50):
        shape = random.random(horizon) * (random.random(horizon) < random.random())
        shape[random.integers(horizon)] += 1
        low, high = 0.0, 1 / shape.max()
        for _ in range(60):  # V rises with the hazard
            middle = (low + high) / 2
            low, high = (middle, high) if exits(middle * shape, gamma, absorb)[0] < budget else (
                low, middle)  # fmt: skip
        value, leaves = exits(low * shape, gamma, absorb)
        assert value == pytest.approx(budget, rel=1e-6)
        assert leaves <= beta
        played = random.random((20_000, horizon)) < low * shape
        share = played.any(1).mean()
        assert share == pytest.approx(leaves, abs=4 * math.sqrt(beta / 20_000))
        shares.append(leaves)
    # The bound is met but for one step of discount where only the last step may leave.
    hazard = np.zeros(horizon)
    hazard[-1] = beta * gamma
    value, leaves = exits(hazard, gamma, absorb)
    assert value == pytest.approx(budget) and leaves == pytest.approx(beta * gamma)
    assert max(shares) < beta


@pytest.mark.parametrize("mode", ["constraint_absorb", "constraint"])
def test_the_estimate_of_the_agent_bounds_the_share_that_leaves(mode):
    agent = make(True, ood_mode=mode, episodes=300, horizon=8, discount=0.95)
    rollout = agent._simulate(agent.models[0])
    values = agent._values(rollout)
    totals = agent._totals(rollout, agent._signals(rollout), values)
    left = (rollout.ood.sum(-1) > 0).float().mean(-1)
    value = (rollout.ood * 0.95 ** torch.arange(8)).sum(-1).mean(-1)
    torch.testing.assert_close(totals[:, 1], value)
    assert (left > 0.1).all() and (left <= value / 0.95**8).all()
    if mode == "constraint_absorb":  # counted once
        assert (left >= value).all()


# A toy with a known answer -----------------------------------------------------------------------


def bandit() -> Dataset:
    """One decision per episode, in one of three states.

    In state 0 (share 0.6) action 1 earns 1 at a cost of 1 and action 0 earns 0.5; in state 1 only
    action 2 was logged, and earned 3; in state 2 (far away) only action 0, for nothing. A pair that
    was never logged replays its nearest: action 2 in state 0 promises the 3 of state 1.
    """
    kinds = [(0.0, 0, 0.5, 0), (0.0, 1, 1.0, 1), (1.0, 2, 3.0, 0), (9.0, 0, 0.0, 0)]
    rows = [kind for kind, count in zip(kinds, (60, 60, 40, 40)) for _ in range(count)]
    order = np.random.default_rng(0).permutation(len(rows))
    s, a, r, c = (np.array(column)[order] for column in zip(*rows))
    return Dataset.from_arrays(
        s[:, None], a.astype(np.int64), r, np.ones(len(s), bool), None, s[:, None], costs=c,
        n_actions=3, horizon=1, id="bandit",
    )  # fmt: skip


BANDIT = {"hidden": [16], "episodes": 100, "horizon": 1, "model": "tabular", "alpha": 0.1,
          "guardian_options": "", "kl": 0.03, "cg_iterations": 5, "critic_lr": 1e-2}  # fmt: skip


def shares(agent, updates: int, last: int) -> np.ndarray:
    """Probabilities ``[M, state, action]``, averaged over the last updates."""
    states, found = torch.tensor([[0.0], [1.0], [9.0]]).expand(agent.members, -1, -1), []
    for i in range(updates):
        agent.update(None)
        if i >= updates - last:
            with torch.no_grad():
                found.append(agent.actor(states).exp())
    return torch.stack(found).mean(0).numpy()


def test_the_lure_outside_the_data_takes_the_unguarded_alone():
    fast = BANDIT | {"kl": 0.1}
    free = make(True, bandit(), **fast, guardian="none", optimiser="trpo")
    assert (shares(free, 30, 5)[:, 0, 2] > 0.9).all()
    for extra in (
        {"ood_probability": 0.02},
        {"optimiser": "trpo", "ood_mode": "penalty"},
        {"optimiser": "trpo", "ood_mode": "mask"},
    ):
        guarded = make(True, bandit(), **fast, guardian="count", **extra)
        found = shares(guarded, 36, 8)
        assert (found[:, 0, 2] < 0.05).all(), extra
        assert (found[:, 1, 2] > 0.8).all(), extra  # where it was logged it is taken


@pytest.mark.parametrize("optimiser", ["cpo", "ppo_lag"])
def test_a_cost_limit_binds_to_the_right_mixture(optimiser):
    """State 0 has a share of 0.6, so costs of 0.15 and 0.45 are action 1 in 1/4 and 3/4 of it."""
    agent = make(
        True, bandit(), **BANDIT | {"guardian": "count"}, cost_limit=[0.15, 0.45],
        optimiser=optimiser, actor_lr=3e-3, epochs=5, cost_discount=0.9,
    )  # fmt: skip
    updates, last = (80, 40) if optimiser == "cpo" else (220, 100)
    found = shares(agent, updates, last)
    np.testing.assert_allclose(found[:, 0, 1], [0.25, 0.75], atol=0.09)
    assert (found[:, 0, 2] < 0.08).all()


# State -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("discrete", "settings"),
    [
        (True, {"guardian": "kde", "guardian_options": "", "model": "tabular", "cost_limit": 2.0}),
        (False, {"optimiser": "ppo_lag", "multiplier": "pid", "cost_limit": 2.0}),
        (True, {"ood_mode": "mask", "cost_limit": 2.0, "starts": "any"}),
        (False, {"model": "ensemble", "model_options": "epochs=1 ensemble=2 hidden=4,4"}),
    ],
)
def test_a_checkpoint_holds_guardian_and_model(discrete, settings):
    settings = {"margin_models": 2, "clone_updates": 3} | settings
    one = make(discrete, **settings)
    for _ in range(3):
        one.update(None)
    state = {key: tensor.clone() for key, tensor in one.state_dict().items()}
    two = type(one)(one.spec, one.config, MEMBERS)  # neither fitted nor calibrated
    two.load_state_dict(state)
    for _ in range(2):
        first, second = one.update(None), two.update(None)
        assert all(torch.equal(first[name], second[name]) for name in first)
    ours, theirs = one.state_dict(), two.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    shared = tuple(type(one).shared)
    for key, tensor in ours.items():
        if tensor.dim() and not key.startswith(shared):
            assert len(tensor) == len(MEMBERS), key
    assert any(key.startswith("world.guardian.") for key in ours)


@pytest.mark.parametrize("optimiser", ["cpo", "ppo_lag"])
def test_a_member_among_others_is_that_member_alone(optimiser):
    settings = {"optimiser": optimiser, "cost_limit": 2.0, "margin_models": 2}
    both, alone = make(False, **settings), make(False, members=MEMBERS[1:], **settings)
    for _ in range(4):
        both.update(None)
        alone.update(None)
    state = alone.state_dict()
    for key, tensor in both.state_dict().items():
        if not tensor.dim() or key.startswith(("world.", "replay.", "random.")):
            continue
        torch.testing.assert_close(tensor[1], state[key][0], rtol=1e-4, atol=1e-5, msg=key)


def test_cloning_starts_from_the_behaviour():
    """Of what was logged; clones of 300 updates are near it, random weights are not."""
    found = [shares(make(True, bandit(), **BANDIT, guardian="count", clone_updates=n,
                         ood_probability=0.5, actor_lr=1e-2), 1, 1) for n in (0, 300)]  # fmt: skip
    logged_shares = np.array([[0.5, 0.5, 0], [0, 0, 1], [1, 0, 0]])
    distance = [np.abs(f - logged_shares).max() for f in found]
    assert distance[1] < 0.2 < distance[0]


# Advantages and errors ---------------------------------------------------------------------------


def test_advantages_do_not_cross_episodes():
    """λ = 1 is Monte Carlo: the return until the end, or until H and V there, less V."""
    signals = torch.tensor([1.0, 2.0, 4.0]).view(1, 1, 3, 1).expand(1, 3, -1, -1)
    values = torch.tensor([10.0, 20.0, 30.0, 40.0]).view(1, 1, 4, 1).expand(1, 3, -1, -1)
    alive = torch.tensor([[[1.0, 1, 1], [1, 1, 0], [1, 1, 1]]])
    ended = torch.tensor([[[0.0, 0, 0], [0, 1, 0], [0, 0, 1]]])
    found = advantages(signals, values, alive, ended, 0.5, 1.0)[0, ..., 0]
    expected = [[1 + 1 + 1 + 5 - 10, 2 + 2 + 10 - 20, 4 + 20 - 30], [1 + 1 - 10, 2 - 20, 0],
                [1 + 1 + 1 - 10, 2 + 2 - 20, 4 - 30]]  # fmt: skip
    assert found.tolist() == expected


@pytest.mark.parametrize(
    ("discrete", "settings", "message"),
    [
        (True, {"optimiser": "trpo"}, "trpo keeps no limits"),
        (True, {"optimiser": "trpo", "guardian": "none", "cost_limit": 1.0}, "trpo keeps no"),
        (True, {"guardian": "none"}, "cpo has no limit to keep"),
        (True, {"ood_mode": "penalty"}, "cpo has no limit to keep"),
        (False, {"ood_mode": "mask", "cost_limit": 1.0}, "mask needs discrete actions"),
        (True, {"optimiser": "cop"}, "optimiser 'cop': did you mean 'cpo'"),
        (True, {"ood_mode": "absorb"}, "ood_mode 'absorb'"),
        (True, {"starts": "all"}, "starts 'all'"),
        (True, {"model": "kn"}, "model 'kn': did you mean 'knn'"),
        (True, {"guardian": "kd"}, "guardian 'kd': did you mean 'kde'"),
        (True, {"guardian_options": "neighbors=3"}, "did you mean 'neighbours'"),
        (True, {"ood_probability": 0.0}, "ood_probability = 0.0"),
        (True, {"horizon": 0}, "start at 1"),
        (True, {"margin_models": -1}, "margin_models, clone_updates"),
        (True, {"smoothing": 0.0}, "smoothing lie in"),
        (True, {"calibration": 1.0}, "calibration = 1.0"),
        (True, {"cost_limit": -1.0}, "0 or more"),
        (True, {"cost_discount": 1.5, "cost_limit": 1.0}, "discount lies between"),
    ],
)
def test_bad_settings_are_one_clear_line(discrete, settings, message):
    with pytest.raises(SaferlError, match=message):
        make(discrete, **settings)


def test_bad_data_are_one_clear_line():
    dataset = logged(True)
    spec = dataset.spec(DiscreteOGSRL.make_config(SMALL))
    agent = DiscreteOGSRL(spec, DiscreteOGSRL.make_config(SMALL), 1)
    with pytest.raises(SaferlError, match="not fitted: call fit"):
        agent.update(None)
    with pytest.raises(SaferlError, match="two are needed"):
        agent.fit(dataset.subset(episodes=1), quiet)
    free = dataclasses.replace(agent.config, cost_limit=1.0)
    costless = Dataset(**{**dataset._arrays(), "costs": None}, card=dataset.card)
    with pytest.raises(SaferlError, match="has no costs"):
        DiscreteOGSRL.prepare(costless, free)
    lines: list[str] = []
    config = dataclasses.replace(agent.config, alpha=0.01)
    small = DiscreteOGSRL(spec, config, 1)
    small.fit(dataset, lines.append)
    assert any("alpha = 0.01 needs 99 calibration episodes but there are 6" in x for x in lines)
    assert float(small.guardian.alpha) == pytest.approx(1 / 7)
