"""`Dataset`: what from_arrays accepts, refuses and derives."""

import dataclasses
import json
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from saferl.data import Card, Dataset, load_dataset, save_dataset
from saferl.data.validate import timeouts_from_horizon
from saferl.errors import SaferlError

N = 60
RANDOM = np.random.default_rng(0)


def arrays(**changes):
    """Six episodes of ten steps; the second and fifth end in a terminal, the rest in a timeout."""
    random = np.random.default_rng(1)
    states = random.normal(size=(N + 1, 3)).astype(np.float32)
    values = dict(
        observations=states[:-1],
        next_observations=states[1:],
        actions=random.uniform(-1, 1, (N, 2)).astype(np.float32),
        rewards=random.normal(size=N).astype(np.float32),
        terminals=np.isin(np.arange(N), [19, 49]),
        timeouts=np.isin(np.arange(N), [9, 29, 39, 59]),
        action_low=-1,
        action_high=1,
    )
    return values | changes


def refused(match, **changes):
    with pytest.raises(SaferlError, match=match) as caught:
        Dataset.from_arrays(**arrays(**changes))
    assert "\n" not in str(caught.value)


def test_types_shapes_and_sizes():
    d = Dataset.from_arrays(**arrays(rewards=np.ones((N, 1)), costs=[0, 1] * 30))
    assert d.observations.dtype == d.actions.dtype == d.rewards.dtype == d.costs.dtype == np.float32
    assert d.terminals.dtype == d.timeouts.dtype == bool
    assert (len(d), d.observation_dim, d.action_dim, d.discrete) == (N, 3, 2, False)
    assert d.rewards.shape == d.costs.shape == (N,)
    assert d.nbytes == N * (3 + 3 + 2 + 1 + 1) * 4 + 2 * N
    assert d.card.action_low == (-1.0, -1.0) and d.card.action_high == (1.0, 1.0)
    assert d.problems == ()
    pixels = np.zeros((N, 4, 4, 3), np.uint8)
    d = Dataset.from_arrays(**arrays(observations=pixels, next_observations=pixels))
    assert d.observations.dtype == d.next_observations.dtype == np.uint8
    assert d.observations.shape == (N, 4, 4, 3) and d.observation_dim == 48
    flat = np.arange(N, dtype=float)
    d = Dataset.from_arrays(**arrays(observations=flat, next_observations=flat + 1))
    assert d.observations.shape == (N, 1)


def test_immutable_and_without_needless_copies():
    values = arrays()
    d = Dataset.from_arrays(**values)
    assert np.shares_memory(d.observations, values["observations"])
    assert values["observations"].flags.writeable  # the caller's own array stays as it was
    with pytest.raises(ValueError, match="read-only"):
        d.observations[0] = 0
    assert d.costs is None


def test_episodes_sums_and_summary():
    values = arrays(costs=np.ones(N))
    d = Dataset.from_arrays(**values, reference_returns=(0, 10))
    assert d.episodes.tolist() == [[i, i + 10] for i in range(0, N, 10)]
    expected = values["rewards"].reshape(6, 10).sum(1, dtype=float)
    np.testing.assert_allclose(d.episode_returns(), expected, rtol=1e-6)
    assert d.episode_costs().tolist() == [10.0] * 6 and d.episode_lengths().tolist() == [10] * 6
    assert d.episode_ids().tolist() == [row // 10 for row in range(len(d))]
    summary = d.summary()
    assert all(isinstance(v, (int, float)) for v in summary.values())
    assert (summary["episodes"], summary["terminals"], summary["timeouts"]) == (6, 2, 4)
    np.testing.assert_allclose(summary["return_q50"], np.median(expected))
    np.testing.assert_allclose(summary["score_mean"], 10 * expected.mean())
    assert summary["cost_max"] == 10 and json.dumps(summary)
    assert "cost_mean" not in Dataset.from_arrays(**arrays()).summary()
    assert d.normalised_score(5.0) == 50.0
    assert Dataset.from_arrays(**arrays()).normalised_score(5.0) is None


def test_trailing_fragment_is_kept_for_training_and_out_of_statistics():
    timeouts = arrays()["timeouts"].copy()
    timeouts[59] = False
    d = Dataset.from_arrays(**arrays(timeouts=timeouts))
    assert len(d) == N and len(d.episodes) == 5 and d.fragment == (50, 60)
    assert len(d.episode_returns()) == 5
    assert any("last 10 rows" in p for p in d.problems)
    assert Dataset.from_arrays(**arrays()).fragment is None


def test_next_rows_as_in_d4rls_qlearning_dataset():
    values = arrays(next_observations=None)
    values["timeouts"] = values["timeouts"] & (np.arange(N) != 59)  # the last row has no end
    kept, following = [], []
    for i in range(N - 1):  # qlearning_dataset: skip rows that time out, never use the last row
        if not values["timeouts"][i]:
            kept.append(i)
            following.append(values["observations"][i if values["terminals"][i] else i + 1])
    d = Dataset.from_arrays(**values)
    for name in ("observations", "actions", "rewards", "terminals"):
        np.testing.assert_array_equal(getattr(d, name), values[name][kept])
    np.testing.assert_array_equal(d.next_observations, np.array(following))
    # The row before a dropped timeout ends the episode instead; rows before terminals do not.
    assert np.array(kept)[d.timeouts].tolist() == [8, 28, 38]
    assert "4 of 60 rows" in d.card.notes[0]
    assert d.fragment is not None  # the last row went, but its episode did not end


def test_a_last_terminal_row_is_kept_and_a_timeout_of_one_step_vanishes():
    terminals = np.array([0, 1, 0, 1])
    timeouts = np.array([0, 0, 1, 0])  # row 2 is an episode of one step without a successor
    d = Dataset.from_arrays(np.arange(4.0), np.zeros((4, 1)), np.ones(4), terminals, timeouts)
    assert d.observations.ravel().tolist() == [0, 1, 3]
    assert d.terminals.tolist() == [False, True, True] and not d.timeouts.any()


def test_horizon_stands_in_for_absent_timeouts():
    terminals = np.zeros(25, bool)
    terminals[[7, 9]] = True
    expected, step = [], 0
    for t in terminals:  # step by step
        step += 1
        expected.append(step == 5 and not t)
        step = 0 if t or step == 5 else step
    assert timeouts_from_horizon(terminals, 5).tolist() == expected
    d = Dataset.from_arrays(**arrays(timeouts=None, horizon=10))
    assert np.flatnonzero(d.timeouts).tolist() == [9, 29, 39, 59]
    d = Dataset.from_arrays(**arrays(timeouts=None))
    assert not d.timeouts.any() and len(d.episodes) == 2


def test_discrete_actions():
    labels = np.arange(N) % 3
    for actions in (labels, labels[:, None], labels.astype(np.uint8)):
        d = Dataset.from_arrays(**arrays(actions=actions, action_low=None, action_high=None))
        assert d.discrete and d.actions.shape == (N,) and d.actions.dtype == np.int64
        assert d.action_dim == d.card.n_actions == 3 and d.card.action_low is None
    free = dict(action_low=None, action_high=None)
    d = Dataset.from_arrays(**arrays(actions=labels.astype(float), n_actions=5, **free))
    assert d.discrete and d.action_dim == 5
    refused("whole numbers 0 … 1", actions=labels, n_actions=2, **free)
    refused(r"actions\[0\] is -1", actions=labels - 1, **free)
    refused("cast them to float", actions=np.zeros((N, 2), int), **free)
    refused("cast the actions to float", actions=labels)


def test_action_bounds():
    d = Dataset.from_arrays(**arrays(action_low=None, action_high=None))
    np.testing.assert_array_equal(d.card.action_low, d.actions.min(0))
    assert any("action bounds are" in note for note in d.card.notes)
    still = arrays(actions=np.full((N, 2), 3.0), action_low=None, action_high=None)
    assert Dataset.from_arrays(**still).card.action_high == (4.0, 4.0)  # never an empty interval
    wide = arrays()["actions"].copy()
    wide[33, 1] = 1.5
    refused(r"actions\[33, 1\] is 1.5, outside \[-1, 1\] \(1 of 60 rows\)", actions=wide)
    d = Dataset.from_arrays(**arrays(actions=wide, clip_actions=True))
    assert d.actions[33, 1] == 1.0 and wide[33, 1] == 1.5 and "clipped" in d.card.notes[-1]
    wide[33, 1] = 1.00001  # rounding, not a mistake
    assert Dataset.from_arrays(**arrays(actions=wide)).actions.max() == 1.0
    refused("low < high", action_low=1)
    refused("both action_low and action_high", action_high=None)
    refused("action_low has 3 values but actions have 2", action_low=(-1, -1, -1))


def test_refusals_name_the_place():
    broken = arrays()["observations"].copy()
    broken[7, 2], broken[8, 0] = np.nan, np.inf
    refused(r"observations: nan at row 7, column 2 \(2 such values\)", observations=broken)
    rewards = np.ones(N)
    rewards[4] = -np.inf
    refused("rewards: -inf at row 4", rewards=rewards)
    rewards[4] = 1e300  # beyond float32
    refused("rewards: inf at row 4", rewards=rewards)
    refused("costs: nan at row 0", costs=np.full(N, np.nan))
    refused("observations have 59 rows but rewards have 60", observations=broken[:-1])
    refused("costs have 3 rows", costs=np.ones(3))
    refused("next_observations have shape", next_observations=np.ones((N, 4)))
    refused("rewards have shape", rewards=np.ones((N, 2)))
    refused("terminals.5. is 2", terminals=np.where(np.arange(N) == 5, 2, 0))
    refused("no episode ends in 60 rows", terminals=np.zeros(N), timeouts=None)
    refused("missing: rewards; present: observations", rewards=None)
    refused("must be numbers", observations=np.full((N, 1), "a"))
    refused("no rows", **{k: v[:0] for k, v in arrays().items() if isinstance(v, np.ndarray)})
    refused("unknown dataset option 'horizn': did you mean 'horizon'", horizn=3)


def test_suspicions_are_problems():
    def problems(**changes):
        return " | ".join(Dataset.from_arrays(**arrays(**changes)).problems)

    both = arrays()["terminals"] | arrays()["timeouts"]
    d = Dataset.from_arrays(**arrays(terminals=both))
    assert d.terminals.sum() == 6 and not d.timeouts.any()
    assert "4 rows are both terminal and timeout" in d.problems[0]
    shuffled = RANDOM.permutation(N)
    moved = arrays()["next_observations"].copy()
    moved[12] += 1
    # 60 rows have 6 ends, so 54 rows are followed by another one inside their episode.
    assert "next row at 1 of 54 (1.85 %)" in problems(next_observations=moved)
    moved[12] = arrays()["next_observations"][12]
    moved[19] += 1  # a terminal's successor may be anything
    assert problems(next_observations=moved) == ""
    everything = {k: v[shuffled] for k, v in arrays().items() if isinstance(v, np.ndarray)}
    assert "disagree" in problems(**everything)
    assert "longer than the horizon of 5" in problems(horizon=5)
    assert "negative" in problems(costs=np.where(np.arange(N) == 3, -1, 0))
    assert "all costs are 0" in problems(costs=np.zeros(N))
    still = np.column_stack([arrays()["observations"], np.ones(N)])
    assert "1 of 4 observation columns never change: 3" in problems(
        observations=still, next_observations=still
    )
    twice = {k: np.tile(v, (2,) + (1,) * (v.ndim - 1)) for k, v in arrays().items()
             if isinstance(v, np.ndarray)}  # fmt: skip
    assert "60 of 120 (50 %) rows repeat" in problems(**twice)


def test_with_costs():
    d = Dataset.from_arrays(**arrays())
    fast = d.with_costs(lambda s, a, n: n[:, 0] > 0.5)
    np.testing.assert_array_equal(fast.costs, arrays()["next_observations"][:, 0] > 0.5)
    assert d.costs is None and np.shares_memory(fast.observations, d.observations)
    zero = d.with_costs(np.zeros(N))
    assert "all costs are 0" in zero.problems[0]
    assert zero.with_costs(np.ones((N, 1))).problems == ()
    assert fast.fingerprint != zero.fingerprint != d.fingerprint
    with pytest.raises(SaferlError, match="costs have 3 rows but"):
        d.with_costs(np.ones(3))
    with pytest.raises(SaferlError, match="costs: nan at row 0"):
        d.with_costs(lambda s, a, n: np.full(N, np.nan))


def test_subset_by_episodes_and_rows():
    d = Dataset.from_arrays(**arrays())
    two = d.subset(episodes=[4, 1])
    np.testing.assert_array_equal(two.rewards, np.r_[d.rewards[40:50], d.rewards[10:20]])
    assert two.terminals.sum() == 2 and len(two.episodes) == 2
    assert len(d.subset(episodes=3)) == 30
    good = d.subset(episodes=d.episode_returns() > np.median(d.episode_returns()))
    assert len(good.episodes) == 3
    cut = d.subset(15)
    assert len(cut) == 15 and np.flatnonzero(cut.timeouts).tolist() == [9, 14]
    rows = d.subset([3, 4, 8, 19])  # a gap ends the episode, a terminal stays a terminal
    assert rows.timeouts.tolist() == [False, True, True, False]
    assert rows.terminals.tolist() == [False, False, False, True]
    assert "subset: 4 of 60 rows" in rows.card.notes
    for wrong, match in (
        (dict(), "either rows or episodes"),
        (dict(rows=[60]), "must lie in 0 … 59"),
        (dict(rows=[]), "empty"),
        (dict(rows=[0.5]), "must be a number"),
        (dict(episodes=np.ones(5, bool)), "mask of 6"),
    ):
        with pytest.raises(SaferlError, match=match):
            d.subset(**wrong)


def test_mix_draws_whole_trajectories():
    good = Dataset.from_arrays(**arrays(rewards=np.arange(N), costs=np.ones(N)), id="good")
    bad = Dataset.from_arrays(**arrays(rewards=-1 - np.arange(N), costs=np.zeros(N)), id="bad")
    mixed = Dataset.mix(good, bad, 0.25, seed=3)
    from_good = mixed.rewards >= 0
    # 25 % of 60 is 15: good episodes of 10 until there are more than 15; then up to more than 60.
    assert from_good.sum() == 20 and len(mixed) == 70
    assert from_good[:20].all() and (mixed.costs == from_good).all()
    assert mixed.episode_lengths().tolist() == [10] * 7
    for start, stop in mixed.episodes:  # rows of an episode stay together, successors with them
        rows = np.abs(mixed.rewards[start:stop]) - (not from_good[start])
        assert (np.diff(rows) == 1).all() and rows[0] % 10 == 0
        np.testing.assert_array_equal(
            mixed.next_observations[start], good.next_observations[int(rows[0])]
        )
    assert mixed.fingerprint == Dataset.mix(good, bad, 0.25, seed=3).fingerprint
    assert mixed.fingerprint != Dataset.mix(good, bad, 0.25, seed=4).fingerprint
    assert len(Dataset.mix(good, bad, 0.5, size=200)) == 210
    with pytest.raises(SaferlError, match="between 0 and 1"):
        Dataset.mix(good, bad, 25)
    with pytest.raises(SaferlError, match="has no costs"):
        Dataset.mix(good, Dataset.from_arrays(**arrays()), 0.5)
    thin = arrays(observations=np.ones(N), next_observations=np.ones(N), costs=np.ones(N))
    with pytest.raises(SaferlError, match="observations are float32"):
        Dataset.mix(good, Dataset.from_arrays(**thin), 0.5)


def test_fingerprint_depends_on_contents_only():
    d = Dataset.from_arrays(**arrays())
    assert len(d.fingerprint) == 64
    assert d.fingerprint == Dataset.from_arrays(**arrays(), id="other", env_id="x").fingerprint
    changed = arrays()["rewards"].copy()
    changed[-1] += 1e-3
    assert d.fingerprint != Dataset.from_arrays(**arrays(rewards=changed)).fingerprint


def test_card_is_json_both_ways():
    card = Card("a", "Hopper-v4", (-1,), np.ones(1), None, 10, (0, 1), "D4RL", "MIT", "o", ["n"])
    assert Card.from_dict(json.loads(json.dumps(card.to_dict()))) == card
    with pytest.raises(dataclasses.FrozenInstanceError):
        card.id = "b"
    for wrong in (dict(horizon=0), dict(n_actions=1.5), dict(reference_returns=(1, 1)),
                  dict(action_low="low"), dict(licens="MIT")):  # fmt: skip
        with pytest.raises(SaferlError):
            card.replace(**wrong)


@pytest.mark.parametrize("name", ["d.npz", "d.hdf5"])
@pytest.mark.parametrize("costs", [None, np.arange(N) % 2])
def test_save_and_load(tmp_path, name, costs):
    d = Dataset.from_arrays(**arrays(costs=costs), id="mine", env_id="Hopper-v4", horizon=10)
    save_dataset(d, tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    back = load_dataset(tmp_path / name)
    assert back.fingerprint == d.fingerprint and back.card == d.card
    again = load_dataset(str(tmp_path / name), env_id="Walker2d-v4", reference_returns=[0, 2])
    assert again.card.env_id == "Walker2d-v4" and again.normalised_score(1) == 50
    with pytest.raises(SaferlError, match=r"\.npz or \.hdf5"):
        save_dataset(d, tmp_path / "d.pkl")


def test_loading_a_large_array_needs_little_memory():
    n = 200_000
    states = np.random.default_rng(0).normal(size=(n + 1, 11)).astype(np.float32)
    ends = np.arange(n) % 1000 == 999
    values = (np.tanh(states[:-1, :3]), states[:-1, 3].copy(), np.zeros(n, bool), ends)
    tracemalloc.start()
    d = Dataset.from_arrays(states[:-1], *values, states[1:])
    shared = tracemalloc.get_traced_memory()[1] / d.nbytes
    tracemalloc.reset_peak()
    d = Dataset.from_arrays(states[:-1], *values)
    rebuilt = tracemalloc.get_traced_memory()[1] / d.nbytes
    tracemalloc.stop()
    assert shared < 0.8 and rebuilt < 2, (shared, rebuilt)  # chunks of checks; two gathers


def test_importing_the_data_package_is_light():
    code = (
        "import sys, saferl.data\n"
        "heavy = {'torch', 'gymnasium', 'h5py', 'pandas', 'matplotlib', 'minari'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
