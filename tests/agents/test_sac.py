"""SAC against a plain reference, and what each coefficient reaches."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal, TanhTransform

from saferl.rng import MemberRandom

from .reference import (
    MEMBERS,
    A,
    B,
    Net,
    adam,
    descend,
    float64,
    gradients,
    make,
    make_batch,
    member_of,
    moved,
    nets,
)

__all__ = ["float64"]


@pytest.mark.parametrize("member", range(len(MEMBERS)))
@pytest.mark.parametrize("critics", [2, 3])
def test_updates_are_the_reference(float64, member, critics):
    rates = {"actor_lr": 1e-2, "critic_lr": 2e-2, "temperature_lr": 3e-2, "tau": 0.1}
    agent = make("sac", **rates, critics=critics, cost_penalty=0.7, initial_temperature=0.5)
    actor, qs = Net(agent.actor.mlp, member), nets(agent.critic, member)
    targets = [q.copy() for q in qs]
    log_temperature = torch.tensor(math.log(0.5), requires_grad=True)
    random = MemberRandom(MEMBERS, stream=1)
    actor_optimizer, critic_optimizer = adam(actor, lr=1e-2), adam(*qs, lr=2e-2)
    temperature_optimizer = adam(log_temperature, lr=3e-2)

    def draw(s, noise):
        mean, log_std = actor(s).chunk(2, -1)
        normal = Normal(mean, log_std.clamp(-5, 2).exp())
        raw = normal.mean + normal.stddev * noise
        slope = TanhTransform().log_abs_det_jacobian(raw, raw.tanh())
        return raw.tanh(), (normal.log_prob(raw) - slope).sum(-1)

    for step in range(3):
        batch = make_batch(agent, step, costs=True)
        metrics = agent.update(batch)
        s, a, r, cost, s2, terminal, _ = member_of(batch, member)
        next_noise, noise = (random.normal(B, A)[member] for _ in range(2))
        alpha = log_temperature.exp().detach()

        a2, log_a2 = (x.detach() for x in draw(s2, next_noise))
        next_q = torch.stack([q(s2, a2)[:, 0] for q in targets]).min(0).values
        y = (r - 0.7 * cost + 0.99 * (1 - terminal) * (next_q - alpha * log_a2)).detach()
        critic_loss = sum(((q(s, a)[:, 0] - y) ** 2).mean() for q in qs)
        descend(critic_optimizer, critic_loss)
        torch.testing.assert_close(metrics["critic_loss"][member], critic_loss.detach())

        p, log_p = draw(s, noise)
        policy_q = torch.stack([q(s, p)[:, 0] for q in qs]).min(0).values
        actor_loss = (alpha * log_p - policy_q).mean()
        descend(actor_optimizer, actor_loss)
        torch.testing.assert_close(metrics["actor_loss"][member], actor_loss.detach())

        descend(temperature_optimizer, -log_temperature * (log_p.detach() - A).mean())
        for target, q in zip(targets, qs):
            target.follow(q, 0.1)
        actor.assert_is(agent.actor.mlp, member)
        torch.testing.assert_close(agent.log_temperature[member], log_temperature)
        torch.testing.assert_close(agent.log_temperature.grad[member], log_temperature.grad)
        for e in range(critics):
            qs[e].assert_is(agent.critic.mlp, member, e)
            targets[e].assert_is(agent.critic_target.mlp, member, e)


def test_everything_moves_with_every_update():
    agent = make("sac")
    everything = {"actor", "critic", "critic_target", "log_temperature"}
    assert moved(agent, make_batch(agent)) == everything


@pytest.mark.parametrize(
    ("before", "after"),
    [
        # The actor's step sees the stepped critic, so what reaches one reaches the other.
        ({"discount": 0.9}, {"discount": 0.99}),
        ({"cost_penalty": 0.0}, {"cost_penalty": 1.0}),
        ({"initial_temperature": 1.0}, {"initial_temperature": 0.1}),
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


def test_costs_without_a_price_change_nothing():
    one, two = make("sac"), make("sac")
    one.update(make_batch(one, costs=True))
    two.update(make_batch(two, costs=True)._replace(costs=None))
    for p, q in zip(one.critic.parameters(), two.critic.parameters()):
        assert torch.equal(p, q)
