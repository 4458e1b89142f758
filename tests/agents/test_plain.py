"""The plain implementations that the agents are timed against do what the agents do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from saferl.rng import MemberRandom

from . import plain
from .plain import A, B, make, make_batch, member_of

SMALL = {
    "a2pr": {"critic_hidden": [8, 8], "value_hidden": [8, 8], "vae_hidden": [9, 9]},
    "cql": {"critic_hidden": [8, 8], "samples": 3, "orthogonal_init": False, "weight": 2.0},
}
RATES = {"actor_lr": 1e-2, "critic_lr": 2e-2, "tau": 0.1}


def linears(module: nn.Module) -> list[nn.Linear]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]


def pairs(agent, reference):
    """(plain linear layer, agent's weight [in, out], its bias [out]) of every layer of both."""
    together = [(reference.actor, agent.actor.mlp, 0)]
    for e in range(2):
        together.append((reference.critics[e], agent.critic.mlp, e))
        together.append((reference.critic_targets[e], agent.critic_target.mlp, e))
    if hasattr(reference, "vae"):
        together += [
            (reference.actor_target, agent.actor_target.mlp, 0),
            (reference.value, agent.value.mlp, 0),
            (reference.vae["encoder"], agent.vae.encoder, 0),
            (reference.vae["decoder"], agent.vae.decoder, 0),
        ]
    for module, mlp, element in together:
        layers = linears(module)
        assert len(layers) == len(mlp.weights)
        for layer, weight, bias in zip(layers, mlp.weights, mlp.biases):
            yield layer, weight[0, element], bias[0, element, 0]


def draws(name: str, random: MemberRandom):
    """The numbers of the agent's next update, in the order in which the plain one asks."""
    if name == "a2pr":
        while True:  # both draw when they need it
            yield lambda *shape: random.normal(*shape)[0]
    noise = random.normal(B, 1 + 2 * 3 + 1, A)[0]
    for part in (noise[:, 0], noise[:, 7], noise[:, 1:4], noise[:, 4:7]):  # π(s), a', here, there
        yield lambda *shape, part=part: part.reshape(shape)


@pytest.mark.parametrize("name", ["a2pr", "cql"])
def test_updates_are_the_agent_s(float64, name):
    settings = SMALL[name] | RATES
    agent = make(name, (5,), **settings)
    reference = plain.KINDS[name](agent.spec.observation_dim, A, agent.config)
    with torch.no_grad():
        if name == "a2pr":  # V near Q: rows with and without advantage
            batch = make_batch(agent, rows=100)
            q = agent.critic(batch.observations, batch.actions, elements=1)
            agent.value.mlp.biases[-1] += (q - agent.value(batch.observations)).mean()
        for layer, weight, bias in pairs(agent, reference):
            layer.weight.copy_(weight.T)
            layer.bias.copy_(bias)
    random = MemberRandom((5,), stream=1)
    for step in range(6):
        batch = make_batch(agent, step)
        state = [layer.weight.detach().clone() for layer, _, _ in pairs(agent, reference)]
        asked = draws(name, random)
        reference.normal = lambda *shape, asked=asked: next(asked)(*shape)
        reference.uniform = lambda *shape: random.uniform(*shape)[0]
        own = member_of(batch, 0)
        reference.update(
            own.observations, own.actions, own.rewards[:, None],
            own.next_observations, own.terminals[:, None],
        )  # fmt: skip
        agent.update(batch)
        still = name == "a2pr" and step % 2 == 0  # actor and targets
        for before, (layer, weight, bias) in zip(state, pairs(agent, reference)):
            torch.testing.assert_close(layer.weight, weight.T, rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(layer.bias, bias, rtol=1e-9, atol=1e-11)
            assert still or not torch.equal(layer.weight, before)
    if name == "cql":
        torch.testing.assert_close(reference.log_temperature, agent.log_temperature[0])
        torch.testing.assert_close(reference.actor.multiplier, agent.actor.multiplier[0, 0, 0])
        torch.testing.assert_close(reference.actor.offset, agent.actor.offset[0, 0, 0])


def test_the_buffer_keeps_rows_together():
    rows = torch.arange(50.0)
    buffer = plain.Buffer(rows[:, None].expand(-1, 3), rows[:, None])
    first, second = buffer.sample(20)
    assert first.shape == (20, 3) and torch.equal(first[:, :1], second)
    assert len(set(second.flatten().tolist())) > 5


def test_without_a_replacement_draws_are_random():
    reference: plain.Plain = plain.Plain("cpu")
    one: Tensor = reference.normal(4, 2)
    assert one.shape == (4, 2) and not torch.equal(one, reference.normal(4, 2))
    assert reference.uniform(100).amin() >= 0 and reference.uniform(100).amax() < 1
