"""RLPD, WSRL, Cal-QL and fine-tuned IQL: updates, what is theirs alone, and whole runs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import saferl
from saferl.agents.cal_ql import CalQL
from saferl.agents.iql import IQL
from saferl.agents.rlpd import RLPD
from saferl.agents.wsrl import WSRL
from saferl.errors import SaferlError
from saferl.replay import ReplayBuffer
from saferl.replay.buffer import extra_columns
from saferl.rollout import VectorEnv
from saferl.runs.folder import RunFolder
from saferl.training.online import OnlineEngine
from tests.conftest import PointEnv

from .plain import MEMBERS, B, PlainSAC, make, make_batch, member_of
from .test_cql import RATES as CQL_RATES
from .test_cql import SMALL, Reference
from .test_moorl import SPEC

RATES = {"actor_lr": 1e-2, "critic_lr": 2e-2, "temperature_lr": 3e-2, "tau": 0.1,
         "batch_size": B}  # fmt: skip


@pytest.mark.parametrize("member", range(len(MEMBERS)))
@pytest.mark.parametrize(
    ("name", "settings"),
    [("rlpd", {}), ("rlpd", {"target_critics": 1, "entropy_backup": False}), ("wsrl", {})],
)
def test_updates_are_the_reference(float64, member, name, settings):
    """With the agent's own switches, K smaller."""
    agent = make(name, **RATES | settings, inner_steps=3, critics=4)
    plain = PlainSAC(agent, member)
    for step in range(2):
        batch = make_batch(agent, step, agent.batch_rows)
        agent.update(batch)
        plain.update(batch)
        plain.assert_is(agent)


def test_their_switches_are_the_published_ones():
    rlpd, wsrl = RLPD.make_config({}), WSRL.make_config({})
    assert (rlpd.inner_steps, rlpd.critics, rlpd.target_critics) == (20, 10, 2)
    assert rlpd.critic_layer_norm and not rlpd.actor_layer_norm and rlpd.entropy_backup
    assert (rlpd.offline_share, rlpd.sampling, rlpd.target_entropy) == (0.5, "mixed", -0.5)
    assert (wsrl.inner_steps, wsrl.critics, wsrl.actor_value) == (4, 10, "min")
    assert wsrl.actor_layer_norm and not wsrl.entropy_backup and wsrl.start_steps == 5000
    assert rlpd.batch_size == wsrl.batch_size == 256 and rlpd.updates_per_step == 1


def calibrated(batch, returns):
    return batch._replace(extras={"returns_to_go": returns})


@pytest.mark.parametrize("settings", [{}, {"lagrange": True, "target_gap": 0.8},
                                      {"importance_sampling": False}])  # fmt: skip
def test_cal_ql_is_the_reference_with_a_floor(float64, settings):
    agent = make("cal_ql", **SMALL | CQL_RATES | settings)
    references = [Reference(agent, m) for m in range(len(MEMBERS))]
    for step in range(3):
        batch = make_batch(agent, step)
        returns = 0.3 * torch.randn(2, B, generator=torch.Generator().manual_seed(step))
        returns[:, 0] = -torch.inf
        batch = calibrated(batch, returns)
        metrics = agent.update(batch)
        for m, reference in enumerate(references):
            expected = reference.update(member_of(batch, m))
            torch.testing.assert_close(metrics["gap"][m], expected["gap"].detach())
            reference.assert_is(agent)


def test_an_unknown_return_is_no_floor_and_a_high_one_stops_the_push():
    same = {k: v for k, v in vars(make("cal_ql", **SMALL).config).items()
            if k in make("cql").config.__dataclass_fields__}  # fmt: skip
    cql, cal_ql = make("cql", **same), make("cal_ql", **same)
    batch = make_batch(cql)
    cql.update(batch)
    cal_ql.update(calibrated(batch, torch.full((2, B), -torch.inf)))
    for a, b in zip(cql.critic.parameters(), cal_ql.critic.parameters()):
        assert torch.equal(a, b)
    values = torch.randn(2, 2, B, 3 * 3 + 1, requires_grad=True)
    high = calibrated(batch, torch.full((2, B), 1e3))
    cal_ql.calibrate(values, high).sum().backward()
    reached = values.grad.abs().amax((0, 1, 2))
    assert reached.tolist() == [1, 1, 1, 0, 0, 0, 0, 0, 0, 1]  # uniform and logged actions alone


def test_returns_to_go_of_the_dataset_and_of_what_was_acted(point):
    agent = CalQL(SPEC, CalQL.make_config({"hidden": [8], "critic_hidden": [8], "batch_size": 8,
                                           "samples": 2, "discount": 0.9}), (5, 6))  # fmt: skip
    extras = CalQL.batch_extras(agent.config)
    found = extra_columns(extras, point, SPEC)[:, 0]
    start, stop = point.episodes[3]
    expected = 0.0
    for row in reversed(range(start, stop)):
        expected = point.rewards[row] + 0.9 * expected
        assert found[row] == pytest.approx(expected, rel=1e-5)
    offline = ReplayBuffer.from_dataset(point, SPEC, (5, 6), extras=extras)
    engine = OnlineEngine(agent, VectorEnv(PointEnv, 2, None), 60, offline)
    engine.run(50)
    for m in range(2):
        batch, ends = engine.online.of_member(m)
        assert np.flatnonzero(ends).tolist() == [19, 39]
        rewards, returns = batch.rewards[0], batch.extras["returns_to_go"][0]
        assert (returns[40:] == -torch.inf).all()  # the episode is not over
        assert returns[39] == rewards[39]
        torch.testing.assert_close(returns[20:39], rewards[20:39] + 0.9 * returns[21:40])
    engine.close()


def test_an_episode_of_failures_is_worth_failing_for_ever():
    settings = {"failure_reward": -5.0, "discount": 0.99}
    agent = CalQL(SPEC, CalQL.make_config(settings | {"hidden": [8], "critic_hidden": [8]}), 1)
    (extra,) = CalQL.batch_extras(agent.config)

    def returns_to_go(*rewards):
        return extra.of_episode(None, np.array(rewards, np.float32), True)[:, 0]

    assert returns_to_go(*[-5.0] * 7) == pytest.approx([-500.0] * 7)
    mixed = returns_to_go(-5.0, 5.0)
    assert mixed == pytest.approx([-5 + 0.99 * 5, 5])
    assert math.isinf(CalQL.make_config({}).failure_reward)
    with pytest.raises(SaferlError, match="learns from returns-to-go"):
        agent.update(make_batch(agent)._replace(observations=torch.zeros(1, B, 2),
                                                next_observations=torch.zeros(1, B, 2),
                                                actions=torch.zeros(1, B, 1)))  # fmt: skip


def test_iql_learns_the_same_from_the_same_rows_before_it_acts(point):
    """The offline phase of `iql_finetune` is `iql`, batch for batch but for how they are drawn."""
    tuned, plain = make("iql_finetune"), make("iql")
    for step in range(3):
        batch = make_batch(plain, step)
        tuned.update(batch)
        plain.update(batch)
    for key, tensor in plain.state_dict().items():
        assert torch.equal(tensor, tuned.state_dict()[key]), key
    assert issubclass(type(tuned), IQL)


TINY = {"hidden": [8], "batch_size": 8}


def run(agent, out, data, **options):
    options = {"env": PointEnv, "steps": 40, "members": 2, "eval_episodes": 2, "progress": False,
               "device": "cpu"} | options  # fmt: skip
    return saferl.train(agent, data, out=out, **options)


def test_pre_training_and_fine_tuning_end_to_end(point, tmp_path):
    """Cal-QL on the dataset alone, then WSRL from its networks: sizes and optimisers go along."""
    sizes = {"critic_hidden": [8, 8], "critics": 3, "samples": 2, "actor_layer_norm": True,
             "critic_layer_norm": True, "offline_steps": 30}  # fmt: skip
    first = run("cal_ql", tmp_path / "first", point, steps=30, settings=TINY | sizes)
    assert first.agent.updates == 30
    settings = {"batch_size": 8, "start_steps": 20, "inner_steps": 2}
    second = run("wsrl", tmp_path / "second", None, start_from=first.path, settings=settings)
    config = second.agent.config
    assert (config.hidden, config.critic_hidden, config.critics) == ((8,), (8, 8), 3)
    assert second.agent.updates == 20  # of 40 steps, the first 20 only acted
    steps = second.agent.critic_optimizer.state_dict()["state"][0]["step"]
    assert steps == 30 + 2 * 20
    assert "engine.buffer.offline.random" not in RunFolder(second.path).load()[0]
    # The policy of the first 20 steps is the pre-trained one.
    frozen = run("wsrl", tmp_path / "frozen", None, start_from=first.path, steps=20,
                 settings=settings)  # fmt: skip
    for a, b in zip(first.agent.actor.parameters(), frozen.agent.actor.parameters()):
        assert torch.equal(a, b)
    with pytest.raises(SaferlError, match="scale_log_std"):
        run("sac", tmp_path / "x", None, start_from=first.path)


def test_the_actor_of_iql_goes_on_learning_when_it_acts(point, tmp_path):
    """Begun with the networks of a run at whose end its rate was 0."""
    settings = TINY | {"actor_decay_steps": 20}
    first = run("iql", tmp_path / "first", point, steps=20, settings=settings)
    again = run("iql_finetune", tmp_path / "again", point, start_from=first.path, settings=TINY)
    for before, after in zip(first.agent.actor.parameters(), again.agent.actor.parameters()):
        assert not torch.equal(before, after)


def test_a_method_of_fine_tuning_says_that_it_begins_with_random_networks(tmp_path, capsys):
    settings = TINY | {"critics": 2}
    run("wsrl", tmp_path / "first", None, steps=5, settings=settings, progress=True)
    assert "warning: wsrl is meant to begin with the networks of another run" in (
        capsys.readouterr().out
    )
    begun = {"settings": settings, "start_from": tmp_path / "first"}
    run("wsrl", tmp_path / "second", None, steps=5, progress=True, **begun)
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize("agent", ["rlpd", "cal_ql", "iql_finetune"])
def test_runs_resume_to_the_bit(agent, point, tmp_path):
    settings = TINY | {"offline_steps": 10}
    settings |= {"rlpd": {"inner_steps": 2, "critics": 3, "random_steps": 5},
                 "cal_ql": {"critic_hidden": [8], "samples": 2}}.get(agent, {})  # fmt: skip
    options = {"settings": settings, "eval_interval": 14, "log_interval": 7}
    whole = run(agent, tmp_path / "whole", point, **options)
    run(agent, tmp_path / "short", point, **options | {"steps": 28})
    again = saferl.resume(tmp_path / "short", dataset=point, env=PointEnv, steps=40,
                          device="cpu", progress=False)  # fmt: skip
    (ours, _), (theirs, _) = RunFolder(again.path).load(), RunFolder(whole.path).load()
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert torch.equal(tensor, theirs[key]), key


def test_they_need_what_they_are_made_for(point, tmp_path):
    for agent in ("rlpd", "cal_ql", "iql_finetune", "moorl"):
        with pytest.raises(SaferlError, match=f"{agent} learns from a dataset"):
            run(agent, tmp_path / "x", None)
    with pytest.raises(SaferlError, match="needs a discount below 1"):
        CalQL.batch_extras(CalQL.make_config({"failure_reward": -1.0, "discount": 1.0}))
