"""ReBRAC against a plain reference, and what each coefficient reaches."""

from __future__ import annotations

import pytest
import torch

from saferl.registry import agent_class
from saferl.replay import Batch, NextActions
from saferl.rng import MemberRandom

from . import plain as helpers
from .plain import MEMBERS, A, B, Net, adam, descend, make, member_of, moved, nets

SETTINGS = {"actor_lr": 1e-2, "critic_lr": 2e-2, "tau": 0.1, "policy_noise": 0.4,
            "actor_beta": 0.7, "critic_beta": 0.3}  # fmt: skip


def make_batch(agent, seed: int = 0) -> Batch:
    """Random transitions with next actions, some of them unknown."""
    random = torch.Generator().manual_seed(100 + seed)
    shape = agent.members, B
    extras = {
        "next_actions": torch.randn(*shape, A, generator=random).tanh(),
        "has_next_action": (torch.rand(shape, generator=random) < 0.8).to(
            torch.get_default_dtype()
        ),
    }
    return helpers.make_batch(agent, seed)._replace(extras=extras)


@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize("member", range(len(MEMBERS)))
def test_updates_are_the_reference(float64, member, layer_norm):
    agent = make("rebrac", **SETTINGS, critic_layer_norm=layer_norm)
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
        a2 = (actor_target(s2).tanh() + noise).clamp(-1, 1)
        next_q = torch.minimum(*(c(s2, a2)[:, 0] for c in critic_targets))
        away = ((a2 - own.extras["next_actions"]) ** 2).sum(1) * own.extras["has_next_action"]
        y = (own.rewards + 0.99 * (1 - own.terminals) * (next_q - 0.3 * away)).detach()
        critic_loss = sum(((c(s, a)[:, 0] - y) ** 2).mean() for c in critics)
        descend(critic_optimizer, critic_loss)
        torch.testing.assert_close(metrics["critic_loss"][member], critic_loss.detach())
        assert ("actor_loss" in metrics) == (step % 2 == 0)
        if step % 2 == 0:
            for target, critic in zip(critic_targets, critics):
                target.follow(critic, 0.1)
            actor_target.follow(actor, 0.1)
            proposed = actor(s).tanh()
            q = torch.minimum(*(c(s, proposed)[:, 0] for c in critics))
            cloning = ((proposed - a) ** 2).sum(1)
            actor_loss = (0.7 * cloning - q / q.abs().mean().item()).mean()
            descend(actor_optimizer, actor_loss)
            torch.testing.assert_close(metrics["actor_loss"][member], actor_loss.detach())
        actor.assert_is(agent.actor.mlp, member)
        actor_target.assert_is(agent.actor_target.mlp, member)
        for e in range(2):
            critics[e].assert_is(agent.critic.mlp, member, e)
            critic_targets[e].assert_is(agent.critic_target.mlp, member, e)


def test_actor_and_targets_move_with_every_second_update():
    agent = make("rebrac")
    batch = make_batch(agent)
    assert moved(agent, batch) == {"critic"}
    # The actor's target moves to where the actor stood, which is where it is itself at first.
    assert moved(agent, batch) == {"critic", "actor", "critic_target"}
    assert moved(agent, batch) == {"critic"}
    assert moved(agent, batch) == {"critic", "actor", "critic_target", "actor_target"}


@pytest.mark.parametrize(
    ("before", "after", "reached"),
    [
        ({"actor_beta": 1.0}, {"actor_beta": 2.0}, {"actor"}),
        ({"critic_beta": 0.0}, {"critic_beta": 0.1}, {"critic", "actor"}),
        ({"discount": 0.9}, {"discount": 0.99}, {"critic", "actor"}),
        ({"policy_noise": 0.1}, {"policy_noise": 0.2}, {"critic", "actor"}),
        ({"normalize_q": True}, {"normalize_q": False}, {"actor"}),
    ],
)
def test_coefficients_reach(before, after, reached):
    found = []
    for settings in (before, after):
        agent = make("rebrac", **settings)
        for step in range(2):
            agent.update(make_batch(agent, step))
        found.append({k: v.clone() for k, v in agent.state_dict().items()})
    names = {
        key.split(".")[0]
        for key, tensor in found[0].items()
        if key.split(".")[0] in ("actor", "critic") and not torch.equal(tensor, found[1][key])
    }
    assert names == reached


def test_rows_without_a_next_action_have_no_penalty():
    one, two = make("rebrac"), make("rebrac", critic_beta=0.0)
    batch = make_batch(one)
    unknown = torch.zeros_like(batch.extras["has_next_action"])
    batch = batch._replace(extras=dict(batch.extras) | {"has_next_action": unknown})
    one.update(batch)
    two.update(batch)
    for p, q in zip(one.critic.parameters(), two.critic.parameters()):
        assert torch.equal(p, q)


def test_it_asks_for_the_next_action():
    cls = agent_class("rebrac")
    (extra,) = cls.batch_extras(cls.make_config({}))
    assert isinstance(extra, NextActions)
