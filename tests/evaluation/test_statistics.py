import numpy as np
import pytest
from scipy import stats

from saferl.errors import SaferlError
from saferl.evaluation import bootstrap_interval, cvar, interquartile_mean, share_over


def test_interquartile_mean_weighs_the_outermost_values_in_part():
    assert interquartile_mean([7.0]) == 7
    assert interquartile_mean([1.0, 2.0]) == 1.5
    # n = 3: three quarters of a value are cut on each side: (0.25 · 0 + 1 + 0.25 · 8) / 1.5
    assert interquartile_mean([8.0, 0.0, 1.0]) == pytest.approx(3 / 1.5)
    # n = 5: weights 0, 0.75, 1, 0.75, 0
    assert interquartile_mean([0.0, 4.0, 5.0, 8.0, 99.0]) == pytest.approx((3 + 5 + 6) / 2.5)
    values = np.random.default_rng(0).normal(size=(3, 12))
    np.testing.assert_allclose(interquartile_mean(values), stats.trim_mean(values, 0.25, axis=1))


def test_cvar_is_the_mean_of_the_upper_tail():
    costs = np.arange(1.0, 21.0)
    assert cvar(costs) == pytest.approx(19.5)
    assert cvar(costs, 0.75) == pytest.approx(18)
    assert cvar(costs, 0) == pytest.approx(costs.mean())
    assert cvar([3.0, 9.0, 1.0]) == pytest.approx(9)  # less than one episode in the tail
    # Rockafellar and Uryasev: the smallest of c + E[max(X - c, 0)] / (1 - level) over c.
    costs = np.random.default_rng(1).exponential(size=37)
    smallest = min(c + np.maximum(costs - c, 0).mean() / 0.15 for c in costs)
    assert cvar(costs, 0.85) == pytest.approx(smallest)
    with pytest.raises(SaferlError, match="CVaR level"):
        cvar(costs, 1.0)


def test_a_cost_equal_to_the_limit_is_within_it():
    assert share_over(np.array([1.0, 2.0, 3.0, 4.0]), 2) == 0.5


@pytest.mark.parametrize("statistic", [None, interquartile_mean, cvar])
def test_intervals_move_and_stretch_with_the_values(statistic):
    options = {} if statistic is None else {"statistic": statistic}
    values = np.random.default_rng(0).exponential(size=(4, 9))
    low, high = bootstrap_interval(values, **options)
    estimate = values.mean() if statistic is None else statistic(values.ravel())
    assert low < estimate < high
    assert bootstrap_interval(values, **options) == (low, high)
    assert bootstrap_interval(values, seed=1, **options) != (low, high)
    moved = bootstrap_interval(10 + 3 * values, **options)
    np.testing.assert_allclose(moved, [10 + 3 * low, 10 + 3 * high])
    wider = bootstrap_interval(values, confidence=0.99, **options)
    assert wider[0] < low and high < wider[1]


def test_few_or_equal_values():
    assert np.isnan(bootstrap_interval([[3.0]])).all()
    assert bootstrap_interval([[3.0] * 4] * 2) == (3, 3)
    assert bootstrap_interval([1.0, 2.0, 4.0]) == bootstrap_interval([[1.0, 2.0, 4.0]])
    low, high = bootstrap_interval([[1.0], [2.0], [4.0]])  # one episode each: members only
    assert low < 7 / 3 < high
    with pytest.raises(SaferlError, match="finite"):
        bootstrap_interval([1.0, np.nan])


@pytest.mark.parametrize("values", [[[0.0], [2.0]], [[0.0, 2.0]]])
def test_two_values_are_widened_by_the_small_sample_factor(values):
    # Resampled means lie on 0, 1 and 2; their variance is half the unbiased one, with 1 degree of
    # freedom: both distances from the mean, 1, are multiplied by √2 · t / z.
    factor = np.sqrt(2) * stats.t.ppf(0.975, 1) / stats.norm.ppf(0.975)
    np.testing.assert_allclose(bootstrap_interval(values), [1 - factor, 1 + factor])


def test_many_resamples_in_chunks_agree_with_the_normal_interval():
    values = np.random.default_rng(0).normal(size=(40, 100))
    low, high = bootstrap_interval(values, resamples=1200)
    # With many values there is no correction to speak of: ±1.96 standard errors, where drawing
    # members and episodes counts the noise within members about twice.
    expected = 2 * 1.96 / np.sqrt(values.size)
    assert expected < high - low < 1.6 * expected


@pytest.mark.parametrize(
    "members, episodes, between",
    [(1, 10, 0.0), (3, 10, 0.0), (3, 10, 2.0), (5, 5, 0.5), (10, 5, 2.0)],
)
def test_95_percent_intervals_cover_about_95_percent(members, episodes, between):
    random = np.random.default_rng(7)
    n, covered, percentile = 300, 0, 0
    for _ in range(n):
        values = between * random.normal(size=(members, 1)) + random.normal(
            size=(members, episodes)
        )
        low, high = bootstrap_interval(values, resamples=300)
        covered += low <= 0 <= high
        if members == 3 and between:
            means = values[random.integers(3, size=(300, 3))].mean((1, 2))
            low, high = np.quantile(means, [0.025, 0.975])
            percentile += low <= 0 <= high
    assert 0.90 <= covered / n <= 1.0
    if percentile:  # what the correction is for
        assert percentile / n < 0.85
