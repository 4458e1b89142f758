"""BC-Safe: which episodes are cloned by whom, and the update against a plain reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from saferl.agents.bc_safe import BCSafe
from saferl.data import Dataset
from saferl.errors import SaferlError

from .limited import actions_of, bare, constant, costly, make, trained
from .reference import MEMBERS, Net, adam, descend, float64, member_of

__all__ = ["float64"]


def logged(costs=(0.0, 2.0, 4.0, 8.0), length: int = 10, copies: int = 5) -> Dataset:
    """Episodes that spend one of ``costs`` evenly, by an action that grows with it; a fragment."""
    each = np.repeat(np.tile(costs, copies), length)
    n = len(each)
    s = np.random.default_rng(0).normal(size=(n + 3, 1))
    return Dataset.from_arrays(
        s,
        np.append(each / 10, [0.9] * 3)[:, None],
        np.zeros(n + 3),
        np.zeros(n + 3),
        np.append(np.arange(n) % length == length - 1, [False] * 3),
        s,
        costs=np.append(each / length, [0.0] * 3),
        action_low=(-1.0,),
        action_high=(1.0,),
        horizon=length,
        id="logged",
    )


@pytest.mark.parametrize("member", range(len(MEMBERS)))
def test_update_is_the_reference(float64, member):
    limits = (0.7, 1.5)
    agent = make(BCSafe, lr=1e-2, cost_limit=limits)
    net = Net(agent.actor.mlp, member)
    optimizer = adam(net, lr=1e-2)
    shares = []
    for step in range(4):
        batch = costly(agent, step)
        if step == 2:  # nothing passes
            batch = batch._replace(costs=batch.costs + 9)
        metrics = agent.update(batch)
        own = member_of(batch, member)
        rows = [i for i in range(len(own.costs)) if own.costs[i] <= limits[member]]
        error = (net(own.observations).tanh() - own.actions) ** 2
        loss = error[rows].mean() if rows else 0 * error.sum()
        descend(optimizer, loss)
        torch.testing.assert_close(metrics["actor_loss"][member], loss.detach())
        shares.append(len(rows) / len(own.costs))
        assert metrics["kept_share"][member].item() == pytest.approx(shares[-1])
        net.assert_is(agent.actor.mlp, member)
    assert shares[2] == 0 and 0 < max(shares) and any(0 < share < 1 for share in shares)


def test_rows_carry_the_cost_of_their_episode_and_fragments_are_left_out():
    rows = BCSafe.prepare(logged(), BCSafe.make_config({"cost_limit": [2.0, 4.0]}))
    assert len(rows.episodes) == 15 and rows.fragment is None and len(rows) == 150  # none of 8
    for start, stop in rows.episodes:
        assert rows.costs[start:stop] == pytest.approx(10 * rows.actions[start, 0])


def test_a_limit_is_kept_by_what_costs_as_much():
    """Ten steps of 0.1 in float32 cost a little more than 1, which is rounding."""
    dataset = logged(costs=(1.0,))
    assert dataset.episode_costs()[0] > 1.0
    _, metrics = trained(BCSafe, dataset, 5, cost_limit=1.0)
    assert metrics["kept_share"].tolist() == [1.0]


def test_each_member_clones_what_its_own_limit_lets_pass():
    """One run for three limits, each of which has an action of its own."""
    limits = (0.0, 2.0, 8.0)
    agent, metrics = trained(BCSafe, logged(copies=30), 200, (5, 5, 5), lr=2e-3, cost_limit=limits)
    expected = [np.mean([c / 10 for c in (0, 2, 4, 8) if c <= limit]) for limit in limits]
    assert actions_of(agent.policy()).mean(1).tolist() == pytest.approx(expected, abs=0.06)
    assert metrics["kept_share"].tolist() == pytest.approx([0.25, 0.5, 1.0], abs=0.06)


def test_each_member_clones_the_best_of_what_its_limit_lets_pass():
    """Returns are worth what they cost but for the first copy, which returns most at cost 0."""
    dataset = logged(copies=10)
    returns = np.repeat(dataset.episode_costs() + 20 * (np.arange(40) == 0), 10) / 10
    dataset = dataset.with_rewards(np.append(returns, [0.0] * 3))
    settings = {"cost_limit": [4.0, 4.0, 8.0], "best_fraction": [0.02, 0.5, 0.25]}
    rows = BCSafe.prepare(dataset, BCSafe.make_config(settings))
    for start, stop in rows.episodes:
        assert rows.rewards[start:stop] == pytest.approx(dataset.rewards[start:stop].sum())
    lines = []
    agent = make(BCSafe, members=(5, 5, 5), **settings)
    agent.fit(rows, lines.append)
    # 30 keep 4: the one that returns 20, or it and 14 more, of which 10 return 4; ties of 2 stay.
    assert agent.least_return.tolist() == pytest.approx([20.0, 2.0, 8.0])
    assert lines == [
        "cost limit 4, best 2%: clones 1 episodes, 10 rows",
        "cost limit 4, best 50%: clones 21 episodes, 210 rows",
        "cost limit 8, best 25%: clones 11 episodes, 110 rows",
    ]
    agent, metrics = trained(BCSafe, dataset, 200, (5, 5, 5), lr=2e-3, **settings)
    expected = [0.0, (10 * 0.4 + 10 * 0.2) / 21, 10 * 0.8 / 11]
    assert actions_of(agent.policy()).mean(1).tolist() == pytest.approx(expected, abs=0.08)
    assert metrics["kept_share"].tolist() == pytest.approx([0.025, 21 / 40, 11 / 40], abs=0.08)
    # Members that differ by their seed alone have a buffer of what they clone, and no more.
    settings = {"cost_limit": [4.0, 4.0], "best_fraction": 0.5}
    rows = BCSafe.prepare(dataset, BCSafe.make_config(settings))
    agent, metrics = trained(BCSafe, dataset, 200, (5, 5), lr=2e-3, **settings)
    assert agent.least_return.tolist() == [2.0, 2.0]  # members that are merged take it along
    assert len(rows.episodes) == 21 and metrics["kept_share"].tolist() == [1.0, 1.0]
    assert actions_of(agent.policy()).mean(1).tolist() == pytest.approx([expected[1]] * 2, abs=0.08)
    assert make(BCSafe).least_return.tolist() == [torch.finfo().min] * 2


def test_a_constant_action_is_acted():
    agent, _ = trained(BCSafe, constant(0.8), 100, lr=1e-2)
    assert (actions_of(agent.policy()) - 0.8).abs().max() < 0.03


def test_what_passes_is_told():
    config = BCSafe.make_config({"cost_limit": [2.0, 8.0]})
    rows, lines = BCSafe.prepare(logged(), config), []
    make(BCSafe, cost_limit=[2.0, 8.0]).fit(rows, lines.append)
    assert lines == [
        "cost limit 2: clones 10 episodes, 100 rows",
        "cost limit 8: clones 20 episodes, 200 rows",
    ]


def test_bad_input():
    def prepare(dataset, **settings):
        return BCSafe.prepare(dataset, BCSafe.make_config(settings))

    message = "no episode of logged costs 1.5 or less: the lowest cost of one is 2, so pass"
    with pytest.raises(SaferlError, match=message):
        prepare(logged(costs=(2.0, 8.0)), cost_limit=[1.5, 40.0])
    with pytest.raises(SaferlError, match=r"logged has no costs: .*with_costs"):
        prepare(bare(logged()))
    with pytest.raises(SaferlError, match="logged has no complete episode"):
        prepare(fragment())
    for bad in (-1.0, math.nan, [5.0, -1.0]):
        with pytest.raises(SaferlError, match="a cost limit is a number of 0 or more per episode"):
            prepare(logged(), cost_limit=bad)
    with pytest.raises(SaferlError, match="best_fraction = 1.5 is not in"):
        prepare(logged(), cost_limit=8.0, best_fraction=1.5)
    agent = make(BCSafe)
    with pytest.raises(SaferlError, match="the batch has no costs"):
        agent.update(costly(agent)._replace(costs=None))


def fragment() -> Dataset:
    """Rows without the end of an episode."""
    arrays = logged()._arrays()
    arrays = {name: array[-3:] for name, array in arrays.items()}
    return Dataset(**arrays, card=logged().card)
