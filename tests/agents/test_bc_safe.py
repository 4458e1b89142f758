"""BC-Safe: which episodes are cloned by whom. The update is that of BC."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from saferl.agents.bc_safe import BCSafe
from saferl.data import Dataset
from saferl.errors import SaferlError
from saferl.replay import ReplayBuffer

from .plain import actions_of, bare, constant, make, trained


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


def test_a_member_among_others_draws_what_it_draws_alone():
    """To the bit, and with observations that are standardised too."""
    dataset, pairs = logged(), [(2.0, 1.0), (8.0, 1.0), (4.0, 0.5)]

    def batches(members, **settings):
        config = BCSafe.make_config({"normalize_observations": True} | settings)
        spec = dataset.spec(config)
        agent = BCSafe(spec, config, members)
        buffer = ReplayBuffer.from_dataset(dataset, spec, members)
        buffer.restrict(agent.rows(dataset))
        return [buffer.sample(32) for _ in range(3)]

    limits, fractions = zip(*pairs)
    together = batches((5, 6, 7), cost_limit=limits, best_fraction=fractions)
    for member, (limit, fraction) in enumerate(pairs):
        alone = batches((5 + member,), cost_limit=limit, best_fraction=fraction)
        for both, own in zip(together, alone):
            assert torch.equal(both.observations[member], own.observations[0])
            assert torch.equal(both.actions[member], own.actions[0])


def test_which_rows_are_drawn():
    """Those of the episodes that keep the member's limit; never those of the fragment."""
    dataset, limits = logged(), [2.0, 4.0, math.inf]
    agent = make(BCSafe, members=(5, 5, 5), cost_limit=limits)
    of_episode = np.repeat(dataset.episode_costs(), 10)
    for limit, rows in zip(limits, agent.rows(dataset), strict=True):
        assert rows.tolist() == np.flatnonzero(of_episode <= limit + 1e-5).tolist()
    one = make(BCSafe, members=(5, 6), cost_limit=2.0).rows(dataset)
    assert one[0] is one[1]  # and its memory is shared


def test_a_limit_is_kept_by_what_costs_as_much():
    """Ten steps of 0.1 in float32 cost a little more than 1, which is rounding."""
    dataset = logged(costs=(1.0,))
    assert dataset.episode_costs()[0] > 1.0
    assert len(make(BCSafe, members=(5,), cost_limit=1.0).rows(dataset)[0]) == 50


def test_each_member_clones_what_its_own_limit_lets_pass():
    """One run for three limits, each of which has an action of its own."""
    limits = (0.0, 2.0, 8.0)
    agent, _ = trained(BCSafe, logged(copies=30), 200, (5, 5, 5), lr=2e-3, cost_limit=limits)
    expected = [np.mean([c / 10 for c in (0, 2, 4, 8) if c <= limit]) for limit in limits]
    assert actions_of(agent.policy()).mean(1).tolist() == pytest.approx(expected, abs=0.06)


def test_each_member_clones_the_best_of_what_its_limit_lets_pass():
    """Returns are worth what they cost but for the first copy, which returns most at cost 0."""
    dataset = logged(copies=10)
    returns = np.repeat(dataset.episode_costs() + 20 * (np.arange(40) == 0), 10) / 10
    dataset = dataset.with_rewards(np.append(returns, [0.0] * 3))
    settings = {"cost_limit": [4.0, 4.0, 8.0], "best_fraction": [0.02, 0.5, 0.25]}
    lines = []
    agent = make(BCSafe, members=(5, 5, 5), **settings)
    agent.fit(dataset, lines.append)
    # 30 keep 4: the one that returns 20, or it and 14 more, of which 10 return 4; ties of 2 stay.
    assert lines == [
        "cost limit 4, best 2%: clones 1 episodes, 10 rows",
        "cost limit 4, best 50%: clones 21 episodes, 210 rows",
        "cost limit 8, best 25%: clones 11 episodes, 110 rows",
    ]
    agent, _ = trained(BCSafe, dataset, 200, (5, 5, 5), lr=2e-3, **settings)
    expected = [0.0, (10 * 0.4 + 10 * 0.2) / 21, 10 * 0.8 / 11]
    assert actions_of(agent.policy()).mean(1).tolist() == pytest.approx(expected, abs=0.08)


def test_a_constant_action_is_acted():
    agent, _ = trained(BCSafe, constant(0.8), 100, lr=1e-2)
    assert (actions_of(agent.policy()) - 0.8).abs().max() < 0.03


def test_what_passes_is_told():
    lines = []
    make(BCSafe, cost_limit=[2.0, 8.0]).fit(logged(), lines.append)
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


def fragment() -> Dataset:
    """Rows without the end of an episode."""
    arrays = logged()._arrays()
    arrays = {name: array[-3:] for name, array in arrays.items()}
    return Dataset(**arrays, card=logged().card)
