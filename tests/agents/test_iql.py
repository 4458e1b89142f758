"""IQL against a plain reference, and what each coefficient reaches."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal

from .plain import (
    MEMBERS,
    A,
    B,
    Net,
    adam,
    affected,
    descend,
    make,
    make_batch,
    member_of,
    moved,
    nets,
)

SETTINGS = {"actor_lr": 1e-2, "critic_lr": 2e-2, "value_lr": 3e-2, "tau": 0.1, "expectile": 0.8}


@pytest.mark.parametrize("member", range(len(MEMBERS)))
@pytest.mark.parametrize(
    ("beta", "clip", "decay"), [(3.0, 100.0, 0), (6.0, 1.01, 0), (0.5, 100.0, 4)]
)
def test_updates_are_the_reference(float64, member, beta, clip, decay):
    extra = {"beta": beta, "advantage_clip": clip, "actor_decay_steps": decay}
    agent = make("iql", **SETTINGS, **extra)
    actor, value = Net(agent.actor.mlp, member), Net(agent.value.mlp, member)
    log_std = torch.zeros(A, requires_grad=True)
    critics = nets(agent.critic, member)
    targets = [c.copy() for c in critics]
    optimizers = adam(actor, log_std, lr=1e-2), adam(*critics, lr=2e-2), adam(value, lr=3e-2)
    actor_optimizer, critic_optimizer, value_optimizer = optimizers
    clipped = 0
    for step in range(6):
        batch = make_batch(agent, step)
        metrics = agent.update(batch)
        own = member_of(batch, member)
        s, a, s2 = own.observations, own.actions, own.next_observations
        next_v = value(s2)[:, 0].detach()  # before V's step

        advantage = torch.minimum(*(t(s, a)[:, 0] for t in targets)).detach() - value(s)[:, 0]
        side = torch.tensor([0.8 if u > 0 else 0.2 for u in advantage])
        value_loss = (side * advantage**2).mean()
        descend(value_optimizer, value_loss)
        torch.testing.assert_close(metrics["value_loss"][member], value_loss.detach())

        y = own.rewards + 0.99 * (1 - own.terminals) * next_v
        critic_loss = sum(((c(s, a)[:, 0] - y) ** 2).mean() for c in critics) / 2
        descend(critic_optimizer, critic_loss)
        torch.testing.assert_close(metrics["critic_loss"][member], critic_loss.detach())
        for target, critic in zip(targets, critics):
            target.follow(critic, 0.1)

        weight = (beta * advantage.detach()).exp()
        clipped += int((weight > clip).sum())
        policy = Normal(actor(s).tanh(), log_std.exp())
        actor_loss = -(weight.clamp(max=clip) * policy.log_prob(a).sum(-1)).mean()
        if decay:
            phase = min(step / decay, 1)
            actor_optimizer.param_groups[0]["lr"] = 1e-2 * (1 + math.cos(math.pi * phase)) / 2
        descend(actor_optimizer, actor_loss)
        torch.testing.assert_close(metrics["actor_loss"][member], actor_loss.detach())
        actor.assert_is(agent.actor.mlp, member)
        value.assert_is(agent.value.mlp, member)
        torch.testing.assert_close(agent.actor.log_std[member, 0], log_std)
        for e in range(2):
            critics[e].assert_is(agent.critic.mlp, member, e)
            targets[e].assert_is(agent.critic_target.mlp, member, e)
    assert (clipped > 0) == (clip == 1.01)  # the case that tests the clip reaches it


def test_every_network_moves_with_every_update():
    agent = make("iql")
    batch = make_batch(agent)
    for _ in range(2):
        assert moved(agent, batch) == {"actor", "critic", "value", "critic_target"}


@pytest.mark.parametrize(
    ("before", "after", "reached"),
    [
        ({"expectile": 0.7}, {"expectile": 0.9}, {"value"}),
        ({"beta": 1.0}, {"beta": 3.0}, {"actor"}),
        ({"advantage_clip": 100.0}, {"advantage_clip": 1.0}, {"actor"}),
        ({"discount": 0.9}, {"discount": 0.99}, {"critic"}),
        ({"actor_dropout": 0.0}, {"actor_dropout": 0.5}, {"actor"}),
        ({"tau": 0.1}, {"tau": 0.2}, set()),
    ],
)
def test_coefficients_reach(before, after, reached):
    assert affected("iql", before, after) == reached


def test_beta_zero_is_cloning():
    """All weights are 1, so the actor does not depend on rewards or values."""
    one, two = make("iql", beta=0.0), make("iql", beta=0.0)
    for step in range(3):
        batch = make_batch(one, step)
        assert torch.equal(one.update(batch)["advantage_weight"], torch.ones(len(MEMBERS)))
        two.update(batch._replace(rewards=-5 * batch.rewards))
    for p, q in zip(one.actor.parameters(), two.actor.parameters()):
        assert torch.equal(p, q)
    assert not torch.equal(one.critic.mlp.weights[0], two.critic.mlp.weights[0])


def test_learning_rate_falls_along_a_cosine_and_survives_a_checkpoint():
    agent = make("iql", actor_lr=0.1, actor_decay_steps=10)
    rates = []
    for step in range(12):
        if step == 5:
            state = {key: tensor.clone() for key, tensor in agent.state_dict().items()}
            agent = make("iql", actor_lr=0.1, actor_decay_steps=10)
            agent.load_state_dict(state)
        agent.update(make_batch(agent, rows=B))
        rates.append(agent.actor_optimizer.param_groups[0]["lr"].item())
    expected = [0.05 * (1 + math.cos(math.pi * min(t, 10) / 10)) for t in range(12)]
    assert rates == pytest.approx(expected, abs=1e-8)


def test_dropout_is_for_training_only():
    agent = make("iql", actor_dropout=0.5)
    observations = make_batch(agent).observations
    policy = agent.policy()
    assert torch.equal(policy(observations), policy(observations))
