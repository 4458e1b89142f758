"""TD3+BC against a plain reference, and what each coefficient reaches."""

from __future__ import annotations

import pytest
import torch

from saferl.rng import MemberRandom

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

SETTINGS = {"actor_lr": 1e-2, "critic_lr": 2e-2, "tau": 0.1, "alpha": 1.7, "policy_noise": 0.4}


@pytest.mark.parametrize("member", range(len(MEMBERS)))
def test_updates_are_the_reference(float64, member):
    agent = make("td3_bc", **SETTINGS)
    actor, critics = Net(agent.actor.mlp, member), nets(agent.critic, member)
    actor_target, critic_targets = actor.copy(), [c.copy() for c in critics]
    actor_optimizer, critic_optimizer = adam(actor, lr=1e-2), adam(*critics, lr=2e-2)
    random = MemberRandom(MEMBERS, stream=1)
    for step in range(1, 5):
        batch = make_batch(agent, step)
        metrics = agent.update(batch)
        own = member_of(batch, member)
        s, a, s2 = own.observations, own.actions, own.next_observations
        noise = (0.4 * random.normal(B, A)[member]).clamp(-0.5, 0.5)
        assert noise.abs().max() == 0.5  # the clip matters here
        a2 = (actor_target(s2).tanh() + noise).clamp(-1, 1)
        next_q = torch.minimum(*(c(s2, a2)[:, 0] for c in critic_targets))
        y = (own.rewards + 0.99 * (1 - own.terminals) * next_q).detach()
        critic_loss = sum(((c(s, a)[:, 0] - y) ** 2).mean() for c in critics)
        descend(critic_optimizer, critic_loss)
        torch.testing.assert_close(metrics["critic_loss"][member], critic_loss.detach())
        assert ("actor_loss" in metrics) == (step % 2 == 0)
        if step % 2 == 0:
            proposed = actor(s).tanh()
            q = critics[0](s, proposed)
            weight = 1.7 / q.abs().mean().item()
            actor_loss = -weight * q.mean() + ((proposed - a) ** 2).mean()
            descend(actor_optimizer, actor_loss)
            torch.testing.assert_close(metrics["actor_loss"][member], actor_loss.detach())
            actor_target.follow(actor, 0.1)
            for target, critic in zip(critic_targets, critics):
                target.follow(critic, 0.1)
        actor.assert_is(agent.actor.mlp, member)
        actor_target.assert_is(agent.actor_target.mlp, member)
        for e in range(2):
            critics[e].assert_is(agent.critic.mlp, member, e)
            critic_targets[e].assert_is(agent.critic_target.mlp, member, e)


def test_actor_and_targets_move_with_every_second_update():
    agent = make("td3_bc")
    batch = make_batch(agent)
    everything = {"critic", "actor", "critic_target", "actor_target"}
    assert moved(agent, batch) == {"critic"}
    assert moved(agent, batch) == everything
    assert moved(agent, batch) == {"critic"}
    assert moved(agent, batch) == everything


@pytest.mark.parametrize(
    ("before", "after", "reached"),
    [
        ({"alpha": 1.0}, {"alpha": 2.0}, {"actor"}),
        ({"alpha": 0.0}, {"alpha": 1e-3}, {"actor"}),
        ({"discount": 0.9}, {"discount": 0.99}, {"critic", "actor"}),  # π sees the stepped critic
        ({"policy_noise": 0.1}, {"policy_noise": 0.2}, {"critic", "actor"}),
        ({"noise_clip": 0.5}, {"noise_clip": 0.01}, {"critic", "actor"}),
    ],
)
def test_coefficients_reach(before, after, reached):
    assert affected("td3_bc", before, after, updates=2) == reached


def test_terminal_rows_do_not_look_ahead():
    one, two = make("td3_bc"), make("td3_bc")
    batch = make_batch(one)._replace(terminals=torch.ones(len(MEMBERS), B))
    one.update(batch)
    two.update(batch._replace(next_observations=batch.next_observations + 1))
    for p, q in zip(one.critic.parameters(), two.critic.parameters()):
        assert torch.equal(p, q)
