"""SAC against a plain reference, and what each coefficient reaches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from saferl.errors import SaferlError
from saferl.registry import agent_class

from . import plain
from .plain import MEMBERS, B, PlainSAC, gradients, make, make_batch, moved

RATES = {"actor_lr": 1e-2, "critic_lr": 2e-2, "temperature_lr": 3e-2, "tau": 0.1,
         "initial_temperature": 0.5, "batch_size": B}  # fmt: skip
THREE = {"inner_steps": 3}


@pytest.mark.parametrize("member", range(len(MEMBERS)))
@pytest.mark.parametrize(
    "settings",
    [
        {"cost_penalty": 0.7},
        {"critics": 3},
        {"critics": 1},
        {"critics": 4, "target_critics": 2},
        {"critics": 3, "actor_value": "mean"},
        {"entropy_backup": False},
        {"target_entropy": -0.5},
        {"critic_layer_norm": True, "actor_layer_norm": True},
        {"critic_hidden": [5], "init": "xavier", "log_std_min": -20.0},
        THREE,
        THREE | {"actor_steps": "last"},
        THREE | {"actor_steps": "all", "critics": 3, "actor_value": "mean"},
        THREE | {"fresh_batches": False},
    ],
)
def test_updates_are_the_reference(float64, member, settings):
    agent = make("sac", **RATES | settings)
    plain = PlainSAC(agent, member)
    for step in range(3):
        batch = make_batch(agent, step, agent.batch_rows, costs=True)
        agent.update(batch)
        plain.update(batch)
        plain.assert_is(agent)


def test_everything_moves_with_every_update():
    agent = make("sac")
    everything = {"actor", "critic", "critic_target", "log_temperature"}
    assert moved(agent, make_batch(agent, rows=agent.batch_rows)) == everything


@pytest.mark.parametrize(
    ("before", "after"),
    [
        # The actor's step sees the stepped critic, so what reaches one reaches the other.
        ({"discount": 0.9}, {"discount": 0.99}),
        ({"cost_penalty": 0.0}, {"cost_penalty": 1.0}),
        ({"initial_temperature": 1.0}, {"initial_temperature": 0.1}),
        ({"entropy_backup": True}, {"entropy_backup": False}),
        ({"critics": 3}, {"critics": 3, "target_critics": 1}),
    ],
)
def test_coefficients_reach(before, after):
    results = []
    for settings in (before, after):
        agent = make("sac", **settings)
        for step in range(3):
            agent.update(make_batch(agent, step, costs=True))
        results.append(gradients(agent))
    one, two = results
    differing = {k for k in one if any(not torch.equal(a, b) for a, b in zip(one[k], two[k]))}
    assert {"actor", "critic"} <= differing


def test_a_price_on_data_without_costs_is_refused():
    data, cls = plain.bare(plain.walk()), agent_class("sac")
    with pytest.raises(SaferlError, match="a cost_penalty is set but .* has no costs"):
        cls.prepare(data, cls.make_config({"cost_penalty": [0.0, 1.0]}))
    assert cls.prepare(data, cls.make_config({})) is data


def test_costs_without_a_price_change_nothing():
    one, two = make("sac"), make("sac")
    one.update(make_batch(one, costs=True))
    two.update(make_batch(two, costs=True)._replace(costs=None))
    for p, q in zip(one.critic.parameters(), two.critic.parameters()):
        assert torch.equal(p, q)


def test_the_target_draws_other_critics_each_time():
    agent = make("sac", critics=4, target_critics=1)
    with torch.no_grad():  # critics that differ by far
        agent.critic_target.mlp.biases[-1] += 100 * torch.arange(4.0).view(1, 4, 1, 1)
    batch = make_batch(agent)._replace(terminals=torch.zeros(2, B))
    means = torch.stack([agent.target(batch)[0].mean(-1) for _ in range(60)])
    levels = (means / 99).round()
    assert [sorted(set(column.tolist())) for column in levels.T] == [[0, 1, 2, 3]] * 2
    assert (levels[:, 0] != levels[:, 1]).any()  # members draw for themselves


# Under a limit ------------------------------------------------------------------------------------


def test_without_a_limit_there_is_no_cost_critic():
    agent = plain.make(type(make("sac")))
    assert agent.constraint is None and not hasattr(agent, "cost_critic")


def test_under_a_limit_the_actor_follows_the_penalised_value(float64):
    """One update from agents/shared/constraint.py's equations, at a multiplier that is not 0."""
    cls = type(make("sac"))
    agent = plain.make(cls, **RATES, cost_limit=2.0, multiplier_lr=0.3)
    agent.constraint.multipliers.level.fill_(0.5)
    agent.update(plain.costly(agent, 1))  # c̄ and the critics leave their start
    batch = plain.costly(agent, 2)
    rho = agent.constraint.multiplier()
    agent.constraint.observe(batch.costs)  # as `learn_costs` does, here for the expectation
    spent = agent.constraint.cost_mean * agent.constraint.steps
    q = agent.critic(batch.observations, batch.actions).detach()
    k = q[:, 0].abs().mean(-1) / spent
    state = agent.random.state_dict()
    noise = agent.random.normal(B, agent.spec.action_dim)
    agent.random.load_state_dict(state)
    loss, _, cost = agent.actor_loss(batch, q)
    for m in range(len(MEMBERS)):
        actions, log_prob = agent.actor.squash(*agent.actor(batch.observations), noise)
        value = agent.critic(batch.observations, actions).amin(1)[m]
        worst = agent.cost_critic.online(batch.observations, actions).amax(1)[m]
        penalised = (value - rho[m] * k[m] * worst) / (1 + rho[m])
        alpha = agent.log_temperature[m].exp()
        torch.testing.assert_close(loss[m], (alpha * log_prob[m] - penalised).mean())
        torch.testing.assert_close(cost[m], worst.mean())
    assert loss.requires_grad and not cost.requires_grad


def test_the_limit_reaches_actor_and_multiplier_and_costs_reach_the_cost_critic():
    cls = type(make("sac"))

    def after(limit: float, scale: float = 1.0):
        agent = plain.make(cls, cost_limit=limit, multiplier_lr=1.0)
        for step in range(3):
            batch = plain.costly(agent, step)
            agent.update(batch._replace(costs=scale * batch.costs))
        return agent

    tight, loose, dear = after(0.1), after(1e6), after(0.1, 3.0)
    assert (tight.constraint.multiplier() > 0).all()
    assert (loose.constraint.multiplier() == 0).all()
    assert plain.differing(tight, loose) >= {"actor.mlp"}
    assert plain.differing(tight, dear) >= {"cost_critic.online", "actor.mlp"}


def test_settings_out_of_range_are_one_line():
    cls = type(make("sac"))
    for settings, message in (
        ({"actor_steps": "some"}, "unknown actor_steps 'some'"),
        ({"actor_value": "max"}, "unknown actor_value"),
        ({"init": "he"}, "unknown init"),
        ({"critics": 0}, "critics = 0"),
    ):
        with pytest.raises(SaferlError, match=message):
            cls.make_config(settings)
    assert np.isinf(cls.make_config({}).exploration_budget)
