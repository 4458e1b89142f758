"""EpiCare: the published environments and baselines, the dynamics, the datasets."""

from __future__ import annotations

import dataclasses
import math
import time
from functools import cache

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from saferl.data import Dataset
from saferl.envs import epicare
from saferl.envs.epicare import EpiCareEnv, History, Patients, world
from saferl.envs.epicare_data import Baseline, expected_rewards, ids, load, simulate, statistics
from saferl.errors import SaferlError

# What the released code, run beside this one, generates for the environments 1 to 8: the sums of
# treatment costs, of cure probabilities, of treatment effects and of symptom means, the mean of the
# first disease's number, and the sum of symptom variances.
PUBLISHED = [
    (39.132140, 21.654630, -27.333216, 117.780895, 8.351881, 295.216204),
    (44.713387, 21.554022, -41.060632, 123.812285, 7.175339, 311.173810),
    (46.422579, 18.588642, -22.213827, 131.974235, 8.085355, 286.883184),
    (38.532887, 18.944904, -21.734116, 125.085952, 7.150647, 292.912156),
    (33.215933, 19.849953, -34.947048, 136.254916, 7.523647, 307.132743),
    (36.704156, 20.515149, -23.700131, 124.302873, 8.053940, 297.196473),
    (35.652412, 19.888544, -32.760353, 132.443039, 7.474458, 310.895790),
    (41.404683, 20.495997, -25.091643, 120.551421, 7.415103, 296.111722),
]


@pytest.mark.parametrize("number", range(1, 9))
def test_environments_are_the_published_ones(number):
    w = world(number)
    sums = [x.sum() for x in (w.treatment_costs, w.remission, w.effects, w.means)]
    facts = (*sums, w.initial @ np.arange(16), np.square(w.factors).sum())
    np.testing.assert_allclose(facts, PUBLISHED[number - 1], atol=1e-6)

    # What the specification says of every environment.
    assert w.remission.any(1).all()  # each disease has a cure
    cures = w.remission[w.remission > 0]
    assert 16 <= len(cures) < 32 and (cures >= 0.8).all() and (cures <= 1).all()
    assert (w.treatment_costs >= 1).all() and (w.treatment_costs <= 4).all()
    affected = (w.effects != 0).sum(1)
    assert affected.min() >= 1 and affected.max() <= 7
    assert w.effects.min() >= -2 and w.effects.max() <= 1
    deviations = np.sqrt(np.linalg.eigvalsh(w.factors @ w.factors.swapaxes(1, 2)))
    assert deviations.min() >= 1 and deviations.max() <= 2
    np.testing.assert_allclose(w.transitions.sum(-1), 1)
    assert w.transitions.min() >= 0
    # A disease leads to another wherever that one leads back; most stay with probability > 1/2.
    assert ((w.transitions > 0) == (w.transitions > 0).swapaxes(1, 2)).all()
    assert w.initial.sum() == pytest.approx(1) and (w.initial > 0).all()
    with pytest.raises(ValueError, match="read-only"):
        w.means[0] = 0


def test_the_first_disease_has_the_stationary_distribution_of_its_class():
    base = np.array([[0.9, 0.1, 0, 0], [0.3, 0.7, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    whole = np.eye(16)
    whole[:4, :4] = base
    expected = np.full(16, 1 / 16)
    expected[:2] = np.array([0.75, 0.25]) * 2 / 16
    np.testing.assert_allclose(epicare._initial(whole), expected)


def test_adverse_probabilities_lie_between_the_bounds_of_the_normal_distribution():
    """At least that of the worst symptom, at most the sum over symptoms, up to sampling error."""
    from scipy.stats import norm

    w = world(1)
    threshold = math.log(0.999 / 0.001)
    certain = 64 * w.remission - w.treatment_costs - 0.5 * w.means.sum(1)[:, None]
    believed = (certain - expected_rewards(1)) / 64
    deviations = np.sqrt(np.square(w.factors).sum(-1))
    shifted = w.means[:, None] + w.effects  # [disease, treatment, symptom]
    single = norm.sf(threshold, shifted, deviations[:, None])
    error = 5 * np.sqrt(single.sum(-1) / 2**17)
    assert (believed > single.max(-1) - error).all() and (believed < single.sum(-1) + error).all()
    assert 0.001 < believed.mean() < 0.01


# The published baselines (environment 1): return, remission; tolerances of returns.
GATE = {
    "random": (7.0, 2.0, 0.51),
    "soc": (46.0, 2.0, 0.75),
    "oracle": (95.7, 0.5, 1.00),
}


@cache
def results(policy):
    return statistics(simulate(1, policy, 20_000, seed=1))


@pytest.mark.parametrize("policy", GATE)
def test_baselines_reach_the_published_results(policy):
    value, tolerance, remission = GATE[policy]
    facts = results(policy)
    assert facts["return"] == pytest.approx(value, abs=tolerance)
    assert facts["remission"] == pytest.approx(remission, abs=0.015)


def test_smart_is_a_trial_with_a_probability_ratio_of_eight():
    facts = results("smart")
    assert facts["return"] == pytest.approx(24.4, abs=2.0)  # published, of BC on its episodes
    policy = Baseline("smart", 1)
    p = policy.probabilities
    assert p.max() / p.min() == pytest.approx(8) and p.sum() == pytest.approx(1)
    assert (np.argsort(p) == np.argsort(policy.prior)).all()
    taken = np.bincount(simulate(1, "smart", 3000)["actions"], minlength=16)
    np.testing.assert_allclose(taken / taken.sum(), p, atol=0.015)


def test_adverse_events_are_rare_and_fewer_under_better_policies():
    # Counted as published and times 10 000; the published means over all environments are 55 (SD
    # 9), 31 (5) and 1 to 2; of 100 000 episodes in this one 40, 25 and 1.4.
    random, soc, oracle = (1e4 * results(p)["adverse_rate"] for p in ("random", "soc", "oracle"))
    assert 30 < random < 50 and 17 < soc < 33 and oracle < 4
    facts = results("soc")
    assert facts["adverse_events"] > 1.5 * facts["adverse_rate"]


def test_thousands_of_patients_take_seconds():
    world(2)
    start = time.process_time()
    simulate(2, "soc", 6000)
    assert time.process_time() - start < 4


class Tape:
    """A generator whose draws are kept, or given: row i of each is patient i's."""

    def __init__(self, draws=None, row=None):
        self.source = np.random.default_rng(5)
        self.draws, self.row, self.given = [] if draws is None else draws, row, draws is not None

    def _next(self, draw, shape):
        if self.given:
            values = self.draws.pop(0)[self.row : self.row + 1]
            assert values.shape == shape
            return values
        self.draws.append(draw(shape))
        return self.draws[-1]

    def random(self, shape):
        return self._next(self.source.random, shape)

    def standard_normal(self, shape):
        return self._next(self.source.standard_normal, shape)


def recorded(count=250, environment=3):
    """Eight visits of ``count`` patients under random treatments, and the draws behind them."""
    tape = Tape()
    patients = Patients(world(environment), count, tape)
    treatments = np.random.default_rng(2).integers(16, size=(8, count))
    states, visits = [(patients.reset().copy(), patients.disease)], []
    for row in treatments:
        visits.append(patients.step(row))
        states.append((patients.symptoms, patients.disease))
    return tape.draws, treatments, states, visits


def test_a_visit_follows_the_specification():
    """Written out for one patient at a time, from the same draws."""
    w = world(3)
    draws, treatments, states, visits = recorded()
    count, seen = treatments.shape[1], dict.fromkeys(("cure", "change", "adverse"), 0)

    def pick(distribution, chance):
        total = 0.0
        for index, p in enumerate(distribution):
            total += p
            if chance < total:
                return index
        return len(distribution) - 1

    def symptoms(disease, noise, shift):
        z = w.means[disease] + w.factors[disease] @ noise + shift
        return [1 / (1 + math.exp(-x)) for x in z]

    for i in range(count):
        disease = pick(w.initial, draws[0][i, 0])
        assert disease == states[0][1][i]
        assert np.allclose(states[0][0][i], symptoms(disease, draws[1][i], 0.0))
        for t in range(8):
            chance, noise, calm = (draws[2 + 3 * t + k][i] for k in range(3))
            a, visit = treatments[t, i], visits[t]
            reward, adverse, worst = -w.treatment_costs[a], False, 0.0
            cured = chance[0] < w.remission[disease, a]
            if cured:
                reward += 64
                observed = 0.1 * calm
            else:
                next_disease = pick(w.transitions[a, disease], chance[1])
                seen["change"] += next_disease != disease
                disease = next_disease
                s = symptoms(disease, noise, w.effects[a])
                reward -= 64 / (2 * 8 * 8) * sum(s)
                worst = max(s)
                adverse = worst > 0.999
                observed = [round(x, 1) for x in s]
            assert visit.remission[i] == cured and visit.adverse[i] == adverse
            assert visit.dense[i] == (worst > 0.9)
            assert visit.rewards[i] == pytest.approx(reward)
            assert visit.scored(True)[i] == pytest.approx(reward - 64 * adverse)
            assert visit.scored(False)[i] == visit.rewards[i]
            assert visit.ended[i] == (cured or adverse or t == 7)
            assert np.allclose(states[t + 1][0][i], observed)
            seen["cure"] += cured
            seen["adverse"] += adverse
            assert disease == states[t + 1][1][i]
    assert seen["cure"] > 100 and seen["change"] > 100 and seen["adverse"] > 3


@pytest.mark.parametrize("cost, penalty", epicare.VARIANTS.values())
def test_the_environment_is_the_simulator(cost, penalty):
    draws, treatments, states, visits = recorded()
    longest = 0
    adverse = np.flatnonzero(visits[0].adverse)[:2]
    for i in (0, 1, 2, 3, *adverse):
        env = EpiCareEnv(3, cost=cost, penalty=penalty, history=2, last_actions=2)
        env.np_random = Tape(list(draws), i)
        seen, info = env.reset()
        np.testing.assert_array_equal(seen[:8], states[0][0][i].astype(np.float32))
        assert info["disease"] == states[0][1][i] and not seen[8:].any()
        for t in range(8):
            before = seen
            seen, reward, terminated, truncated, info = env.step(treatments[t, i])
            visit = visits[t]
            np.testing.assert_array_equal(seen[:8], states[t + 1][0][i].astype(np.float32))
            np.testing.assert_array_equal(seen[8:16], before[:8])
            actions = seen[16:].reshape(2, 16)
            assert actions[0].argmax() == treatments[t, i] and actions[0].sum() == 1
            np.testing.assert_array_equal(actions[1], before[16:32])
            assert reward == visit.rewards[i] - 64 * (penalty and visit.adverse[i])
            assert (terminated, truncated) == (visit.ended[i], False)
            assert info["cost"] == (visit.adverse if cost == "adverse" else visit.dense)[i]
            assert info["remission"] == visit.remission[i]
            assert info["adverse_event"] == visit.adverse[i]
            if terminated:
                break
        longest = max(longest, t)
        with pytest.raises(SaferlError, match=r"call reset\(\)"):
            env.step(0)
    assert len(adverse) and longest == 7


@pytest.mark.parametrize("options", [{}, {"history": 1, "last_actions": 0, "cost": "dense"}])
def test_gymnasium_accepts_the_environment(options):
    env = EpiCareEnv(2, **options)
    check_env(env, skip_render_check=True)
    width = 8 * options.get("history", 8) + 16 * options.get("last_actions", 1)
    assert env.observation_space.shape == (width,)
    first, second = env.reset(seed=4)[0], env.step(3)[0]
    assert np.array_equal(env.reset(seed=4)[0], first) and np.array_equal(env.step(3)[0], second)
    assert not np.array_equal(env.reset(seed=5)[0], first)


def test_ids_fit_the_environment():
    listed = epicare.env_ids()
    assert len(listed) == 25 and listed["saferl/EpiCare-v0"] == {}
    env = EpiCareEnv(**listed["saferl/EpiCare3Published-v0"])
    assert env.world is world(3) and (env.cost, env.penalty) == ("adverse", True)
    env = EpiCareEnv(**listed["saferl/EpiCare7Dense-v0"])
    assert env.world is world(7) and (env.cost, env.penalty) == ("dense", False)


def test_soc_learns_and_avoids_what_worsens_symptoms():
    w = world(1)
    policy = Baseline("soc", 1)
    policy.start(3)
    patients = Patients(w, 3, np.random.default_rng(0))
    patients.disease, best = np.zeros(3, int), int(policy.prior.argmax())
    raised = int(np.flatnonzero(w.effects[best] > 0)[0])
    patients.symptoms = np.full((3, 8), 0.8)  # 0.8 is not above 0.8
    patients.symptoms[1, raised] = 0.9
    patients.symptoms[2] = 1.0
    first = policy.choose(patients)
    allowed = np.flatnonzero(w.effects[:, raised] <= 0)
    assert first[0] == best and first[1] == allowed[policy.prior[allowed].argmax()] != best
    harmless = np.flatnonzero((w.effects <= 0).all(1))
    assert first[2] == harmless[policy.prior[harmless].argmax()] != best
    policy.world = dataclasses.replace(w, effects=np.ones((16, 8)))  # all raise all: all allowed
    assert (policy.choose(patients) == best).all()
    policy.learn(np.full(3, best), np.array([-10.0, 0.0, 0.0]))
    value = 0.2 * policy.prior[best] + 0.8 * -10
    patients.symptoms[:] = 0.0
    order = np.argsort(policy.prior)[::-1]
    assert value < policy.prior[order[1]] and policy.choose(patients)[0] == order[1]


def test_history_is_newest_first():
    past = History(1, 3, 2)
    past.start(np.full((1, 8), 0.1))
    for visit in (1, 2, 3):
        past.add(np.array([visit]), np.full((1, 8), 0.1 + 0.2 * visit))
    seen = past.observation()[0]
    np.testing.assert_allclose(seen[:24:8], [0.7, 0.5, 0.3], rtol=1e-6)
    assert np.flatnonzero(seen[24:]).tolist() == [3, 16 + 2]
    past.start(np.zeros((1, 8)))
    assert not past.observation().any()


def test_a_function_can_act():
    """The standard of care, computed from the observation alone, does as well as the baseline."""
    order = np.argsort(-Baseline("soc", 1).prior)

    def untried(observations):  # each treatment in turn, the most promising first
        visit = (observations[:, :64].reshape(-1, 8, 8).any(2)).sum(1) - 1
        return order[visit]

    episodes = simulate(1, untried, 5000)
    starts = np.concatenate([[0], np.flatnonzero(episodes["ended"])[:-1] + 1])
    assert (episodes["actions"][starts] == order[0]).all()
    assert statistics(episodes)["remission"] > 0.6
    for wrong in (lambda o: np.zeros((len(o), 1), int), lambda o: np.full(len(o), 16)):
        with pytest.raises(SaferlError, match="whole numbers from 0 to 15"):
            simulate(1, wrong, 5)
    with pytest.raises(SaferlError, match="whole numbers from 0 to 15"):
        simulate(1, lambda o: np.zeros(len(o)), 5)


def test_datasets_are_whole_episodes():
    data = load("epicare-1-smart-v0", episodes=500)
    assert isinstance(data, Dataset) and not data.problems
    assert len(data.episodes) == 500 and data.fragment is None
    assert not data.timeouts.any() and data.episode_lengths().max() == 8
    assert data.observations.shape == (len(data), 80) and data.action_dim == 16
    inside = np.ones(len(data), bool)
    inside[data.episodes[:, 1] - 1] = False
    rows = np.flatnonzero(inside)
    # Within an episode the next observation is the next row's, its newest symptoms before it.
    np.testing.assert_array_equal(data.next_observations[rows], data.observations[rows + 1])
    np.testing.assert_array_equal(data.next_observations[:, 8:64], data.observations[:, :56])
    np.testing.assert_array_equal(data.next_observations[:, 64:].argmax(1), data.actions)
    starts = data.episodes[:, 0]
    assert not data.observations[starts, 8:].any() and data.observations[starts, :8].all()
    card = data.card
    assert (card.env_id, card.n_actions, card.horizon) == ("saferl/EpiCare1-v0", 16, 8)
    assert data.normalised_score(64.0) == 100 and "not EpiCare's own" in card.origin


def test_variants_share_the_episodes_and_separate_cost_from_reward():
    n = 4000
    plain, dense, published = (
        load(f"epicare-2-random{part}-v0", size=n) for part in ("", "-dense", "-published")
    )
    np.testing.assert_array_equal(plain.observations, dense.observations)
    np.testing.assert_array_equal(plain.rewards, dense.rewards)
    np.testing.assert_array_equal(plain.costs, published.costs)
    assert plain.costs.sum() > 3 and dense.costs.mean() > 0.3
    assert (dense.costs[plain.costs > 0] == 1).all()
    np.testing.assert_allclose(plain.rewards - published.rewards, 64 * plain.costs, atol=1e-5)
    assert (plain.rewards[plain.costs > 0] > -64).all() and plain.terminals[plain.costs > 0].all()
    assert dense.card.env_id == "saferl/EpiCare2Dense-v0"
    assert published.card.env_id == "saferl/EpiCare2Published-v0"
    # Exactly so many rows; an episode that is cut is marked.
    assert len(plain) == n and plain.timeouts.sum() == (not plain.terminals[-1])
    for cut in range(1, 9):
        data = load("epicare-2-random-v0", size=cut)
        assert len(data) == cut and data.terminals[-1] != data.timeouts[-1]


def test_the_same_arguments_give_the_same_data():
    first = load("epicare-1-soc-v0", size=500)
    np.random.seed(7)  # noqa: NPY002  the global generator plays no part
    assert load("epicare-1-soc-v0", size=500).fingerprint == first.fingerprint
    others = [
        load("epicare-1-soc-v0", size=500, seed=1),
        load("epicare-2-soc-v0", size=500),
        load("epicare-1-smart-v0", size=500),
        load("epicare-1-soc-v0", size=500, soc_alpha=0.5),
    ]
    assert len({first.fingerprint, *(data.fingerprint for data in others)}) == 5
    small = load("epicare-1-soc-v0", size=500, history=1, last_actions=0)
    np.testing.assert_array_equal(small.observations, first.observations[:, :8])
    assert small.card.env_id is None and "1 visits and 0" in small.card.notes[-1]
    assert load("epicare-1-soc-v0", size=9, horizon=5).card.horizon == 5


def test_mistakes_are_told():
    assert len(ids()) == len(set(ids())) == 96
    for name, nearest in (
        ("epicare-1-smrt-v0", "epicare-1-smart-v0"),
        ("epicare-9-smart-v0", "epicare-"),
        ("epicare", ""),
    ):
        with pytest.raises(SaferlError, match=f"unknown EpiCare dataset .*{nearest}"):
            load(name)
    name = "epicare-1-smart-v0"
    for options, said in (
        ({"size": 0}, "size of EpiCare"),
        ({"size": 2.5}, "size of EpiCare"),
        ({"episodes": True}, "episodes of EpiCare"),
        ({"size": 5, "episodes": 5}, "not both"),
        ({"seed": -1}, "seed of EpiCare"),
        ({"history": 9}, r"history .* 1 to 8, got 9"),
        ({"last_actions": -1}, r"last_actions .* 0 to 8"),
        ({"soc_alpha": 2}, "soc_alpha"),
        ({"horizn": 5}, "did you mean 'horizon'"),
    ):
        with pytest.raises(SaferlError, match=said):
            load(name, **options)
    with pytest.raises(SaferlError, match=r"environment .* 1 to 8, got 9"):
        EpiCareEnv(9)
    with pytest.raises(SaferlError, match="did you mean 'dense'"):
        EpiCareEnv(cost="dens")
    with pytest.raises(SaferlError, match="did you mean 'oracle'"):
        simulate(1, "oracl", 5)
    env = gymnasium.wrappers.OrderEnforcing(EpiCareEnv())
    env.reset(seed=0)
    with pytest.raises(SaferlError, match="whole numbers from 0 to 15"):
        env.step(16)
