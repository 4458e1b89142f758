"""Discrete CQL against a plain reference in both forms, and what each coefficient reaches."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from .reference import (
    MEMBERS,
    Net,
    adam,
    affected,
    descend,
    float64,
    make,
    make_batch,
    member_of,
    moved,
    nets,
)

__all__ = ["float64"]

ACTIONS = 4


def huber(u: float, kappa: float) -> float:
    return 0.5 * u**2 if abs(u) <= kappa else kappa * (abs(u) - 0.5 * kappa)


def bellman(taken, target, quantiles: int, kappa: float):
    """One row's loss, with loops over quantiles; predictions and targets ``[K]``."""
    if not quantiles:
        return huber(target[0] - taken[0], kappa)
    total = 0.0
    for i in range(quantiles):
        for j in range(quantiles):
            u = target[j] - taken[i]
            side = abs((i + 0.5) / quantiles - (1.0 if u < 0 else 0.0))
            total = total + side * huber(u, kappa) / kappa / quantiles
    return total


@pytest.mark.parametrize("member", range(len(MEMBERS)))
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"weight": 4.0, "huber": 0.2},
        {"double": False},
        {"tau": 0.0, "target_interval": 2},
        {"critics": 2},
        {"quantiles": 3},
        {"quantiles": 3, "huber": 0.3, "double": False, "critics": 2},
    ],
    ids=str,
)
def test_updates_are_the_reference(float64, settings, member):
    agent = make("discrete_cql", lr=1e-2, **{"tau": 0.1} | settings)
    c, count = agent.config, max(1, settings.get("quantiles", 0))
    critics = nets(agent.actor, member)
    targets = [critic.copy() for critic in critics]
    optimizer = adam(*critics, lr=1e-2)

    def values(net: Net, s) -> torch.Tensor:
        return net(s).view(-1, ACTIONS, count)

    for step in range(1, 5):
        batch = make_batch(agent, step)
        metrics = agent.update(batch)
        s, a, r, _, s2, terminal, _ = member_of(batch, member)
        chooser = critics if c.double else targets
        best = sum(values(net, s2).mean(-1) for net in chooser).argmax(-1)
        loss, gaps = 0.0, []
        for net, target_net in zip(critics, targets):
            predicted, ahead = values(net, s), values(target_net, s2)
            for row in range(len(r)):
                y = (r[row] + 0.99 * (1 - terminal[row]) * ahead[row, best[row]]).detach()
                taken = predicted[row, a[row]]
                loss = loss + bellman(taken, y, c.quantiles, c.huber) / len(r)
            # Checklist 6: the gap is a cross entropy, so it is never negative.
            gaps.append(F.cross_entropy(predicted.mean(-1), a))
        assert min(gaps) >= 0
        torch.testing.assert_close(metrics["critic_loss"][member], loss.detach())
        torch.testing.assert_close(metrics["gap"][member], (sum(gaps) / len(gaps)).detach())
        descend(optimizer, loss + c.weight * sum(gaps))
        for net, target_net in zip(critics, targets):
            if c.tau:
                target_net.follow(net, c.tau)
            elif step % c.target_interval == 0:
                target_net.follow(net, 1.0)
        for e in range(len(critics)):
            critics[e].assert_is(agent.actor.mlp, member, e)
            targets[e].assert_is(agent.critic_target.mlp, member, e)


def test_copied_targets_move_at_the_interval_alone():
    agent = make("discrete_cql", tau=0.0, target_interval=3)
    batch = make_batch(agent)
    for step in range(1, 7):
        assert moved(agent, batch) == {"actor"} | ({"critic_target"} if step % 3 == 0 else set())


@pytest.mark.parametrize("quantiles", [0, 3])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"weight": 0.0}, {"weight": 1.0}),
        ({"discount": 0.9}, {"discount": 0.99}),
        ({"huber": 1.0}, {"huber": 0.1}),
    ],
)
def test_coefficients_reach(before, after, quantiles):
    assert affected("discrete_cql", before, after, quantiles=quantiles) == {"actor"}
