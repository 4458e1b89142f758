"""Members act in environments of their own and learn from a dataset beside them."""

from __future__ import annotations

import os
import signal

import gymnasium
import numpy as np
import pytest
import torch

import saferl
from saferl.agents.sac import SAC
from saferl.data import to_minari
from saferl.errors import SaferlError
from saferl.replay import OnlineBuffer, ReplayBuffer
from saferl.replay.mixed import MixedSampler
from saferl.rollout import VectorEnv
from saferl.runs.folder import RunFolder
from saferl.safety.shield import Shield
from saferl.spec import Spec
from saferl.training.loop import Loop
from saferl.training.online import OnlineEngine
from tests.conftest import PointEnv, point_dataset

ENV = "tests.conftest:PointTest-v0"
TINY = {"hidden": [8], "batch_size": 16, "random_steps": 10}
SPEC = Spec(2, 1, action_low=(-2.0,), action_high=(2.0,), horizon=20)


def quick(out, data=None, agent="sac", **options):
    options = {"env": ENV, "steps": 60, "members": 2, "settings": TINY, "eval_episodes": 2,
               "progress": False, "device": "cpu", "log_interval": 7} | options  # fmt: skip
    return saferl.train(agent, data, out=out, **options)


def same(a, b, but=()):
    (left, _), (right, _) = RunFolder(a).load(), RunFolder(b).load()
    assert left.keys() == right.keys()
    for key in left:
        if not key.startswith(but):
            assert torch.equal(left[key], right[key]), key
    for name in ("metrics.csv", "evaluation.csv"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def engine_for(env=PointEnv, members=(5, 6), data=None, steps=200, spec=SPEC, **settings):
    settings = {"hidden": [8], "batch_size": 8, "random_steps": 5} | settings
    agent = SAC(spec, SAC.make_config(settings), members)
    offline = None
    if data is not None:
        offline = ReplayBuffer.from_dataset(data, spec, members)
    return OnlineEngine(agent, VectorEnv(env, len(members), None), steps, offline)


# What a batch is made of --------------------------------------------------------------------------


def mixture(members=2, online=30, offline=50, **settings):
    """Offline rewards are 0 … 49; those of member m are 1000 (m + 1) + 0 … 29."""
    config = SAC.make_config({"batch_size": 8} | settings)
    spec = Spec(1, 1, action_low=(-1.0,), action_high=(1.0,))
    seeds = range(5, 5 + members)
    logged = None
    if offline:
        logged = ReplayBuffer(spec, offline, seeds)
        column, values = np.zeros((offline, 1), np.float32), np.arange(offline, dtype=np.float32)
        logged.extend(column, column, values, column, values, values)
    own = OnlineBuffer(spec, 100, seeds)
    which, zero = np.arange(members), np.zeros((members, 1), np.float32)
    for i in range(online):
        own.append(which, which < 0, zero, zero, 1000.0 * (which + 1) + i, zero, which * 0.0,
                   which * 0.0)  # fmt: skip
    return MixedSampler(config, logged, own, list(seeds))


def logged_share(batch, rows=8):
    """Share of the dataset in each of a batch's minibatches, ``[M, n]``."""
    return (batch.rewards < 1000).float().unflatten(1, (-1, rows)).mean(-1)


@pytest.mark.parametrize(("share", "expected"), [(0.5, 0.5), (0.25, 0.25), (0.3, 0.25), (1, 1)])
def test_every_minibatch_has_its_share_and_members_their_own_rows(share, expected):
    source = mixture(offline_share=share)
    batch = source.sample(40)
    assert (logged_share(batch) == expected).all()
    for m in range(2):
        own = batch.rewards[m][batch.rewards[m] >= 1000]
        assert ((own // 1000) == m + 1).all()


def test_blocks_are_of_one_source_and_as_frequent_as_asked():
    source = mixture(members=3, sampling="block", offline_share=0.25)
    shares = torch.stack([logged_share(source.sample(24)) for _ in range(400)])
    assert set(shares.unique().tolist()) == {0.0, 1.0}
    assert (shares == shares[..., :1]).all()  # an update is one block
    frequency = shares[..., 0].mean(0)
    assert ((frequency - 0.25).abs() < 4 * (0.25 * 0.75 / 400) ** 0.5).all(), frequency
    assert (shares[:, 0, 0] != shares[:, 1, 0]).any()  # each member chooses


def test_alternating_blocks_and_shares_that_move():
    source = mixture(sampling="alternate")
    assert [logged_share(source.sample(8))[0, 0].item() for _ in range(4)] == [1, 0, 1, 0]
    source = mixture(share_rule="proportional")
    assert source.share() == pytest.approx([50 / 80] * 2)
    assert (logged_share(source.sample(8)) == 5 / 8).all()
    source = mixture(share_rule="proportional", offline=490, online=10)
    own = torch.cat([1 - logged_share(source.sample(8)) for _ in range(1000)], 1) * 8
    assert set(own.unique().tolist()) == {0.0, 1.0}  # 0.16 of eight rows, by chance
    assert own.mean(1).tolist() == pytest.approx([0.16, 0.16], abs=4 * (0.16 * 0.84 / 1000) ** 0.5)
    source = mixture(share_rule="annealed", anneal_steps=100, offline_share=1.0, final_share=0.5)
    for steps, share in ((0, 1.0), (50, 0.75), (100, 0.5), (1000, 0.5)):
        source.env_steps = steps
        assert (logged_share(source.sample(16)) == share).all()


def test_a_source_without_rows_gives_way_to_the_other():
    assert (logged_share(mixture(online=0).sample(8)) == 1).all()
    assert (logged_share(mixture(offline=0).sample(8)) == 0).all()
    assert not mixture(online=0, offline=0).ready()
    source = mixture(offline_share=0.5)
    source.pretraining = True
    assert (logged_share(source.sample(8)) == 1).all()


@pytest.mark.parametrize(("share", "untouched"), [(0.0, "offline"), (1.0, "online")])
@pytest.mark.parametrize("sampling", ["mixed", "block"])
def test_the_other_source_is_never_read(share, untouched, sampling):
    source = mixture(sampling=sampling, offline_share=share)
    getattr(source, untouched).rows.fill_(torch.nan)
    before = getattr(source, untouched).random.state_dict()["state"]
    for _ in range(20):
        assert source.sample(24).rewards.isfinite().all()
    assert torch.equal(before, getattr(source, untouched).random.state_dict()["state"])


def test_a_member_draws_the_same_alone():
    for settings in ({}, {"sampling": "block"}):
        three, alone = mixture(members=3, **settings), mixture(members=1, **settings)
        for _ in range(10):
            assert torch.equal(three.sample(16).rewards[0], alone.sample(16).rewards[0])


# The loop -----------------------------------------------------------------------------------------


def test_updates_follow_environment_steps():
    for settings, steps, updates in (
        ({}, 25, 20),
        ({"start_steps": 15}, 25, 10),
        ({"inner_steps": 4}, 25, 20),
        ({"inner_steps": 4, "utd": 1.0}, 25, 5),
        ({"utd": 0.5}, 25, 10),
        ({"utd": 3.0}, 25, 60),
    ):
        engine = engine_for(**settings)
        assert engine.run(steps) == steps
        assert engine.agent.updates == updates, settings
        assert engine.online.sizes.tolist() == [steps, steps]
        engine.close()


def test_offline_steps_come_first_and_touch_no_environment(point):
    engine = engine_for(data=point, offline_steps=12)
    engine.run(12)
    assert engine.agent.updates == 12 and not engine.online.added.any()
    assert engine.vector_env.episode.tolist() == [-1, -1]
    engine.run(10)
    assert engine.agent.updates == 12 + 5 and engine.online.sizes.tolist() == [10, 10]


def test_what_is_stored_is_what_happened():
    engine = engine_for(steps=50)
    engine.run(45)
    for m, seed in enumerate((5, 6)):
        batch, ends = engine.online.of_member(m)
        assert np.flatnonzero(ends).tolist() == [19, 39]
        env = PointEnv()
        for i in range(45):
            if i % 20 == 0:
                start = (seed * 1_000_003) % 2**31 + i // 20
                observation, _ = env.reset(seed=start)
            torch.testing.assert_close(batch.observations[0, i], torch.tensor(observation).float())
            executed = batch.actions[0, i].numpy() * 2
            observation, reward, terminated, _, info = env.step(executed)
            assert batch.rewards[0, i].item() == pytest.approx(reward, abs=1e-6)
            assert batch.costs[0, i] == info["cost"] and batch.terminals[0, i] == terminated
            torch.testing.assert_close(
                batch.next_observations[0, i], torch.tensor(observation).float()
            )
    assert engine.spent == pytest.approx(
        [engine.online.of_member(m)[0].costs.sum().item() for m in range(2)]
    )
    metrics = engine.read()
    assert metrics["train_length"].tolist() == [20, 20]
    assert metrics["exploration_cost"] == pytest.approx(engine.spent)
    engine.run(3)
    assert "train_return" not in engine.read()  # no episode ended since


class Cliff(gymnasium.Env):
    """Two steps to a terminal, or four to a time-out, in turn."""

    observation_space = gymnasium.spaces.Box(-9, 9, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-2.0, 2.0, (1,), np.float32)
    episodes = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.episodes = 0, self.episodes + 1
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.t += 1
        falls = self.episodes % 2 == 1 and self.t == 2
        return np.zeros(2, np.float32), 1.0, falls, self.t == 4, {"cost": 0.0}


def test_terminals_stop_the_bootstrap_and_time_outs_do_not():
    engine = engine_for(Cliff, (5,), steps=12)
    engine.run(12)
    batch, ends = engine.online.of_member(0)
    assert np.flatnonzero(ends).tolist() == [1, 5, 7, 11]
    assert batch.terminals[0].nonzero().flatten().tolist() == [1, 7]
    agent = engine.agent
    target, _ = agent.target(batch)
    assert (target[0, [1, 7]] == 1).all() and (target[0, [5, 11]] != 1).all()


def test_a_member_among_others_is_that_member_alone(point):
    three = engine_for(members=(5, 6, 7), data=point)
    alone = engine_for(members=(6,), data=point)
    for engine in (three, alone):
        engine.run(60)
    torch.testing.assert_close(
        three.online.of_member(1)[0].observations, alone.online.of_member(0)[0].observations,
        rtol=1e-4, atol=1e-4,
    )  # fmt: skip
    for ours, theirs in zip(three.agent.actor.parameters(), alone.agent.actor.parameters()):
        torch.testing.assert_close(ours[1], theirs[0], rtol=1e-3, atol=1e-4)


# Stopping and going on ----------------------------------------------------------------------------


def interrupt_at(monkeypatch, step):
    original = Loop._due

    def interrupt(loop, event):
        if event == "log" and loop.step == step:
            os.kill(os.getpid(), signal.SIGINT)
        return original(loop, event)

    monkeypatch.setattr(Loop, "_due", interrupt)
    return lambda: monkeypatch.setattr(Loop, "_due", original)


SETTINGS = {
    "online": (TINY, False),
    "mixed": (TINY, True),
    "block": (TINY | {"sampling": "block", "inner_steps": 3, "utd": 2.0}, True),
    "offline first": (TINY | {"offline_steps": 15}, True),
    "budget": (TINY | {"exploration_budget": [2.0, 1e9]}, True),
}


@pytest.mark.parametrize("case", SETTINGS)
@pytest.mark.parametrize("step", [7, 35])
def test_resumed_in_mid_episode_is_unbroken(case, step, point, tmp_path, monkeypatch):
    settings, both = SETTINGS[case]
    data = point if both else None
    whole = quick(tmp_path / "whole", data, settings=settings)
    undo = interrupt_at(monkeypatch, step)
    with pytest.raises(KeyboardInterrupt):
        quick(tmp_path / "broken", data, settings=settings)
    undo()
    assert RunFolder(tmp_path / "broken").steps()[-1] == step  # episodes have 20 steps
    saferl.resume(tmp_path / "broken", dataset=data, device="cpu", progress=False)
    same(whole.path, tmp_path / "broken")
    if case == "budget" and step == 35:
        exploring = RunFolder(whole.path).load()[0]["engine.acting.exploring"]
        assert exploring.tolist() == [False, False, True, True]


SIMULATORS = {
    "saferl/HopperVelocity-v0": "mujoco",
    "saferl/PointMaze-Medium-v0": "gymnasium_robotics",
    "saferl/AntMaze-UMaze-v0": "gymnasium_robotics",
    "dmc/walker-walk-v0": "dm_control",
}


@pytest.mark.parametrize("env", SIMULATORS)
def test_simulators_come_back_to_the_bit(env, tmp_path, monkeypatch):
    pytest.importorskip(SIMULATORS[env])
    options = {"env": env, "members": 1, "eval_episodes": 1, "steps": 50,
               "eval_interval": 0}  # fmt: skip
    whole = quick(tmp_path / "whole", **options)
    undo = interrupt_at(monkeypatch, 28)
    with pytest.raises(KeyboardInterrupt):
        quick(tmp_path / "broken", **options)
    undo()
    saferl.resume(tmp_path / "broken", device="cpu", progress=False)
    same(whole.path, tmp_path / "broken")


class Drifting(PointEnv):
    """Its seed does not determine it."""

    def step(self, action):
        observation, *rest = super().step(action)
        return observation + np.random.default_rng().normal(size=2), *rest


def test_an_environment_that_does_not_come_back_begins_a_new_episode(tmp_path, capsys):
    short = quick(
        tmp_path / "short", env=Drifting, steps=30, settings=TINY | {"online_capacity": 99}
    )
    run = saferl.resume(short.path, env=Drifting, steps=40, device="cpu")
    said = [line for line in capsys.readouterr().out.splitlines() if "does not come back" in line]
    assert len(said) == 2 and "member seed=1 begins a new episode" in said[1]
    state, _ = RunFolder(run.path).load()
    ends = state["engine.buffer.online.ends"]
    assert ends[:, [19, 29]].all() and ends.sum() == 4  # cut where it was lost
    assert state["engine.acting.elapsed"].tolist() == [10, 10]


class Failing(PointEnv):
    """Every environment of the class together fails once, at a given step."""

    steps, when, how = 0, 70, "crash"

    def step(self, action):
        Failing.steps += 1
        observation, reward, *rest = super().step(action)
        if Failing.steps == Failing.when:
            if Failing.how == "crash":
                raise RuntimeError("the simulator lost its licence\nand more")
            return observation * np.nan, reward, *rest
        return observation, reward, *rest


@pytest.mark.parametrize("how", ["crash", "nan"])
def test_an_environment_that_fails_leaves_a_run_that_goes_on(tmp_path, how, monkeypatch):
    monkeypatch.setattr(Failing, "steps", 0)
    monkeypatch.setattr(Failing, "how", how)
    with pytest.raises(SaferlError) as caught:
        quick(tmp_path / "run", env=Failing, eval_interval=0, steps=60)
    text = str(caught.value)
    what = "the simulator lost its licence" if how == "crash" else "non-finite observation"
    # The 70th call is the second member's 35th step, its 15th of the second episode.
    for part in (what, "Failing, episode 1", "step 15", "member seed=1", "up to step 34 is kept",
                 f"--resume {tmp_path / 'run'}"):  # fmt: skip
        assert part in text, part
    assert "\n" not in text
    state, header = RunFolder(tmp_path / "run").load()
    assert header["step"] == 34
    assert state["engine.buffer.online.added"].tolist() == [34, 34]
    run = saferl.resume(tmp_path / "run", env=Failing, device="cpu", progress=False)
    state, header = RunFolder(run.path).load()
    assert header["step"] == 60 and run.agent.updates == 50
    ends = state["engine.buffer.online.ends"]
    assert ends[0].nonzero().flatten().tolist() == [19, 39, 59]  # the other went on where it was
    assert ends[1].nonzero().flatten().tolist() == [19, 33, 53]
    rows = state["engine.buffer.online.rows"]
    assert rows.isfinite().all()
    whole = quick(tmp_path / "whole", env=PointEnv, eval_interval=0, steps=60)
    expected = RunFolder(whole.path).load()[0]["engine.buffer.online.rows"]
    torch.testing.assert_close(rows[0], expected[0], rtol=1e-4, atol=1e-4)


class FailingEvaluation(PointEnv):
    """Evaluations, told by their seeds, fail once: at a given step of all of them together."""

    steps, when, how = 0, 0, "crash"
    evaluation = False

    def reset(self, *, seed=None, options=None):
        self.evaluation = 10_000 <= seed < 10_100
        return super().reset(seed=seed)

    def step(self, action):
        FailingEvaluation.steps += self.evaluation
        observation, reward, *rest = super().step(action)
        if self.evaluation and FailingEvaluation.steps == FailingEvaluation.when:
            if FailingEvaluation.how == "crash":
                raise RuntimeError("out of licences")
            return observation, np.nan, *rest
        return observation, reward, *rest


FAILED = {"sac": TINY, "td3_bc": {"hidden": [8], "batch_size": 16}}


@pytest.mark.parametrize("agent", FAILED)
@pytest.mark.parametrize("how", ["crash", "nan"])
@pytest.mark.parametrize(
    ("when", "step", "where"),
    [
        # An evaluation is 4 episodes of 20 steps side by side, 2 of each member, every 12 steps.
        (100, 24, "episode 1 (reset with seed 10001), step 5: WHAT (member seed=1)"),
        (325, 60, "episode 0 (reset with seed 10000), step 2: WHAT (member seed=0)"),
    ],
)
def test_an_evaluation_that_fails_is_made_up_for(
    agent, how, when, step, where, point, tmp_path, monkeypatch
):
    monkeypatch.setattr(FailingEvaluation, "steps", 0)
    monkeypatch.setattr(FailingEvaluation, "how", how)
    options = {"env": FailingEvaluation, "settings": FAILED[agent], "checkpoint_interval": 60}
    whole = quick(tmp_path / "whole", point, agent, **options)
    assert FailingEvaluation.steps == 400
    monkeypatch.setattr(FailingEvaluation, "steps", 0)
    monkeypatch.setattr(FailingEvaluation, "when", when)
    with pytest.raises(SaferlError) as caught:
        quick(tmp_path / "broken", point, agent, **options)
    what = "RuntimeError: out of licences" if how == "crash" else "non-finite reward"
    text = str(caught.value)
    for part in ("evaluation: FailingEvaluation", *where.split("WHAT"), what, "\n" not in text,
                 f"up to step {step} is kept", f"--resume {tmp_path / 'broken'}"):  # fmt: skip
        assert part is True or part in text, part
    assert RunFolder(tmp_path / "broken").steps() == [step]
    run = saferl.resume(tmp_path / "broken", dataset=point, env=FailingEvaluation, device="cpu",
                        progress=False)  # fmt: skip
    same(whole.path, run.path)
    assert (run.evaluation.returns == whole.evaluation.returns).all()


def test_a_policy_that_is_not_finite_is_not_kept(point, tmp_path, monkeypatch):
    """The checkpoint before it is worth more."""
    from saferl.nn import Policy

    monkeypatch.setattr(Policy, "forward", lambda policy, rows: rows[..., :1] * torch.nan)
    with pytest.raises(SaferlError, match="step 0: the policy returned a non-finite action"):
        quick(tmp_path / "run", point, "td3_bc", settings=FAILED["td3_bc"])
    assert RunFolder(tmp_path / "run").steps() == []


# Warm start ---------------------------------------------------------------------------------------


def test_a_run_starts_from_another_ones_networks_and_units(point, tmp_path, capsys):
    first = quick(tmp_path / "first", point, settings=TINY | {"normalize_observations": True})
    second = quick(tmp_path / "second", settings=TINY | {"random_steps": 0, "start_steps": 99},
                   start_from=first.path)  # fmt: skip
    for name in ("actor", "critic", "critic_target"):
        for a, b in zip(getattr(first.agent, name).parameters(),
                        getattr(second.agent, name).parameters()):  # fmt: skip
            assert torch.equal(a, b)
    assert second.agent.spec == first.agent.spec and second.agent.spec.observation_mean
    slots = second.agent.actor_optimizer.state_dict()["state"]
    assert slots[0]["step"].item() == first.agent.updates and second.agent.updates == 0
    assert RunFolder(second.path).config().start_from == str(first.path)
    saferl.resume(second.path, steps=70, device="cpu", progress=False)
    one = quick(tmp_path / "one", members=1, steps=20)
    assert "take random actions" not in capsys.readouterr().out
    many = quick(tmp_path / "many", members=3, start_from=one.path, steps=12, progress=True)
    assert many.agent.members == 3  # one member for all
    assert "the first 10 environment steps take random actions" in capsys.readouterr().out
    with pytest.raises(SaferlError, match="has 2 members and this one has 3"):
        quick(tmp_path / "x", members=3, start_from=first.path)
    with pytest.raises(SaferlError, match="give both the same hidden layers"):
        quick(tmp_path / "x", settings=TINY | {"hidden": [9]}, start_from=first.path)
    assert not (tmp_path / "x").exists()


# Costs --------------------------------------------------------------------------------------------


class Toll(PointEnv):
    """Each step costs ½."""

    def step(self, action):
        *rest, _ = super().step(action)
        return *rest, {"cost": 0.5}


def test_a_budget_of_nothing_is_said(point, tmp_path, capsys):
    settings = TINY | {"exploration_budget": [0.0, 1e9]}
    quick(tmp_path / "run", point, env=Toll, settings=settings, members=1, progress=True)
    said = [line for line in capsys.readouterr().out.splitlines() if "does not act" in line]
    assert len(said) == 1 and "its exploration_budget is 0" in said[0]


def test_costs_of_the_environment_are_kept_beside_data_without(tmp_path):
    data = point_dataset()
    arrays = {name: getattr(data, name) for name in saferl.Dataset.FIELDS if name != "costs"}
    run = quick(tmp_path / "run", saferl.Dataset.from_arrays(**arrays, card=data.card), env=Toll)
    assert (saferl.gathered(run.path).costs == 0.5).all()


def test_an_exploration_budget_ends_exploring_and_says_so(point, tmp_path, capsys):
    settings = TINY | {"exploration_budget": [10.0, 1e9]}
    run = quick(tmp_path / "run", point, env=Toll, settings=settings, members=1, progress=True)
    said = [line for line in capsys.readouterr().out.splitlines() if "stops exploring" in line]
    assert len(said) == 1
    assert "at step 20: it has spent a cost of 10 of its exploration_budget of 10" in said[0]
    state, _ = RunFolder(run.path).load()
    assert state["engine.buffer.online.added"].tolist() == [20, 60]
    assert state["engine.acting.spent"].tolist() == [10, 30]
    assert run.agent.updates == 50  # with what it has
    heads, *_, first, second = (
        line.split(",") for line in (run.path / "metrics.csv").read_text().splitlines()
    )
    assert "exploration_cost" in heads
    assert [float(row[heads.index("exploring")]) for row in (first, second)] == [0, 1]
    longer = saferl.resume(run.path, dataset=point, env=Toll, steps=70, device="cpu",
                           progress=False)  # fmt: skip
    assert RunFolder(longer.path).load()[0]["engine.buffer.online.added"].tolist() == [20, 70]


class Silent(PointEnv):
    """Reports no cost."""

    def step(self, action):
        *rest, _ = super().step(action)
        return *rest, {}


BAD = [
    ({"settings": {"exploration_budget": -1.0}}, "exploration_budget is a cost of 0 or more"),
    ({"settings": {"exploration_budget": 0.0}, "data": None}, "nothing to learn from: pass --data"),
    ({"settings": {"inner_steps": 0}}, "inner_steps must be 1 or more, got 0"),
    ({"settings": {"utd": -1.0}}, "utd is above 0"),
    (
        {"settings": {"offline_share": 1.5}},
        "offline_share must be 0 or more and at most 1, got 1.5",
    ),
    (
        {"settings": {"sampling": "alternate", "offline_share": [0.2, 0.9]}},
        "only with sampling=block",
    ),
    ({"settings": {"sampling": "mixd"}}, "unknown sampling 'mixd': did you mean 'mixed'"),
    ({"settings": {"share_rule": "annealed"}}, "needs anneal_steps"),
    ({"settings": {"offline_steps": 61}}, "offline_steps = 61 is more than the 60 steps"),
    ({"settings": {"offline_steps": 6}, "data": None}, "pass --dataset"),
    ({"settings": {"target_critics": 3}}, "target_critics = 3 of critics = 2"),
    ({"settings": {"normalize_observations": True}, "data": None}, "no dataset to normalise by"),
    ({"env": "Pendulum-v1"}, "Pendulum-v1 has observations of 3 numbers, but 2 are expected"),
    ({"env": None, "data": "envless"}, "acts in an environment, but none is known: pass --env"),
    ({"data": "wide"}, r"takes actions in \[-2, 2\], but those of the data lie in \[-5, 5\]"),
    ({"env": Silent, "settings": {"exploration_budget": 5.0}}, "Silent reports no cost"),
    ({"env": Silent, "settings": {"cost_limit": 5.0}}, "Silent reports no cost"),
    ({"env": Silent, "guard": lambda policy: budgeted(policy)}, "Silent reports no cost"),
    ({"env": lambda: gymnasium.make_vec("Pendulum-v1", 2)}, "a vector of environments was given"),
    ({"start_from": "nowhere"}, "nowhere"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_input_is_one_line(tmp_path, options, message):
    options = dict(options)
    wide = {"action_low": (-5.0,), "action_high": (5.0,)}
    which = options.pop("data", "envless")
    data = which and point_dataset(env_id=None, **(wide if which == "wide" else {}))
    options["settings"] = TINY | options.get("settings", {})
    with pytest.raises(SaferlError, match=message) as caught:
        quick(tmp_path / "run", data, **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_graph_cannot_hold_an_environments_steps():
    from saferl.registry import agent_class
    from saferl.runs.config import RunConfig
    from saferl.training.train import _check_machine

    sac, gpu = agent_class("sac"), torch.device("cuda")
    _check_machine(sac, RunConfig("sac"), gpu)
    with pytest.raises(SaferlError, match="between its updates, use eager or compile"):
        _check_machine(sac, RunConfig("sac", engine="cuda_graph"), gpu)


def test_a_run_that_compiles_resumes(point, tmp_path, monkeypatch):
    """Without the compiler. Blocks come from one source or from the other."""
    from saferl.training import compiled

    parts = []
    monkeypatch.setattr(compiled, "inductor", lambda module, _: parts.append(module) or module)
    options = {"engine": "compile", "settings": SETTINGS["block"][0]}
    whole = quick(tmp_path / "whole", point, "moorl", **options)
    undo = interrupt_at(monkeypatch, 35)
    with pytest.raises(KeyboardInterrupt):
        quick(tmp_path / "broken", point, "moorl", **options)
    undo()
    before = len(parts)
    saferl.resume(tmp_path / "broken", dataset=point, device="cpu", progress=False)
    assert len(parts) > before
    (left, _), (right, _) = (RunFolder(tmp_path / name).load() for name in ("whole", "broken"))
    for key, tensor in left.items():
        torch.testing.assert_close(right[key], tensor, rtol=1e-5, atol=1e-6, msg=key)
    assert whole.agent.updates == 33


def test_a_dataset_of_another_task_than_the_run_to_start_from_is_one_line(point, tmp_path):
    quick(tmp_path / "first", steps=10)
    wide = saferl.Dataset.from_arrays(
        np.zeros((40, 3)), np.zeros((40, 1)), np.zeros(40), np.zeros(40), np.arange(40) % 20 == 19,
        id="wide",
    )  # fmt: skip
    with pytest.raises(SaferlError, match="observation_dim is 2 in the run .* and 3 in wide"):
        quick(tmp_path / "second", wide, start_from=tmp_path / "first")
    assert not (tmp_path / "second").exists()


def test_episodes_of_another_length_are_a_warning(point, tmp_path, capsys):
    for name, horizon in (("other", 50), ("same", 20)):
        quick(
            tmp_path / name, point.with_card(horizon=horizon), progress=True, steps=10,
            env=lambda: gymnasium.wrappers.TimeLimit(PointEnv(), 20),
        )  # fmt: skip
        warned = "has at most 20 steps, but one of the data 50" in capsys.readouterr().out
        assert warned is (name == "other")


def test_a_dataset_of_narrower_actions_is_a_warning(tmp_path, capsys):
    narrow = point_dataset()
    narrow = narrow.subset(rows=np.abs(narrow.actions[:, 0]) < 1).with_card(
        action_low=(-1.0,), action_high=(1.0,)
    )
    run = quick(tmp_path / "run", narrow, progress=True, steps=30)
    out = capsys.readouterr().out
    assert "takes actions in [-2, 2], but those of the data lie in [-1, 1], and so will" in out
    rows = RunFolder(run.path).load()[0]["engine.buffer.online.rows"]
    assert rows[..., 2].abs().max() <= 1  # normalised to [-1, 1] raw


# A guard ------------------------------------------------------------------------------------------


def still(observations):
    return np.zeros((len(observations), 1), np.float32)


def budgeted(policy):
    return Shield(policy, fallback=still, cost_limit=3.0, horizon=20)


def test_a_guard_stands_between_proposal_and_environment(tmp_path, monkeypatch):
    """`Toll` costs ½ a step: after 6 steps of an episode the budget of 3 is spent."""
    whole = quick(tmp_path / "whole", env=Toll, guard=budgeted)
    state, _ = RunFolder(whole.path).load()
    actions = state["engine.buffer.online.rows"][..., 2].unflatten(1, (3, 20))
    assert (actions[:, :, :6] != 0).all() and (actions[:, :, 6:] == 0).all()
    text = (whole.path / "metrics.csv").read_text().splitlines()
    column = text[0].split(",").index("guard_changed")
    assert float(text[1].split(",")[column]) == pytest.approx(1 / 7, rel=1e-6)  # of 7 steps
    undo = interrupt_at(monkeypatch, 28)  # in mid-episode, with 4 of 6 steps spent
    with pytest.raises(KeyboardInterrupt):
        quick(tmp_path / "broken", env=Toll, guard=budgeted)
    undo()
    with pytest.raises(SaferlError, match="Python object as env"):
        saferl.resume(tmp_path / "broken")
    with pytest.raises(SaferlError, match="Python object as guard"):
        saferl.resume(tmp_path / "broken", env=Toll)
    saferl.resume(tmp_path / "broken", env=Toll, guard=budgeted, device="cpu", progress=False)
    same(whole.path, tmp_path / "broken")


class Inner:
    """A guardian of actions within [-1, 1]."""

    threshold = 1.0

    def score(self, observations, actions):
        return np.abs(actions[:, 0])


class Drawing:
    """A fallback whose own action is never supported, so that samples are drawn."""

    members = 1

    def __call__(self, observations):
        return torch.full((1, observations.shape[1], 1), 2.0)

    def sample(self, observations, random):
        return 4 * random.uniform(observations.shape[1], 1) - 2


def drawing(policy):
    return Shield(policy, Inner(), fallback=Drawing(), samples=3, cost_limit=7.0, horizon=20)


@pytest.mark.parametrize("step", [7, 28, 42])
def test_a_guard_that_draws_goes_on_where_it_stood(step, tmp_path, monkeypatch):
    made = []

    def kept(policy):
        made.append(drawing(policy))
        return made[-1]

    whole = quick(tmp_path / "whole", env=Toll, guard=kept)
    undo = interrupt_at(monkeypatch, step)
    with pytest.raises(KeyboardInterrupt):
        quick(tmp_path / "broken", env=Toll, guard=kept)
    undo()
    saferl.resume(tmp_path / "broken", env=Toll, guard=kept, device="cpu", progress=False)
    same(whole.path, tmp_path / "broken")
    for unbroken, resumed in zip(made[:2], made[4:]):
        expected, found = unbroken.summary(), resumed.summary()
        assert 0 < found.pop("records") <= expected.pop("records")  # the log has them all
        assert found == expected and found["by_reason"]["ood"] > 0.1
        assert resumed.remaining == unbroken.remaining
    drawn = RunFolder(whole.path).load()[0]["engine.buffer.online.rows"][..., 2].flatten()
    assert len(drawn.unique()) > 40
    saferl.split(whole.path, tmp_path / "parts")
    saferl.merge([tmp_path / "parts/member-0", tmp_path / "parts/member-1"], tmp_path / "both")
    same(whole.path, tmp_path / "both")


def test_a_guarded_step_that_fails_is_not_in_the_guards_books(tmp_path, monkeypatch):
    monkeypatch.setattr(Failing, "steps", -1)  # one step sees whether costs are reported
    monkeypatch.setattr(Failing, "how", "crash")
    options = {"eval_interval": 0, "guard": drawing}
    with pytest.raises(SaferlError, match="up to step 34 is kept"):
        quick(tmp_path / "run", env=Failing, **options)
    state, _ = RunFolder(tmp_path / "run").load()
    assert state["engine.guard.steps"].tolist() == [34, 34]
    assert state["engine.guard.step"][0].tolist() == [14]
    assert not state["engine.guard.awaiting"].any()
    assert (state["engine.acting.replaced"][:, 1] == 34 % 7).all()  # since the reading at 28
    run = saferl.resume(tmp_path / "run", env=Failing, guard=drawing, device="cpu", progress=False)
    rows = RunFolder(run.path).load()[0]["engine.buffer.online.rows"]
    whole = quick(tmp_path / "whole", env=PointEnv, **options)
    expected = RunFolder(whole.path).load()[0]["engine.buffer.online.rows"]
    torch.testing.assert_close(rows[0], expected[0], rtol=1e-4, atol=1e-4)


def test_a_guard_that_raises_leaves_a_run_that_goes_on(tmp_path):
    calls = []

    class Fragile(Shield):
        def __call__(self, observation):
            calls.append(1)
            if len(calls) == 70:
                raise RuntimeError("the model of the guard is gone\nand more")
            return super().__call__(observation)

    def fragile(policy):
        return Fragile(policy, cost_limit=5.0, fallback=still, horizon=20)

    options = {"eval_interval": 0, "guard": fragile}
    with pytest.raises(SaferlError, match="up to step 34 is kept") as caught:
        quick(tmp_path / "run", env=PointEnv, **options)
    assert "the guard raised RuntimeError: the model of the guard is gone" in str(caught.value)
    state, header = RunFolder(tmp_path / "run").load()
    assert header["step"] == 34 and state["engine.guard.steps"].tolist() == [34, 34]
    run = saferl.resume(tmp_path / "run", env=PointEnv, guard=fragile, device="cpu", progress=False)
    whole = quick(tmp_path / "whole", env=PointEnv, **options)
    rows, expected = (
        RunFolder(r.path).load()[0]["engine.buffer.online.rows"] for r in (run, whole)
    )
    torch.testing.assert_close(rows[0], expected[0], rtol=1e-4, atol=1e-4)


def test_what_is_no_guard_is_one_line(tmp_path):
    with pytest.raises(SaferlError, match="guard returned a _Proposal without reset: it must"):
        quick(tmp_path / "run", guard=lambda policy: policy)
    assert not (tmp_path / "run").exists()


def test_a_guard_is_for_agents_that_act(point, tmp_path):
    with pytest.raises(SaferlError, match="acts in no environment while it learns"):
        quick(tmp_path / "run", point, "td3_bc", guard=budgeted, settings={"hidden": [8]})


# What was gathered --------------------------------------------------------------------------------


def test_gathered_rows_are_a_dataset(point, tmp_path):
    settings = TINY | {"normalize_observations": True, "reward_scale": 3.0, "reward_shift": 1.0}
    run = quick(tmp_path / "run", point, steps=50, settings=settings)
    data = saferl.gathered(run.path)
    assert len(data) == 100 and data.episodes.tolist() == [
        [0, 20], [20, 40], [40, 50], [50, 70], [70, 90], [90, 100],
    ]  # fmt: skip
    assert data.timeouts.sum() == 6 and not data.terminals.any()
    assert data.card.env_id == ENV and data.card.action_high == (2.0,)
    env = PointEnv()
    for m in range(2):
        observation, _ = env.reset(seed=m * 1_000_003)
        for i in range(50 * m, 50 * m + 20):
            np.testing.assert_allclose(data.observations[i], observation, atol=1e-5)
            observation, reward, _, _, info = env.step(data.actions[i])
            assert data.rewards[i] == pytest.approx(reward, abs=1e-5)
            assert data.costs[i] == info["cost"]
    np.testing.assert_allclose(data.next_observations[:19], data.observations[1:20], atol=1e-6)
    one = saferl.gathered(run.path, member=1)
    assert np.array_equal(one.observations, data.observations[50:])
    # It trains again.
    again = quick(tmp_path / "again", data, "bc", steps=5, settings={"hidden": [8]})
    assert again.agent.updates == 5
    with pytest.raises(SaferlError, match="no member 2"):
        saferl.gathered(run.path, member=2)
    with pytest.raises(SaferlError, match="learns from a dataset alone"):
        saferl.gathered(again.path)


def test_gathered_rows_of_a_full_ring_begin_with_the_oldest(tmp_path):
    run = quick(tmp_path / "run", settings=TINY | {"online_capacity": 16}, env=Silent, steps=50)
    data = saferl.gathered(run.path)
    assert len(data) == 32 and data.costs is None
    assert data.timeouts.nonzero()[0].tolist() == [5, 15, 21, 31]  # steps 34 … 49
    assert np.array_equal(data.next_observations[:5], data.observations[1:6])


def test_gathered_rows_go_to_minari_and_from_the_command_line(tmp_path, monkeypatch, capsys):
    import minari

    from saferl.cli import main

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "store"))
    monkeypatch.chdir(tmp_path)
    words = ["--set", "hidden=8", "--set", "batch_size=8", "--set", "random_steps=5", "--quiet"]
    assert main(["train", "sac", "--env", ENV, "--steps", "45", "--members", "2", "--out", "run",
                 "--eval-episodes", "1", *words]) == 0  # fmt: skip
    assert main(["collect", "run", "all.npz", "--gathered"]) == 0
    assert main(["collect", "run", "one.hdf5", "--gathered", "--member", "1"]) == 0
    assert "90 rows" in capsys.readouterr().out
    one = saferl.load_dataset("one.hdf5")
    assert len(one) == 45
    to_minari(one, "test/online-v0")
    back = saferl.load_dataset("minari/test/online-v0")
    np.testing.assert_allclose(back.rewards, one.rewards)
    np.testing.assert_allclose(back.costs, one.costs)
    assert minari.load_dataset("test/online-v0").total_episodes == 3
    assert main(["train", "moorl", "--dataset", "one.hdf5", "--env", ENV, "--steps", "20",
                 "--members", "1", "--from", "run", *words]) == 2  # fmt: skip
    assert "has 2 members and this one has 1" in capsys.readouterr().err


# Under a limit ------------------------------------------------------------------------------------


class Costly(gymnasium.Env):
    """Ten steps, each paying (a + 1) / 2 and costing relu(a)²: with limit L, a = √(L / 10)."""

    observation_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.t += 1
        a = float(action[0])
        return np.zeros(1, np.float32), (a + 1) / 2, False, self.t == 10, {"cost": max(a, 0) ** 2}


def test_a_limit_is_kept_while_acting(tmp_path):
    """Limits of 0.4, 2.5 and none: the first two policies stay near or below theirs."""
    rates = {"actor_lr": 3e-3, "critic_lr": 3e-3, "temperature_lr": 3e-3, "tau": 0.05}
    settings = {"hidden": [16], "batch_size": 64, "random_steps": 100, "discount": 0.9,
                "cost_discount": 0.9, "initial_temperature": 0.05}  # fmt: skip
    settings |= rates | {"multiplier_lr": 0.02, "cost_limit": [0.4, 2.5, np.inf]}
    with pytest.raises(SaferlError, match="or the environment a gymnasium TimeLimit"):
        quick(tmp_path / "run", env=Costly, settings=TINY | {"cost_limit": 1.0})
    run = quick(tmp_path / "run", env=lambda: gymnasium.wrappers.TimeLimit(Costly(), 10),
                members=1, steps=900, eval_interval=0, settings=settings)  # fmt: skip
    costs = run.evaluation.at().matrix("costs").mean(1)
    assert costs[2] > 7
    assert costs[0] < 1.2 * 0.4 and 0.2 < costs[1] < 1.2 * 2.5, costs
    multiplier = run.agent.constraint.multiplier()
    assert multiplier[2] == 0 and multiplier[0] > 0
