"""ICU-Sepsis: the published tables read right, its environment, its logged episodes."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from saferl.data import load_dataset
from saferl.envs import icu_sepsis as icu
from saferl.errors import SaferlError
from saferl.models.mdp import exact_evaluate
from saferl.models.planning import plan

try:
    PACKAGE = metadata.distribution("icu-sepsis")
except metadata.PackageNotFoundError:
    pytest.skip("needs the tables of icu-sepsis", allow_module_level=True)


def optimum(allowed=None) -> np.ndarray:
    return plan(icu.mdp(), allowed=allowed).policy


def test_tables_are_the_published_ones():
    data = icu.tables()
    assert data.admissible.sum() == 2238
    live = ~data.terminal
    sofa = data.features[live, icu.FEATURES.index("sofa")]
    assert np.corrcoef(sofa, data.sofa[live])[0, 1] > 0.99
    assert (data.admissible.sum(1)[live] >= 1).all()
    assert ((data.admissible.sum(1) == 1) & live).sum() == 237
    assert len(icu.FEATURES) == data.features.shape[1] == 47
    path = Path(str(PACKAGE.locate_file("icu_sepsis"))) / "envs" / "assets" / "dynamics.npz"
    with np.load(path) as file:
        rewards = file["r_mat"]
    # The rewards that are not loaded: 1 on every step into survival, and nothing else.
    rewards = rewards[: icu.DEATH]
    assert rewards.sum() == icu.DEATH * icu.ACTIONS
    assert (rewards[..., icu.SURVIVAL] == 1).all()


@pytest.mark.parametrize(
    ("name", "survival", "length", "ood", "sofa10", "terminate"),
    [
        ("random", 0.7801, 9.46, 0.859, 0.777, 0.0084),
        ("clinician", 0.7818, 9.24, 0.121, 0.740, 0.4158),
        ("clinician-admissible", 0.7820, 9.22, 0.0, 0.734, 0.7820),
        ("optimum", 0.8751, 10.99, 0.005, 0.880, None),
        ("optimum, admissible", 0.8751, 10.99, 0.0, 0.880, 0.8751),
        ("least", 0.6330, 12.32, None, None, None),
    ],
)
def test_exact_values(name, survival, length, ood, sofa10, terminate):
    """Reference values computed independently from the same tables."""
    mdp = icu.mdp()
    special = {
        "optimum": optimum,
        "optimum, admissible": lambda: optimum(mdp.supported),
        "least": lambda: plan(mdp, -mdp.rewards).policy,
    }
    policy = special[name]() if name in special else icu.policy(name)
    found = exact_evaluate(mdp, policy)
    assert found.value == pytest.approx(survival, abs=1e-3)
    assert found.length == pytest.approx(length, abs=0.006)
    if ood is not None:
        assert found.ood_rate == pytest.approx(ood, abs=1e-3)
        assert found.costs["sofa10"] == pytest.approx(sofa10, abs=1e-3)
        assert found.costs["inadmissible"] == pytest.approx(found.ood)
    if terminate is not None:
        dying = exact_evaluate(icu.mdp("terminate"), policy)
        assert dying.value == pytest.approx(terminate, abs=1e-3)


@pytest.mark.parametrize(
    ("cost", "clinician", "least"),
    [("sofa10", 0.740, 0.375), ("sofa8", 2.061, 1.354), ("urine", 1.979, 1.527),
     ("spo2", 0.067, 0.022), ("vasopressor", 0.614, 0.0), ("inadmissible", 1.118, 0.0)],
)  # fmt: skip
def test_costs(cost, clinician, least):
    mdp = icu.mdp()
    spent = exact_evaluate(mdp, icu.policy()).costs[cost]
    assert spent == pytest.approx(clinician, abs=1e-3)
    best = plan(mdp, -mdp.costs[cost]).policy
    assert exact_evaluate(mdp, best).costs[cost] == pytest.approx(least, abs=1e-3)


@pytest.fixture(scope="module")
def log():
    return icu.make_dataset(observation="index")


def test_logged_episodes(log):
    assert log.episode_lengths().mean() == pytest.approx(9.2, abs=0.1)
    assert log.episode_returns().mean() == pytest.approx(0.78, abs=0.01)
    assert log.episode_costs().mean() == pytest.approx(0.740, abs=0.04)
    state = log.observations[:, 0].astype(int)
    assert (~icu.tables().admissible[state, log.actions]).mean() == pytest.approx(0.12, abs=0.01)
    # Ends right: each episode ends in death or survival, and nothing goes on after it.
    assert len(log.episodes) == log.terminals.sum() == 20_000
    assert not log.timeouts.any() and log.terminals[-1]
    next_states = log.next_observations[:, 0].astype(int)
    assert (log.terminals == (next_states >= icu.DEATH)).all()
    assert (log.rewards == (next_states == icu.SURVIVAL)).all()
    inside = ~log.terminals[:-1]
    assert (next_states[:-1][inside] == state[1:][inside]).all()
    assert (log.costs == (icu.tables().sofa[state] >= 10)).all()
    outcome = icu.outcomes(log)
    assert (outcome[~log.terminals] == 0).all()
    assert (outcome[next_states == icu.DEATH] == 1).all()
    assert (outcome[next_states == icu.SURVIVAL] == 2).all()
    # Only actions that clinicians take, as often as they take them.
    clinician = icu.tables().clinician
    assert (clinician[state, log.actions] > 0).all()
    common = np.bincount(state).argmax()
    share = np.bincount(log.actions[state == common], minlength=25) / (state == common).sum()
    assert np.abs(share - clinician[common]).max() < 0.05


def test_seeds_and_behaviours():
    a, b, c = (icu.make_dataset(episodes=50, seed=seed) for seed in (0, 0, 1))
    assert a.fingerprint == b.fingerprint != c.fingerprint

    def inadmissible(**options):
        dataset = icu.make_dataset(episodes=2000, cost="inadmissible", **options)
        return dataset.costs.mean()

    assert inadmissible(behaviour="clinician-admissible") == 0
    assert inadmissible(behaviour="random") == pytest.approx(0.859, abs=0.01)
    mixed = inadmissible(behaviour="clinician-admissible", epsilon=0.5)
    assert mixed == pytest.approx(0.43, abs=0.02)


def test_loader_and_options():
    dataset = icu.load("icu-sepsis-clinician-v0", episodes=20, observation="ogsrl13", doses=False,
                       actions="levels", cost="urine", strategy="terminate")  # fmt: skip
    assert dataset.observation_dim == 12 and dataset.actions.shape[1] == 2
    assert set(np.unique(dataset.actions)) <= {-1.0, -0.5, 0.0, 0.5, 1.0}
    assert dataset.card.env_id is None  # no environment is registered with these options
    urine = icu.OGSRL13.index("output_4h") - sum(
        name in icu.DOSES for name in icu.OGSRL13[: icu.OGSRL13.index("output_4h")]
    )
    assert (dataset.costs == (dataset.observations[:, urine] < 0)).all()
    levels = icu.make_dataset(episodes=2, actions="levels", strategy="terminate")
    assert levels.card.env_id == "saferl/ICUSepsisTerminateLevels-v0"
    assert icu.make_dataset(episodes=2).card.env_id == "saferl/ICUSepsis-v0"
    assert icu.make_dataset(episodes=2).discrete


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"behaviour": "clinicien"}, "did you mean 'clinician'"),
        ({"observation": "feature"}, "did you mean 'features'"),
        ({"strategy": "means"}, "did you mean 'mean'"),
        ({"cost": "sofa"}, "unknown cost 'sofa'"),
        ({"actions": "level"}, "did you mean 'levels'"),
        ({"episodes": 0}, "must be 1 or more"),
        ({"epsilon": 1.5}, "between 0 and 1"),
        ({"licens": "x"}, "did you mean 'licence'"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(SaferlError, match=message):
        icu.make_dataset(**{"episodes": 2} | options)


def test_an_option_of_other_data_is_told_with_those_of_these():
    with pytest.raises(SaferlError, match="unknown dataset option 'size': .*actions, .*episodes, "):
        load_dataset("saferl/icu-sepsis-clinician-v0", size=3)
    with pytest.raises(SaferlError, match="'sise': did you mean 'size'"):
        load_dataset("saferl/hopper-velocity-mixed-v0", sise=3)


def test_wrong_names():
    with pytest.raises(SaferlError, match="did you mean 'icu-sepsis-clinician-v0'"):
        icu.load("icu-sepsis-clinicians-v0")


def test_absent_tables(monkeypatch, tmp_path):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(icu.metadata, "distribution", absent)
    with pytest.raises(SaferlError, match=r'pip install "saferl\[icu\]"'):
        icu.tables.__wrapped__()

    class Damaged:
        def locate_file(self, path):
            return tmp_path / path

    monkeypatch.setattr(icu.metadata, "distribution", lambda name: Damaged())
    with pytest.raises(SaferlError, match="cannot be read"):
        icu.tables.__wrapped__()


def test_dose_levels():
    levels = icu.dose_levels()
    assert levels[0].tolist() == [-1, -1] and levels[24].tolist() == [1, 1]
    assert levels[5 * 3 + 1].tolist() == [0.5, -0.5]  # fluid 3, vasopressor 1
    assert (icu.to_action(levels) == np.arange(25)).all()
    assert icu.to_action([0.24, -0.26]) == 5 * 2 + 1  # nearest levels
    for wrong in ([0.0], [0.0, 1.1], [np.nan, 0.0]):
        with pytest.raises(SaferlError, match="fluid, vasopressor"):
            icu.to_action(wrong)


@pytest.mark.parametrize("options", [*icu.ENVS.values(), {"observation": "index"}])
def test_environment_keeps_gymnasiums_contract(options):
    check_env(icu.ICUSepsisEnv(**options), skip_render_check=True)


def play(env, policy, episodes, seed=0):
    """Returns, costs and steps of episodes under one action per state."""
    returns, costs, steps = [], [], 0
    for episode in range(episodes):
        _, info = env.reset(seed=seed + episode)
        ended, total, spent = False, 0.0, 0.0
        while not ended:
            state = info["state"]
            _, reward, ended, truncated, info = env.step(policy[state])
            assert not truncated
            assert info["cost"] == info["costs"]["sofa10"] == (icu.tables().sofa[state] >= 10)
            total, spent, steps = total + reward, spent + info["cost"], steps + 1
        returns.append(total)
        costs.append(spent)
    return np.mean(returns), np.mean(costs), steps / episodes


def test_environment_agrees_with_exact_values():
    policy = optimum(icu.mdp().supported)
    env = icu.ICUSepsisEnv(strategy="terminate")
    survival, cost, length = play(env, policy, 600)
    # Three standard errors of 600 episodes.
    assert survival == pytest.approx(0.875, abs=0.042)
    assert length == pytest.approx(10.99, abs=1.3)
    assert cost == pytest.approx(0.880, abs=0.3)


def test_environment_observations_and_inadmissible_actions():
    env = icu.ICUSepsisEnv("features", doses=False, strategy="terminate", cost="inadmissible")
    observation, info = env.reset(seed=3)
    assert observation.shape == (44,)
    kept = [i for i, name in enumerate(icu.FEATURES) if name not in icu.DOSES]
    expected = icu.tables().features[info["state"], kept]
    assert np.allclose(observation, expected, atol=1e-6)
    wrong = int(np.flatnonzero(~info["admissible"])[0])
    _, reward, terminated, _, info = env.step(wrong)
    assert terminated and reward == 0 and info["state"] == icu.DEATH and info["cost"] == 1
    with pytest.raises(SaferlError, match="call reset"):
        env.step(0)
    env.reset(seed=0)
    for action in (25, -1, 0.5):
        with pytest.raises(SaferlError, match="0 … 24"):
            env.step(action)
    for options in ({"observation": "x"}, {"strategy": "x"}, {"cost": "x"}, {"actions": "x"}):
        with pytest.raises(SaferlError, match="unknown"):
            icu.ICUSepsisEnv(**options)


def test_dose_actions_are_the_discrete_ones():
    discrete, levels = icu.ICUSepsisEnv(), icu.ICUSepsisEnv(actions="levels")
    for action in (0, 7, 24):
        discrete.reset(seed=action), levels.reset(seed=action)
        a = discrete.step(action)
        b = levels.step(icu.dose_levels()[action])
        assert (a[0] == b[0]).all() and a[1:4] == b[1:4]
