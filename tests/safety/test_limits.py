"""Limits in user units, their conversion, and what is said of limits that cannot be meant."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from saferl.data import Dataset
from saferl.errors import SaferlError
from saferl.safety import CostLimit, check_limit, convert, limit_warnings


@pytest.mark.parametrize(
    ("limit", "horizon", "discounted"),
    [(10, 300, 3.17), (20, 1000, 2.00), (80, 1000, 8.00)],  # OSRL's thresholds at 0.99
)
def test_known_budgets(limit, horizon, discounted):
    budget = convert(limit, "discounted", horizon=horizon, discount=0.99)
    assert budget == pytest.approx(discounted, abs=0.005)


@pytest.mark.parametrize("discount", [0.0, 0.5, 0.99, 1 - 1e-9, 1.0])
@pytest.mark.parametrize("horizon", [1, 7, 1000])
def test_a_cost_spent_evenly(horizon, discount):
    """The budget is the discounted sum of L / T in each of T steps, added up."""
    each = 20 / horizon
    total = sum(each * discount**t for t in range(horizon))
    budget = convert(20.0, "discounted", horizon=horizon, discount=discount)
    assert budget == pytest.approx(total, rel=1e-6)
    assert convert(20.0, "step", horizon=horizon, discount=discount) == pytest.approx(each)
    if discount < 1:
        occupancy = convert(20.0, "occupancy", horizon=horizon, discount=discount)
        assert occupancy == pytest.approx((1 - discount) * total, rel=1e-6)


def test_a_discount_of_one_gives_the_limit_itself():
    assert convert(25.0, "discounted", horizon=500) == 25.0
    assert convert(25.0, "episode", horizon=500, discount=0.9) == 25.0


@pytest.mark.parametrize("unit", ["episode", "discounted", "step", "occupancy"])
@pytest.mark.parametrize("to", ["episode", "discounted", "step", "occupancy"])
def test_there_and_back(unit, to):
    there = convert(3.0, to, horizon=50, discount=0.95, unit=unit)
    assert convert(there, unit, horizon=50, discount=0.95, unit=to) == pytest.approx(3.0)
    assert (unit == to) == (there == 3.0)


def test_members_have_limits_and_discounts_of_their_own():
    limits, discounts = torch.tensor([5.0, 10.0, 20.0, math.inf]), torch.tensor([0, 0.9, 1, 0.99])
    for to in ("discounted", "step"):
        got = convert(limits, to, horizon=100, discount=discounts)
        assert got.dtype == torch.float32
        for m in range(4):
            one = convert(limits[m].item(), to, horizon=100, discount=discounts[m].item())
            assert got[m].item() == pytest.approx(one, rel=1e-5)
    torch.testing.assert_close(convert(limits, "step", horizon=100), limits / 100)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"to": "discountd"}, "unknown unit 'discountd': did you mean 'discounted'"),
        ({"to": "step", "horizon": 0}, "needs the number of steps of an episode.*horizon=1000"),
        ({"to": "discounted", "discount": 1.1}, "a discount lies between 0 and 1, got 1.1"),
        ({"to": "discounted", "discount": torch.tensor([0.9, -1])}, "a discount lies between"),
        ({"to": "occupancy", "discount": 1.0}, "needs a discount below 1"),
    ],
)
def test_bad_conversions(arguments, line):
    with pytest.raises(SaferlError, match=line):
        convert(1.0, **{"horizon": 10} | arguments)


@pytest.mark.parametrize("bad", [-1, math.nan, math.inf, "many", None])
def test_bad_limits(bad):
    with pytest.raises(SaferlError, match="^a cost limit is a number of 0 or more per episode, "):
        check_limit(bad)
    with pytest.raises(SaferlError, match="a cost limit is"):
        CostLimit(bad, 100)


def test_infinity_is_a_limit_only_where_it_is_meant():
    assert check_limit(math.inf, infinite=True) == math.inf
    assert check_limit("7.5") == 7.5
    with pytest.raises(SaferlError, match=r"or inf for no limit\), got -0.5"):
        check_limit(-0.5, infinite=True)


def test_a_limit_says_what_losses_see():
    limit = CostLimit(20, 1000)
    assert limit.to("step") == 0.02
    assert limit.to("discounted", 0.99) == pytest.approx(2, abs=1e-3)
    assert limit.describe(0.99) == (
        "20 per episode of 1000 steps = 0.02 per step = 2 discounted with 0.99"
    )
    with pytest.raises(SaferlError, match="steps of an episode"):
        CostLimit(20, 0)


def logged(costs: list[list[float]], horizon: int | None = None) -> Dataset:
    """Episodes with these costs per step."""
    ends = np.concatenate([np.arange(len(episode)) == len(episode) - 1 for episode in costs])
    n = len(ends)
    return Dataset.from_arrays(
        np.zeros((n, 1)), np.zeros((n, 1)), np.zeros(n), np.zeros(n), ends, np.zeros((n, 1)),
        costs=np.concatenate(costs), action_low=(-1.0,), action_high=(1.0,), horizon=horizon,
        id="logged",
    )  # fmt: skip


def test_limits_that_cannot_be_meant():
    dataset = logged([[1, 0, 2, 0], [2, 2, 0, 0], [1, 0, 0, 0]])  # 3, 4 and 1; at most 4 x 2
    (line,) = limit_warnings(dataset, [8])
    assert line == (
        "the cost limit 8 can never bind: 4 steps of at most 2 cost at most 8; is it in the unit "
        "of an episode?"
    )
    (line,) = limit_warnings(dataset, [7.9])
    assert "7.9 binds on no logged episode: the largest cost of one is 4" in line
    (line,) = limit_warnings(dataset, [0.5])
    assert "no logged episode meets the cost limit 0.5: the lowest cost of one is 1" in line
    assert limit_warnings(dataset, [1, 2, 3.9, math.inf]) == []
    assert len(limit_warnings(dataset, [0.5, 2, 8, 8])) == 2


def test_the_horizon_of_the_card_counts():
    """A fall ends an episode early, but another may last."""
    dataset = logged([[1, 0], [1, 1]], horizon=100)
    assert limit_warnings(dataset, [99.0])[0].startswith("the cost limit 99 binds on no logged")
    assert "100 steps of at most 1" in limit_warnings(dataset, [100.0])[0]


def test_warnings_need_costs(point):
    bare = Dataset.from_arrays(
        point.observations, point.actions, point.rewards, point.terminals, point.timeouts,
        point.next_observations, action_low=(-2.0,), action_high=(2.0,), id="bare",
    )  # fmt: skip
    with pytest.raises(SaferlError, match=r"bare has no costs: .*with_costs"):
        limit_warnings(bare, [5])
    assert limit_warnings(bare, [math.inf]) == []
    with pytest.raises(SaferlError, match="a cost limit is a number"):
        limit_warnings(point, [-5])
