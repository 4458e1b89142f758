"""The text and the picture behind ``saferl inspect``."""

import matplotlib.image
import numpy as np
import pytest

from saferl.data import Dataset, inspect
from saferl.errors import SaferlError

N = 200


def dataset(**changes):
    random = np.random.default_rng(0)
    actions = np.column_stack([np.linspace(-1, 1, N), np.where(np.arange(N) < 50, 1.0, 0.0)])
    values = dict(
        observations=random.normal(size=(N, 3)),
        actions=actions,
        rewards=np.repeat([1.0, 2.0, 3.0, 4.0], 50),
        terminals=np.arange(N) % 50 == 49,
        next_observations=None,
        costs=np.arange(N) % 5 == 0,
        id="test",
        env_id="Hopper-v4",
        reference_returns=(0, 100),
        reference_source="D4RL",
        action_low=-1,
        action_high=1,
    )
    return Dataset.from_arrays(**values | changes)


def line(text, start):
    return next(row for row in text.splitlines() if row.strip().startswith(start)).split()


def test_coverage_counts():
    cover = inspect.coverage(dataset())
    assert cover["action_min"] == [-1, 0] and cover["action_max"] == [1, 1]
    assert cover["action_at_high"] == [1 / N, 50 / N] and cover["action_at_low"] == [1 / N, 0]
    assert cover["at_bounds"] == 51 / N and cover["duplicates"] == 0
    np.testing.assert_allclose(cover["observation_max"], dataset().observations.max(0))
    labels = dict(action_low=None, action_high=None, n_actions=4)
    cover = inspect.coverage(dataset(actions=np.arange(N) % 3, **labels))
    assert cover["action_counts"] == [67, 67, 66, 0]
    # 20 rows, each ten times over: 180 repeat an earlier one.
    again = inspect.coverage(
        dataset(observations=np.arange(N) % 20, actions=np.zeros((N, 1)), rewards=np.ones(N))
    )
    assert again["duplicates"] == 180


def test_text_has_card_distributions_coverage_and_problems():
    text = inspect.describe(dataset())
    assert line(text, "dataset")[1] == "test" and line(text, "environment")[1] == "Hopper-v4"
    # Returns 50, 100, 150, 200: mean, std, min, quantiles, max.
    assert line(text, "return")[1:] == ["125", "55.9", "50", "57.5", "87.5", "125", "162.5",
                                        "192.5", "200"]  # fmt: skip
    assert line(text, "score")[1] == "125" and line(text, "cost")[1:4] == ["10", "0", "10"]
    assert "score 0 at return 0, 100 at 100 (D4RL)" in text
    assert "25.5 % of rows have an action at a bound" in text
    assert "problems      none found" in text and "next row" in text
    text = inspect.describe(dataset(costs=None, rewards=np.full(N, 1e6)))
    assert "no costs in this dataset" in text and "50,000,000" in text
    text = inspect.describe(dataset(costs=np.zeros(N)))
    assert "problems      1\n  - all costs are 0" in text
    wide = dataset(observations=np.random.default_rng(0).normal(size=(N, 40)))
    assert "state: 40 columns within [" in inspect.describe(wide)
    labels = dict(action_low=None, action_high=None, n_actions=4, env_id=None)
    text = inspect.describe(dataset(actions=np.arange(N) % 3, **labels))
    assert "discrete, 4 actions" in text and "1 of 4 actions never taken" in text
    assert line(text, "environment")[1:] == ["none", "set"]


@pytest.mark.parametrize("kind", ["continuous", "many", "discrete", "one episode without costs"])
def test_plot_writes_a_picture(tmp_path, kind):
    changes = {
        "continuous": {},
        "many": dict(actions=np.random.default_rng(0).uniform(-1, 1, (N, 9))),
        "discrete": dict(actions=np.arange(N) % 3, action_low=None, action_high=None),
        "one episode without costs": dict(
            costs=None, terminals=np.arange(N) == N - 1, reference_returns=None
        ),
    }[kind]
    path = inspect.plot(dataset(**changes), tmp_path / "deep" / "d.png")
    picture = matplotlib.image.imread(path)
    assert picture.shape[:2] == (840, 1200)
    for half in np.array_split(picture[..., :3], 2, axis=0):  # something is drawn in each quarter
        for quarter in np.array_split(half, 2, axis=1):
            assert (quarter < 0.9).any(-1).mean() > 0.005


def test_plot_refuses_an_unknown_type(tmp_path):
    with pytest.raises(SaferlError, match=r"unknown plot file type '\.pgn'.* png"):
        inspect.plot(dataset(), tmp_path / "d.pgn")


def test_bins_of_counts_are_whole_numbers():
    edges = inspect._bins(np.arange(0, 400, 2))
    assert (np.diff(edges) == np.diff(edges)[0]).all() and edges[0] == -0.5
    assert np.diff(edges)[0] == np.round(np.diff(edges)[0]) and edges[-1] > 398
    assert inspect._bins(np.array([0.5, 1.0])) == 5
