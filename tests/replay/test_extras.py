"""Extra columns of a batch: next actions, returns-to-go, windows of steps."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from saferl.errors import SaferlError
from saferl.replay import (
    Extra,
    MixedSampler,
    NextActions,
    OnlineBuffer,
    OnlineFrameBuffer,
    ReplayBuffer,
    ReturnsToGo,
    Window,
    make_buffer,
)
from saferl.spec import Spec

SPEC = Spec(2, 1, action_low=(-2.0,), action_high=(2.0,), reward_scale=2.0)
ALL = NextActions(), ReturnsToGo(0.5), Window(3)


def everything(buffer):
    return buffer.gather(torch.arange(buffer.size)[None])


def test_next_actions_end_with_their_episode(point):
    batch = everything(ReplayBuffer.from_dataset(point, SPEC, [0], extras=(NextActions(),)))
    found, known = (batch.extras[name][0].numpy() for name in ("next_actions", "has_next_action"))
    last = point.terminals | point.timeouts
    assert (known == ~last).all()
    inside = np.flatnonzero(~last)
    np.testing.assert_allclose(found[inside], point.actions[inside + 1] / 2, atol=1e-6)
    np.testing.assert_allclose(found[last], point.actions[last] / 2, atol=1e-6)


def test_next_actions_of_a_discrete_task_are_integers():
    spec = Spec(1, 3, discrete=True)
    extra = NextActions()
    stored = extra.of_episode(np.array([[0.0], [2.0], [1.0]], np.float32), np.zeros(3), True)
    found = extra.fields(torch.from_numpy(stored), spec)
    assert found["next_actions"].tolist() == [2, 1, 1]
    assert found["next_actions"].dtype == torch.int64
    assert found["has_next_action"].tolist() == [1, 1, 0]


def test_returns_to_go_are_discounted_sums_in_the_agents_units(point):
    batch = everything(ReplayBuffer.from_dataset(point, SPEC, [0], extras=(ReturnsToGo(0.5),)))
    found = batch.extras["returns_to_go"][0].numpy()
    for start, stop in point.episodes[:3]:
        expected = 0.0
        for row in reversed(range(start, stop)):
            expected = 2 * point.rewards[row] + 0.5 * expected
            assert found[row] == pytest.approx(expected, rel=1e-5)


def test_a_fragment_has_no_return_yet(point):
    cut = point.subset(25)  # one episode of 20 steps and five rows of another
    open_end = without_last_end(cut)
    batch = everything(ReplayBuffer.from_dataset(open_end, SPEC, [0], extras=(ReturnsToGo(0.5),)))
    found = batch.extras["returns_to_go"][0]
    assert found[:20].isfinite().all() and (found[20:] == -torch.inf).all()


def without_last_end(dataset):
    """The same rows without their last timeout."""
    arrays = {name: getattr(dataset, name) for name in dataset.FIELDS}
    arrays["timeouts"] = arrays["timeouts"] & (np.arange(len(dataset)) < len(dataset) - 1)
    return type(dataset)(**arrays, card=dataset.card)


def test_windows_hold_the_steps_up_to_a_row_and_none_of_another_episode(point):
    batch = everything(ReplayBuffer.from_dataset(point, SPEC, [0], extras=(Window(3),)))
    mask = batch.extras["window_mask"][0]
    rewards = batch.extras["window_rewards"][0]
    assert batch.extras["window_observations"].shape == (1, len(point), 3, 2)
    assert batch.extras["window_actions"].shape == (1, len(point), 3, 1)
    for row in (0, 1, 2, 19, 20, 21, 25, len(point) - 1):
        start = max(s for s, _ in point.episodes if s <= row)
        steps = range(max(start, row - 2), row + 1)
        assert mask[row].tolist() == [0] * (3 - len(steps)) + [1] * len(steps)
        kept = rewards[row][mask[row] > 0].tolist()
        assert kept == pytest.approx([2 * point.rewards[s] for s in steps])


def gathered(steps: int, capacity: int, ends: set[int]) -> OnlineBuffer:
    buffer = OnlineBuffer(SPEC, capacity, [0, 1], extras=ALL)
    which, length = np.arange(2), 0
    for step in range(steps):
        row = np.full((2, 2), step, np.float32)
        over, length = step in ends, length + 1
        action = np.full((2, 1), step / 50, np.float32)
        reward = np.array([step, 100 + step], np.float32)
        buffer.append(which, np.full(2, over), row, action, reward, row + 1, which * 0, which * 0)
        if over:
            for member in which:
                buffer.finish_episode(member, length)
            length = 0
    return buffer


def test_rows_that_members_gather_get_their_extras_when_the_episode_ends():
    buffer = gathered(7, 10, {3})
    batch, ends = buffer.of_member(1)
    assert np.flatnonzero(ends).tolist() == [3]
    found = {name: field[0] for name, field in batch.extras.items()}
    rewards = 2 * (100 + np.arange(7))
    assert found["returns_to_go"][3] == rewards[3]
    assert found["returns_to_go"][2] == rewards[2] + 0.5 * rewards[3]
    assert (found["returns_to_go"][4:] == -torch.inf).all()
    assert found["has_next_action"].tolist() == [1, 1, 1, 0, 0, 0, 0]
    torch.testing.assert_close(found["next_actions"][:3, 0], torch.tensor([1.0, 2.0, 3.0]) / 100)
    assert found["window_mask"].tolist()[3:6] == [[1, 1, 1], [0, 0, 1], [0, 1, 1]]
    assert found["window_rewards"][5].tolist()[1:] == [rewards[4], rewards[5]]


def test_windows_leave_out_what_a_full_buffer_has_overwritten():
    buffer = gathered(9, 4, set())
    batch, _ = buffer.of_member(0)  # rows 5 … 8 of one long episode
    assert batch.rewards[0].tolist() == [10, 12, 14, 16]
    assert batch.extras["window_mask"][0].tolist() == [[0, 0, 1], [0, 1, 1], [1, 1, 1], [1, 1, 1]]
    assert batch.extras["window_rewards"][0, 2].tolist() == [10, 12, 14]
    restored = OnlineBuffer(SPEC, 4, [0, 1], extras=ALL)
    restored.load_state_dict(buffer.state_dict())
    zero = np.zeros((2, 2), np.float32)
    for one in (buffer, restored):  # goes on in the same episode
        one.append(np.arange(2), np.zeros(2, bool), zero, zero[:, :1], zero[:, 0], zero,
                   zero[:, 0], zero[:, 0])  # fmt: skip
    assert torch.equal(restored.rows, buffer.rows)


def test_batches_of_both_sources_carry_the_extras(point):
    @dataclasses.dataclass
    class Shares:
        batch_size: int = 8
        sampling: str = "mixed"
        offline_share: float = 0.5
        share_rule: str = "constant"
        final_share: float = 0.0
        anneal_steps: int = 0

    offline = make_buffer(point, SPEC, [0, 1], extras=ALL)
    batch = MixedSampler(Shares(), offline, gathered(9, 20, {3}), [0, 1]).sample(16)
    names = {"next_actions", "has_next_action", "returns_to_go", "window_observations",
             "window_actions", "window_rewards", "window_mask"}  # fmt: skip
    assert set(batch.extras) == names
    assert all(field.shape[:2] == (2, 16) for field in batch.extras.values())


def test_what_cannot_be_is_one_line():
    with pytest.raises(SaferlError, match="a window has 1 or more steps, got 0"):
        Window(0)
    with pytest.raises(SaferlError, match="needs a discount below 1"):
        ReturnsToGo(1.0, -5.0)
    pixels = Spec(12, 1, action_low=(-1.0,), action_high=(1.0,), image=(3, 2, 2))
    with pytest.raises(SaferlError, match="pixels have a frame stack"):
        OnlineFrameBuffer(pixels, 4, [0], extras=(Window(2),))


class PreviousReward(Extra):
    """A third party's extra that looks at the row before, and is no `Window`."""

    name = "previous_reward"

    def width(self, spec):
        return 1

    def of_episode(self, actions, rewards, complete):
        return np.minimum(np.arange(len(rewards)), 1)[:, None]  # 0: nothing is before the first

    def fields(self, stored, spec):
        return {}

    def window_fields(self, stored, gather):
        found, present = gather(2)
        return {self.name: found["rewards"][..., 0] * stored[..., 0] * present[..., 0]}


def test_any_extra_may_look_back(point):
    batch = everything(ReplayBuffer.from_dataset(point, SPEC, [0], extras=(PreviousReward(),)))
    rewards = SPEC.rewards(point.rewards)
    expected = np.append(0, rewards[:-1])
    expected[point.episodes[:, 0]] = 0
    if point.fragment is not None:
        expected[point.episodes[-1, 1]] = 0
    np.testing.assert_allclose(batch.extras["previous_reward"][0], expected, atol=1e-6)
    pixels = dataclasses.replace(SPEC, observation_dim=27, image=(3, 3, 3))
    with pytest.raises(SaferlError, match="pixels have a frame stack"):
        OnlineFrameBuffer(pixels, 4, [0], extras=(PreviousReward(),))
