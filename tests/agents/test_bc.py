"""Behaviour cloning: updates against plain references, and the filter of %BC."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from saferl.data import Dataset
from saferl.errors import SaferlError
from saferl.registry import agent_class

from .plain import MEMBERS, Net, adam, descend, make, make_batch, member_of


@pytest.mark.parametrize("member", range(len(MEMBERS)))
def test_update_is_the_reference(float64, member):
    agent = make("bc", lr=1e-2)
    net = Net(agent.actor.mlp, member)
    optimizer = adam(net, lr=1e-2)
    for step in range(3):
        batch = make_batch(agent, step)
        metrics = agent.update(batch)
        own = member_of(batch, member)
        loss = F.mse_loss(net(own.observations).tanh(), own.actions)
        descend(optimizer, loss)
        torch.testing.assert_close(metrics["actor_loss"][member], loss.detach())
    net.assert_is(agent.actor.mlp, member)


@pytest.mark.parametrize("member", range(len(MEMBERS)))
def test_discrete_update_is_the_reference(float64, member):
    agent = make("discrete_bc", lr=1e-2)
    net = Net(agent.actor.mlp, member)
    optimizer = adam(net, lr=1e-2)
    for step in range(3):
        batch = make_batch(agent, step)
        metrics = agent.update(batch)
        own = member_of(batch, member)
        logits = net(own.observations)
        loss = F.cross_entropy(logits, own.actions)
        agreement = (logits.argmax(-1) == own.actions).double().mean()
        descend(optimizer, loss)
        torch.testing.assert_close(metrics["actor_loss"][member], loss.detach())
        assert metrics["agreement"][member] == pytest.approx(float(agreement))
    net.assert_is(agent.actor.mlp, member)


def episodes(returns: list[float], length: int = 3, discrete: bool = False) -> Dataset:
    """One episode per return, whose observations are its number; the last row has no end."""
    n = len(returns) * length
    number = np.repeat(np.arange(len(returns), dtype=np.float32), length)
    ends = np.arange(n) % length == length - 1
    rows = np.append(number, 99.0)[:, None].astype(np.float32)
    return Dataset.from_arrays(
        rows,
        np.zeros(n + 1, np.int64) if discrete else np.zeros((n + 1, 1), np.float32),
        np.append(np.repeat(returns, length) / length, 1e6).astype(np.float32),
        np.append(ends, False),
        np.zeros(n + 1, bool),
        rows,
        **({"n_actions": 2} if discrete else {"action_low": (-1.0,), "action_high": (1.0,)}),
        id="episodes",
    )


@pytest.mark.parametrize("name", ["bc", "discrete_bc"])
def test_best_fraction_keeps_the_episodes_of_highest_return(name):
    cls = agent_class(name)
    dataset = episodes([1, 9, 3, 7, 5, 2, 8, 4, 6, 0], discrete=cls.discrete)

    def kept(fraction: float) -> set[float]:
        subset = cls.prepare(dataset, cls.make_config({"best_fraction": fraction}))
        return set(subset.observations[:, 0].tolist())

    assert kept(0.3) == {1, 3, 6}  # returns 9, 7 and 8; the fragment's huge reward does not count
    assert kept(0.01) == {1}
    assert kept(1.0) == {*range(10), 99}


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.5])
def test_best_fraction_outside_its_range_is_an_error(fraction):
    cls = agent_class("bc")
    with pytest.raises(SaferlError, match=r"best_fraction = .* is not in \(0, 1\]"):
        cls.prepare(episodes([1, 2]), cls.make_config({"best_fraction": fraction}))
