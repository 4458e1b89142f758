"""Statistics of a few members and episodes: interquartile mean, CVaR, bootstrap intervals.

Everything works on float arrays ``[members, episodes]`` (or ``[episodes]`` for one member) and is
vectorised over leading axes, so that the bootstrap calls each statistic once for all resamples.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from saferl.errors import SaferlError

CONFIDENCE = 0.95
RESAMPLES = 2000
CVAR_LEVEL = 0.9
FEWEST_EPISODES = 5
"""With fewer episodes in all, a verdict is always "cannot tell"."""


def mean(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis."""
    return np.asarray(values, np.float64).mean(-1)


def interquartile_mean(values: np.ndarray) -> np.ndarray:
    """Mean of the middle half of the values over the last axis.

    A quarter of the *weight* is cut on each side: with n values, sorted value i (from 0) weighs as
    much of [i, i + 1] as lies in [n/4, 3n/4]. So the outermost values kept may count in part, 1 or
    2 values give their mean, and n = 4k equals ``scipy.stats.trim_mean(values, 0.25)``, which for
    other n rounds the number cut down to a whole one. Used for returns as recommended by Agarwal et
    al., 2021 (arXiv:2108.13264).
    """
    values = np.sort(np.asarray(values, np.float64), axis=-1)
    n = values.shape[-1]
    return values @ _overlap(n, n / 4, 3 * n / 4) / (n / 2)


def cvar(costs: np.ndarray, level: float = 0.9) -> np.ndarray:
    """Conditional value at risk: the mean of the worst (1 - level) share of the costs.

    Upper tail over the last axis, so 0.9 gives the mean of the costliest tenth of the episodes;
    where that is no whole number of episodes the last one counts in part (Rockafellar and Uryasev,
    2002), and where it is less than one episode the value is the largest cost. ``level=0`` is the
    mean.
    """
    if not 0 <= level < 1:
        raise SaferlError(f"the CVaR level must lie in [0, 1), got {level}")
    costs = np.sort(np.asarray(costs, np.float64), axis=-1)
    n = costs.shape[-1]
    tail = n * (1 - level)
    return costs @ _overlap(n, n - tail, n) / tail


def _overlap(n: int, low: float, high: float) -> np.ndarray:
    """Length of each [i, i + 1], i < n, inside [low, high]."""
    i = np.arange(n)
    return np.clip(np.minimum(i + 1, high) - np.maximum(i, low), 0, None)


def share_over(costs: np.ndarray, limit: float) -> np.ndarray:
    """Share of episodes, in [0, 1], whose cost exceeds the limit (equal to it is within)."""
    return (np.asarray(costs) > limit).mean(-1)


def bootstrap_interval(
    values: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray] = mean,
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """Confidence interval of a statistic of all values, over members and episodes.

    ``values``: ``[members, episodes]``, or ``[episodes]`` of one member. Each of the resamples
    draws members with replacement, then for each drawn member its episodes with replacement, and
    computes ``statistic`` of all of them (called with ``[resamples, members * episodes]``).

    The plain percentile interval of such resamples is too narrow for a handful of members: with 3
    members that differ much, a nominal 95 % covers 75 %. Its distances from the estimate are
    therefore widened by (a) the ratio of the unbiased to the resampled variance, (members - 1) /
    members and (episodes - 1) / episodes being missing from the latter, and (b) the ratio of
    Student's to the normal quantile at Satterthwaite's degrees of freedom, both from the variance
    of the mean within and between members. In simulation (1 to 10 members, 5 to 20 episodes,
    normal and exponential noise) a nominal 95 % then covers 88 to 99 %; the low end is one member
    with few, skewed episodes.

    Episodes of different members are drawn independently although they share initial states: where
    the start decides the outcome more than the policy does, the interval is somewhat narrow.

    With one member only its episodes are resampled: the interval then speaks of *this* policy, not
    of what another seed would have given. A single value gives ``(nan, nan)``; values that are all
    equal give an interval without width, which cannot know of events that never occurred.
    """
    from scipy.special import ndtri, stdtrit

    values = np.atleast_2d(np.asarray(values, np.float64))
    if values.ndim != 2 or not np.isfinite(values).all():
        raise SaferlError("bootstrap_interval needs finite values [members, episodes]")
    members, episodes = values.shape
    if values.size < 2:
        return float("nan"), float("nan")
    estimate = float(statistic(values.reshape(-1)))
    between = values.mean(1).var(ddof=1) / members if members > 1 else 0.0
    within = values.var(1, ddof=1).mean() / values.size if episodes > 1 else 0.0
    if between + within == 0:
        return estimate, estimate

    random = np.random.default_rng(seed)
    draws = []
    for start in range(0, resamples, chunk := max(1, 2_000_000 // values.size)):
        n = min(chunk, resamples - start)
        member = random.integers(members, size=(n, members, 1))
        episode = random.integers(episodes, size=(n, members, episodes))
        draws.append(statistic(values[member, episode].reshape(n, -1)))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(draws), [tail, 1 - tail])

    resampled = between * (members - 1) / members + within * (episodes - 1) / episodes
    freedom = (between + within) ** 2 / (
        between**2 / max(members - 1, 1) + within**2 / max(members * (episodes - 1), 1)
    )
    factor = np.sqrt((between + within) / resampled) * stdtrit(freedom, 1 - tail) / ndtri(1 - tail)
    # The estimate may lie outside the percentiles of a skewed statistic: never shrink the interval.
    low = min(low, estimate - factor * (estimate - low))
    high = max(high, estimate + factor * (high - estimate))
    return float(low), float(high)
