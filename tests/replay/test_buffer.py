"""The replay buffer holds what the dataset holds, in the agent's units."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from saferl.errors import SaferlError
from saferl.io import human
from saferl.replay import OnlineBuffer, ReplayBuffer, memory
from saferl.spec import Spec
from tests.conftest import point_dataset

SPEC = Spec(
    observation_dim=2,
    action_dim=1,
    action_low=(-2.0,),
    action_high=(2.0,),
    observation_mean=(0.5, 1.0),
    observation_std=(2.0, 1.0),
    reward_scale=3.0,
    reward_shift=1.0,
)


def everything(buffer: ReplayBuffer):
    return buffer.gather(torch.arange(buffer.size).expand(buffer.members, -1))


def test_rows_are_the_dataset_in_agent_units(point):
    batch = everything(ReplayBuffer.from_dataset(point, SPEC, seeds=[0]))
    expected = {
        "observations": (point.observations - [0.5, 1.0]) / [2.0, 1.0],
        "actions": point.actions / 2,
        "rewards": 3 * point.rewards + 1,
        "costs": point.costs,
        "next_observations": (point.next_observations - [0.5, 1.0]) / [2.0, 1.0],
        "terminals": point.terminals,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(batch, name)[0], value, atol=1e-6, err_msg=name)


def test_members_share_rows_and_draw_their_own_batches(point):
    three = ReplayBuffer.from_dataset(point, SPEC, seeds=[3, 4, 5])
    alone = ReplayBuffer.from_dataset(point, SPEC, seeds=[4])
    for _ in range(3):
        a, b = three.sample(16), alone.sample(16)
        assert torch.equal(a.observations[1], b.observations[0])
        assert not torch.equal(a.observations[0], a.observations[1])


def test_sampling_is_uniform_with_replacement():
    n, draws = 50, 20_000
    buffer = ReplayBuffer(Spec(1, 1, action_low=(-1.0,), action_high=(1.0,)), n, [0], costs=False)
    rows = np.arange(n, dtype=np.float32)[:, None]
    buffer.extend(rows, rows * 0, rows[:, 0], rows, rows[:, 0] * 0)
    counts = torch.bincount(buffer.sample(draws).observations.flatten().long(), minlength=n)
    # Chi-square with 49 degrees of freedom: 99.99 % quantile is about 95.
    assert ((counts - draws / n) ** 2 / (draws / n)).sum() < 95


def test_members_draw_from_rows_of_their_own(point):
    """As from a buffer that holds nothing else, to the bit and by the same stream."""
    some = np.arange(3, 40), np.arange(0, 60, 7)
    both = ReplayBuffer.from_dataset(point, SPEC, seeds=[3, 4])
    both.restrict(some)
    alone = [ReplayBuffer.from_dataset(point.subset(rows), SPEC, seeds=[3 + i])
             for i, rows in enumerate(some)]  # fmt: skip
    for _ in range(3):
        drawn, own = both.sample(16), [buffer.sample(16) for buffer in alone]
        assert all(torch.equal(drawn.rewards[i], own[i].rewards[0]) for i in (0, 1))
    assert torch.equal(both.sample_of([1], 16).rewards[0], alone[1].sample(16).rewards[0])
    both.restrict(None)
    assert torch.equal(both.sample_of([0], 16).rewards, free(point, alone[0]).rewards)


def free(dataset, other: ReplayBuffer):
    """What a member draws next from all rows, whose stream is where the other's is."""
    buffer = ReplayBuffer.from_dataset(dataset, SPEC, seeds=[0])
    buffer.random.load_state_dict(other.random.state_dict())
    return buffer.sample(16)


def test_state_restores_the_sequence_of_batches(point):
    buffer = ReplayBuffer.from_dataset(point, SPEC, seeds=[0, 1])
    buffer.sample(8)
    state = buffer.state_dict()
    first = buffer.sample(8).rewards
    again = ReplayBuffer.from_dataset(point, SPEC, seeds=[7, 8])
    again.load_state_dict(state)
    assert torch.equal(again.sample(8).rewards, first)


def test_members_own_rows_grow_and_overwrite_the_oldest():
    spec = Spec(1, 1, action_low=(-1.0,), action_high=(1.0,))
    buffer = OnlineBuffer(spec, 4, [0, 1])
    for step in range(6):
        which = np.arange(2 if step < 5 else 1)  # the second member stops one step earlier
        values = np.array([step, 10 + step], np.float32)[which]
        buffer.append(which, which < 0, values[:, None], values[:, None] * 0, values,
                      values[:, None], values * 0, values)  # fmt: skip
    assert buffer.sizes.tolist() == [4, 4] and buffer.added.tolist() == [6, 5]
    first, second = (buffer.of_member(m)[0].rewards[0].tolist() for m in (0, 1))
    assert first == [2, 3, 4, 5] and second == [11, 12, 13, 14]
    drawn = buffer.sample(200).rewards
    assert set(drawn[0].tolist()) == {2, 3, 4, 5}
    assert set(drawn[1].tolist()) == {11, 12, 13, 14}
    restored = OnlineBuffer(spec, 4, [0, 1])
    restored.load_state_dict(buffer.state_dict())
    assert torch.equal(restored.rows, buffer.rows)
    assert torch.equal(restored.sample(8).rewards, buffer.sample(8).rewards)
    only = buffer.sample_of([1], 50).rewards
    assert only.shape == (1, 50) and only.min() >= 11


def test_discrete_actions_come_back_as_integers():
    buffer = ReplayBuffer(Spec(1, 3, discrete=True), 5, [0], costs=False)
    rows = np.zeros((5, 1), np.float32)
    buffer.extend(rows, np.array([0, 1, 2, 2, 1]), rows[:, 0], rows, rows[:, 0])
    actions = everything(buffer).actions
    assert actions.dtype == torch.int64 and actions.tolist() == [[0, 1, 2, 2, 1]]


def test_absent_costs_are_none(point):
    arrays = {n: getattr(point, n) for n in point.FIELDS if n != "costs"}
    without = type(point)(**arrays, card=point.card)
    assert ReplayBuffer.from_dataset(without, SPEC, [0]).sample(4).costs is None


def test_memory_map_gives_the_same_batches(point, tmp_path):
    lines = []
    mapped = ReplayBuffer.from_dataset(
        point, SPEC, [0], memory_map=tmp_path / "rows", say=lines.append
    )
    plain = ReplayBuffer.from_dataset(point, SPEC, [0])
    assert torch.equal(mapped.sample(32).observations, plain.sample(32).observations)
    assert (tmp_path / "rows").stat().st_size == plain.rows.nbytes
    assert str(tmp_path) in lines[0]


def test_memory_need_is_said_before_allocating(point, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 1000)
    lines = []
    with pytest.raises(SaferlError, match="memory-map"):
        ReplayBuffer.from_dataset(point, SPEC, [0], say=lines.append)
    assert "free" in lines[0]


def test_buffer_takes_the_float32_bytes_of_the_data():
    data = point_dataset()
    buffer = ReplayBuffer.from_dataset(data, SPEC, [0])
    floats = sum(getattr(data, n).size for n in data.FIELDS) * 4
    assert buffer.rows.nbytes <= 1.3 * floats


def test_human():
    assert [human(v) for v in (5, 1536, 3 * 2**30)] == ["5 B", "1.5 KiB", "3.0 GiB"]


def test_a_memory_map_never_overwrites_another_file(point, tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    for path, message in (
        (file, "exists and is no buffer"),
        (tmp_path / "no/rows", "does not exist"),
    ):
        with pytest.raises(SaferlError, match=message):
            ReplayBuffer.from_dataset(point, SPEC, [0], memory_map=path)
    assert file.read_text() == "mine"
    for _ in range(2):  # a run that goes on makes its own file again
        ReplayBuffer.from_dataset(point, SPEC, [0], memory_map=tmp_path / "rows")
