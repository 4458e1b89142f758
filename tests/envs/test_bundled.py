"""Datasets that the library makes itself, here with behaviours of random weights."""

from __future__ import annotations

import json

import gymnasium
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import saferl.envs
from saferl.data import load_dataset
from saferl.envs import bundled
from saferl.errors import SaferlError
from saferl.rng import MemberRandom

MIXED = "saferl/hopper-velocity-mixed-v0"
P, S, H, A = 3, 11, 8, 3  # stacked policies, observation, hidden and action sizes of Hopper


def write_behaviours(folder, seed=5):  # of the first seeds, one whose hoppers meet the cost
    folder.mkdir(exist_ok=True)
    random = torch.Generator().manual_seed(seed)
    tensors, sizes = {}, [(S, H), (H, H), (H, 2 * A)]
    for i, (rows, columns) in enumerate(sizes):
        scale = 0.05 if i == 2 else 1.0  # small means and log σ near 0: actions tell their policy
        tensors[f"weight.{i}"] = (scale * torch.randn(P, rows, columns, generator=random)).half()
        tensors[f"bias.{i}"] = torch.randn(P, 1, columns, generator=random).half()
    save_file(tensors, folder / "hopper.safetensors")
    shares = [(0, 2), (2, 1), (None, 1)]  # as shares they need not sum to 1
    levels = {
        "medium": [{"policy": 1, "share": 1}],
        "mixed": [{"policy": policy, "share": share} for policy, share in shares],
    }
    policies = [{"index": i, "penalty": 2.5 * i, "return": 100.0, "cost": 4} for i in range(P)]
    manifest = {
        "licence": "Apache-2.0",
        "robots": {"hopper": {"policies": policies, "levels": levels}},
    }
    (folder / "behaviours.json").write_text(json.dumps(manifest))
    return tensors


@pytest.fixture
def behaviours(tmp_path, monkeypatch):
    monkeypatch.setattr(bundled, "BEHAVIOURS", tmp_path / "behaviours")
    monkeypatch.setenv("SAFERL_DATA_DIR", str(tmp_path / "cache"))
    return write_behaviours(tmp_path / "behaviours")


def forbid_generation(monkeypatch):
    def refuse(*_):
        raise AssertionError("generated again")

    monkeypatch.setattr(bundled, "_generate", refuse)


def test_behaviour_is_the_documented_network(behaviours):
    policy = bundled.Behaviour("hopper", 2)
    x = 20 * torch.randn(1, 4, S, generator=torch.Generator().manual_seed(1))
    hidden = x[0]
    for i in range(3):
        hidden = hidden @ behaviours[f"weight.{i}"][2].float() + behaviours[f"bias.{i}"][2].float()
        hidden = hidden.clamp(min=0) if i < 2 else hidden
    mean, log_std = hidden[:, :A], hidden[:, A:].clamp(-5, 2)
    torch.testing.assert_close(policy(x)[0], mean.tanh())
    noise = MemberRandom([5]).normal(4, A)[0]
    expected = (mean + log_std.exp() * noise).tanh()
    torch.testing.assert_close(policy.sample(x, MemberRandom([5]))[0], expected)
    assert (log_std == -5).any() and (log_std == 2).any()  # both clips were met


def test_generated_data_are_transitions_of_the_task(behaviours, monkeypatch):
    size = 600
    data = load_dataset(MIXED, size=size)
    assert len(data) == size and not data.problems
    assert data.observations.shape == (size, S) and data.actions.shape == (size, A)
    # These policies fall within a few steps; only the last episode is cut, and marked.
    ends = data.terminals | data.timeouts
    assert ends[-1] and data.timeouts.sum() == data.timeouts[-1] and data.terminals.sum() > 10

    # Every 20th step, played again in the simulator from its observation, gives the recorded row.
    env = gymnasium.make("saferl/HopperVelocity-v0")
    env.reset(seed=0)
    nq = env.unwrapped.model.nq
    assert set(data.costs[::20]) == {0.0, 1.0}
    for row in range(0, size, 20):
        # The x position, which the observation leaves out, changes nothing.
        state = np.concatenate([[0.0], data.observations[row].astype(np.float64)])
        env.unwrapped.set_state(state[:nq], state[nq:])
        observation, reward, terminal, _, info = env.step(data.actions[row])
        np.testing.assert_allclose(observation, data.next_observations[row], atol=2e-3)
        np.testing.assert_allclose(reward, data.rewards[row], atol=1e-4)
        assert (terminal, info["cost"]) == (data.terminals[row], data.costs[row])

    card = data.card
    assert card.id == MIXED and card.env_id == "saferl/HopperVelocity-v0"
    assert card.horizon == saferl.envs.HORIZON and card.licence == "Apache-2.0"
    assert data.normalised_score(3234.3) == pytest.approx(100.0)
    assert "not D4RL" in card.origin
    assert card.notes[-1] == (
        "behaviours: 50% of the steps policy 0 (penalty 0, return 100, cost 4); 25% of the steps "
        "policy 2 (penalty 5, return 100, cost 4); 25% of the steps random actions"
    )
    np.testing.assert_array_equal(card.action_low, env.action_space.low)
    np.testing.assert_array_equal(card.action_high, env.action_space.high)


def test_all_robots_match_their_environment():
    for robot, facts in bundled.ROBOTS.items():
        env = gymnasium.make(facts.env_id)
        assert env.action_space.shape == (facts.action_dim,), robot
        assert (env.action_space.low == -1).all() and (env.action_space.high == 1).all()


def test_the_mix_has_the_shares_of_the_manifest(behaviours):
    data = load_dataset(MIXED, size=2000)
    # Which policy made an episode: the one under which its actions are most probable.
    x = torch.from_numpy(data.observations.copy())[None]
    raw = torch.from_numpy(data.actions.copy())[None].clamp(-1 + 1e-6, 1 - 1e-6).atanh()
    densities = []  # log density of each step before tanh, up to a constant
    for index in range(P):
        mean, log_std = bundled.Behaviour("hopper", index)._head(x)
        densities.append((-0.5 * ((raw - mean) / log_std.exp()).square() - log_std).sum(-1)[0])
    # Uniform actions on [-1, 1] have density 1/2 times the slope of tanh.
    uniform = (1 - raw.tanh().square()).log() + np.log(np.sqrt(2 * np.pi) / 2)
    densities.append(uniform.sum(-1)[0])
    steps = np.zeros(P + 1)
    for start, stop in data.episodes:
        # Bounded below, so that one saturated action does not decide.
        scores = [density[start:stop].clamp(min=-20).sum() for density in densities]
        steps[np.argmax(scores)] += stop - start
    np.testing.assert_allclose(steps / len(data), [0.5, 0.0, 0.25, 0.25], atol=0.06)


def test_cached_and_reproducible(behaviours, monkeypatch, tmp_path):
    first = load_dataset(MIXED, size=300)
    other = load_dataset(MIXED, size=300, seed=1)
    (tmp_path / "cache" / "bundled" / f"{MIXED[7:]}-300-seed0.npz").unlink()
    torch.manual_seed(9)  # global generators play no part
    assert load_dataset(MIXED, size=300).fingerprint == first.fingerprint
    assert other.fingerprint != first.fingerprint
    with monkeypatch.context() as patch:
        forbid_generation(patch)
        cached = load_dataset(MIXED, size=300)
        assert cached.fingerprint == first.fingerprint and cached.card == first.card
        changed = load_dataset(MIXED, size=300, horizon=500, env_id=None)
        assert (changed.card.horizon, changed.card.env_id) == (500, None)
    names = sorted(file.name for file in (tmp_path / "cache" / "bundled").iterdir())
    assert names == [f"{MIXED[7:]}-300-seed{seed}.npz" for seed in (0, 1)]  # no temporary left


@pytest.mark.parametrize("harm", ["altered", "truncated", "other behaviours"])
def test_a_stale_or_damaged_cache_is_made_again(behaviours, tmp_path, capsys, harm):
    name = "hopper-velocity-medium-v0"
    first = bundled.load(name, size=100)
    (path,) = (tmp_path / "cache" / "bundled").iterdir()
    if harm == "altered":
        with np.load(path) as file:
            arrays = dict(file)
        arrays["rewards"] = arrays["rewards"] + 1
        np.savez(path, **arrays)
    elif harm == "truncated":
        path.write_bytes(path.read_bytes()[:2000])
    else:
        write_behaviours(bundled.BEHAVIOURS, seed=1)
    capsys.readouterr()
    again = bundled.load(name, size=100)
    assert "again: it" in capsys.readouterr().err
    assert (again.fingerprint == first.fingerprint) == (harm != "other behaviours")


def test_random_data_need_no_behaviours(tmp_path, monkeypatch):
    monkeypatch.setattr(bundled, "BEHAVIOURS", tmp_path / "nothing")
    monkeypatch.setenv("SAFERL_DATA_DIR", str(tmp_path))
    data = load_dataset("saferl/hopper-velocity-random-v0", size=300)
    assert len(data) == 300 and data.terminals.sum() > 3 and data.timeouts.sum() <= 1
    assert data.terminals[-1] or data.timeouts[-1]
    # Uniform on [-1, 1]: mean 0, variance 1/3, within five standard errors of 900 draws.
    assert abs(data.actions.mean()) < 0.1 and abs(data.actions.var() - 1 / 3) < 0.05
    assert bundled.ids() == [f"{r}-velocity-random-v0" for r in bundled.ROBOTS]
    with pytest.raises(SaferlError, match=r"incomplete, reinstall saferl .*behaviours\.json"):
        load_dataset("saferl/hopper-velocity-medium-v0", size=300)


def test_names(behaviours):
    levels = ["random", "medium", "mixed"]  # the manifest of this test has no expert
    ours = [f"hopper-velocity-{level}-v0" for level in levels]
    ours += [f"hopper-{rest}" for rest in shares("medium")]
    assert [name for name in bundled.ids() if "hopper" in name] == ours
    assert len(bundled.ids()) == 10  # and the random data of the two other robots


def shares(level: str) -> dict[str, float]:
    """Of the mixtures of a level."""
    return {f"{level}-random-{percent}-v0": percent / 100 for percent in (1, 5, 10, 25, 50)}


@pytest.fixture
def expert(behaviours):
    """The manifest of these tests, with an expert: policy 2."""
    path = bundled.BEHAVIOURS / "behaviours.json"
    manifest = json.loads(path.read_text())
    manifest["robots"]["hopper"]["levels"]["expert"] = [{"policy": 2, "share": 1}]
    path.write_text(json.dumps(manifest))
    bundled._manifest_at.cache_clear()
    yield
    bundled._manifest_at.cache_clear()


def spans(data) -> list[bytes]:
    """Observations of each episode, to recognise it by."""
    return [data.observations[start:stop].tobytes() for start, stop in data.episodes]


@pytest.mark.parametrize(("level", "policy"), [("expert", 2), ("medium", 1)])
def test_mixtures_are_episodes_of_a_level_and_of_random(expert, level, policy):
    size = 2000
    good, bad = (
        load_dataset(f"saferl/hopper-velocity-{source}-v0", size=size)
        for source in (level, "random")
    )
    known = {span: True for span in spans(good)} | {span: False for span in spans(bad)}
    for rest, share in shares(level).items():
        data = load_dataset(f"saferl/hopper-{rest}", size=size)
        origin = [known[span] for span in spans(data)]  # every episode is whole and of a source
        assert len(set(origin)) == 2 and origin == sorted(origin, reverse=True)
        lengths = data.episode_lengths()
        assert lengths.sum() == len(data)  # no fragment
        rows = lengths[: sum(origin)].sum()
        assert share * size < rows <= share * size + good.episode_lengths().max()
        assert size < len(data) <= size + bad.episode_lengths().max()
        card = data.card
        assert (card.id, card.env_id) == (f"saferl/hopper-{rest}", good.card.env_id)
        assert "not D4RL" in card.origin and "velocity-random-v0" in card.origin
        assert any(f"{share:.0%} of the size" in note and "Hong" in note for note in card.notes)
        assert f"{rows} of {len(data)} rows from {good.card.id}" in card.notes[-1]
        said = f"{level}'s behaviours: 100% of the steps policy {policy}"
        assert any(said in note for note in card.notes)
        assert data.costs is not None and card.reference_returns == good.card.reference_returns


def test_mixtures_repeat_and_come_from_the_cache(expert, monkeypatch):
    name = "saferl/hopper-expert-random-25-v0"
    first, other = load_dataset(name, size=300), load_dataset(name, size=300, seed=1)
    assert first.fingerprint != other.fingerprint
    with monkeypatch.context() as patch:
        forbid_generation(patch)
        again = load_dataset(name, size=300, horizon=500)
        assert again.fingerprint == first.fingerprint and again.card.horizon == 500
        with pytest.raises(SaferlError, match="did you mean 'horizon'"):
            load_dataset(name, size=301, horizn=3)  # before anything is generated


def test_mixtures_are_listed_where_there_is_an_expert(expert):
    mixtures = [*shares("expert"), *shares("medium")]
    assert bundled.ids()[-10:] == [f"hopper-{rest}" for rest in mixtures]
    assert len(bundled.ids()) == 4 + 2 + 10
    with pytest.raises(SaferlError, match="did you mean 'hopper-expert-random-25-v0'"):
        load_dataset("saferl/hopper-expert-random-26-v0")
    with pytest.raises(SaferlError, match=r"incomplete, reinstall saferl .*walker2d expert"):
        load_dataset("saferl/walker2d-expert-random-5-v0", size=100)


def test_errors_say_what_to_do(behaviours, monkeypatch, tmp_path):
    with pytest.raises(SaferlError, match="did you mean 'hopper-velocity-mixed-v0'"):
        load_dataset("saferl/hoper-velocity-mixed-v0")
    for size in (0, 2.5, True):
        with pytest.raises(SaferlError, match=r"size .* whole number of 1 or more"):
            load_dataset(MIXED, size=size)
    with pytest.raises(SaferlError, match=r"seed .* whole number of 0 or more"):
        load_dataset(MIXED, seed=-1)
    with pytest.raises(SaferlError, match="did you mean 'horizon'"):
        load_dataset(MIXED, size=10, horizn=3)

    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("SAFERL_DATA_DIR", str(tmp_path / "a file"))
    with monkeypatch.context() as patch:
        forbid_generation(patch)  # the folder is tried before the work is done
        with pytest.raises(SaferlError, match=r"cannot write .* set SAFERL_DATA_DIR"):
            load_dataset(MIXED, size=10)

    monkeypatch.setenv("SAFERL_DATA_DIR", str(tmp_path / "cache"))
    (bundled.BEHAVIOURS / "hopper.safetensors").write_bytes(b"no tensors")
    with pytest.raises(SaferlError, match="incomplete, reinstall saferl"):
        load_dataset(MIXED, size=10)
    assert not list((tmp_path / "cache" / "bundled").iterdir())  # a failure leaves nothing behind


SHIPPED = bundled.BEHAVIOURS / "behaviours.json"


@pytest.mark.skipif(not SHIPPED.exists(), reason="no behaviours in this checkout")
def test_shipped_behaviours_fit_their_robots():
    robots = json.loads(SHIPPED.read_text())["robots"]
    assert robots
    for robot, entry in robots.items():
        env = gymnasium.make(bundled.ROBOTS[robot].env_id)
        x = torch.zeros(1, 2, *env.observation_space.shape)
        assert set(entry["levels"]) == {"medium", "expert", "mixed"}
        for level, parts in entry["levels"].items():
            assert sum(part["share"] for part in parts) == pytest.approx(1.0, abs=1e-3), (
                robot,
                level,
            )
            for part in parts:
                if part["policy"] is not None:
                    action = bundled.Behaviour(robot, part["policy"])(x)[0, 0]
                    assert action.shape == env.action_space.shape and action.isfinite().all()
        facts = [set(policy) for policy in entry["policies"]]
        assert all({"index", "penalty", "step", "return", "cost"} <= fact for fact in facts)
        assert (bundled.BEHAVIOURS / f"{robot}.safetensors").stat().st_size < 1_000_000
