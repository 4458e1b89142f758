"""Frames held once: stacks, the buffer on the device, n-step rows, V-D4RL's two layouts."""

from __future__ import annotations

import h5py
import numpy as np
import pytest
import torch

from saferl.agents.shared.agent import AgentConfig
from saferl.data import Dataset, load_dataset, save_dataset
from saferl.data.frames import Frames
from saferl.data.inspect import coverage, describe
from saferl.data.nstep import n_step
from saferl.errors import SaferlError
from saferl.replay import ReplayBuffer, ReturnsToGo, make_buffer
from saferl.replay.frames import FrameBuffer
from saferl.runs.settings import published
from saferl.spec import Spec

LENGTHS = (4, 1, 6)
K, H, W = 3, 5, 6


def episodes(seed=0, channels=3):
    """What happened: per episode images [T+1, C, H, W], actions [T, 2] and rewards [T]."""
    random = np.random.default_rng(seed)
    return [
        (
            random.integers(256, size=(length + 1, channels, H, W), dtype=np.uint8),
            random.uniform(-1, 1, (length, 2)).astype(np.float32),
            random.normal(size=length).astype(np.float32),
        )
        for length in LENGTHS
    ]


def stacks(images, stack=K):
    """[T+1, K·C, H, W] the slow way: push frames one by one, the first repeated."""
    queue, found = [images[0]] * stack, []
    for number, image in enumerate(images):
        queue = [*queue[1:], image] if number else queue
        found.append(np.concatenate(queue))
    return np.stack(found)


def make(stack=K, terminal=(False, True, False), seed=0) -> Dataset:
    told = episodes(seed)
    frames = np.concatenate([images for images, _, _ in told])
    starts, at, first = [], [], 0
    for images, actions, _ in told:
        starts += [first] * len(images)
        at += range(first, first + len(actions))
        first += len(images)
    ends = np.zeros(sum(LENGTHS), bool)
    ends[np.cumsum(LENGTHS) - 1] = True
    terminals = np.zeros(len(ends), bool)
    terminals[np.cumsum(LENGTHS) - 1] = terminal
    at, starts = np.array(at), np.array(starts)
    return Dataset.from_arrays(
        Frames(frames, at, starts, stack),
        np.concatenate([actions for _, actions, _ in told]),
        np.concatenate([rewards for _, _, rewards in told]),
        terminals, ends & ~terminals, Frames(frames, at + 1, starts, stack),
        action_low=(-1, -1), action_high=(1, 1), id="pixels",
    )  # fmt: skip


@pytest.fixture
def expected():
    whole = [stacks(images) for images, _, _ in episodes()]
    return np.concatenate([s[:-1] for s in whole]), np.concatenate([s[1:] for s in whole])


def test_stacks_never_reach_into_another_episode(expected):
    data = make()
    before, after = expected
    assert data.observations.shape == (11, 9, H, W) and data.observations.dtype == np.uint8
    np.testing.assert_array_equal(data.observations[:], before)
    np.testing.assert_array_equal(np.asarray(data.next_observations), after)
    np.testing.assert_array_equal(data.observations[4], before[4])
    np.testing.assert_array_equal(data.observations[[5, 0]], before[[5, 0]])
    np.testing.assert_array_equal(data.observations[data.timeouts], before[data.timeouts])
    part = data.subset(episodes=[2, 0])
    np.testing.assert_array_equal(part.observations[:], before[[*range(5, 11), *range(4)]])
    np.testing.assert_array_equal(make(1).observations[:], before[:, 6:])


def test_frames_are_counted_once_and_in_the_fingerprint():
    data = make()
    frames = data.observations.frames
    assert frames.nbytes < data.nbytes < frames.nbytes + 1000
    with pytest.raises(ValueError):
        frames[0] = 0
    assert make().fingerprint == data.fingerprint
    assert make(seed=1).fingerprint != data.fingerprint != make(2).fingerprint
    values = coverage(data)
    assert values["duplicates"] == 0 and values["observation_max"] == [frames.max()]
    assert "9 x 5 x 6 uint8" in describe(data)
    with pytest.raises(SaferlError, match="cannot mix datasets of frames"):
        Dataset.mix(data, data, 0.5)


def plain(data: Dataset) -> Dataset:
    """The same with whole observations."""
    return Dataset.from_arrays(
        np.asarray(data.observations), data.actions, data.rewards, data.terminals, data.timeouts,
        np.asarray(data.next_observations), card=data.card,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["frames", "subset", "whole", "memory map"])
def test_the_buffer_gathers_what_the_dataset_says(kind, expected, tmp_path):
    data, (before, after) = make(), expected
    rows = np.arange(11)
    if kind == "subset":
        rows = np.array([5, 6, 7, 8, 9, 10, 4])
        data = data.subset(episodes=[2, 1])
    elif kind == "whole":
        data = plain(data)
    spec = data.spec(AgentConfig(reward_scale=2.0))
    assert spec.image == (9, H, W) and spec.frame_stack == (1 if kind == "whole" else 3)
    file = tmp_path / "frames" if kind == "memory map" else None
    buffer = make_buffer(data, spec, (3, 4), memory_map=file)
    assert isinstance(buffer, FrameBuffer) and buffer.frames.dtype == torch.uint8
    if kind == "subset":
        assert len(buffer.frames) == 9  # of 14: the others are used by no row
    index = torch.randint(len(rows), (2, 40), generator=torch.Generator().manual_seed(0))
    batch, where = buffer.gather(index), rows[index.numpy()]
    np.testing.assert_array_equal(batch.observations, before[where])
    np.testing.assert_array_equal(batch.next_observations, after[where])
    whole = make()
    np.testing.assert_array_equal(batch.actions, whole.actions[where])
    np.testing.assert_allclose(batch.rewards, 2 * whole.rewards[where])
    np.testing.assert_array_equal(batch.terminals, whole.terminals[where])
    assert batch.costs is None

    drawn = buffer.sample(16)
    state = buffer.state_dict()
    again = make_buffer(data, spec, (8, 9))
    again.load_state_dict(state)
    assert torch.equal(again.sample(16).observations, buffer.sample(16).observations)
    assert drawn.observations.shape == (2, 16, 9, H, W)
    # The draws are those of the buffer of vectors.
    vectors = ReplayBuffer(Spec(3, 2, action_low=(-1, -1), action_high=(1, 1)), 11, (3, 4))
    vectors.size = len(rows)
    fresh = make_buffer(data, spec, (3, 4))
    one, two = fresh.random.integers(fresh.size, 9), vectors.random.integers(vectors.size, 9)
    assert torch.equal(one, two)


def test_costs_returns_and_single_members():
    data = make().with_costs(np.arange(11.0))
    spec = data.spec(AgentConfig())
    buffer = make_buffer(data, spec, (0,))
    assert buffer.gather(torch.tensor([[7, 2]])).costs.tolist() == [[7.0, 2.0]]
    assert not hasattr(buffer, "extend")  # it holds one dataset
    buffer = make_buffer(data, spec, (0, 1), extras=(ReturnsToGo(1.0),))
    found = buffer.gather(torch.tensor([[7], [2]])).extras["returns_to_go"]
    expected = [[data.rewards[7:].sum()], [data.rewards[2:4].sum()]]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert buffer.sample_of([1], 5).observations.shape == (1, 5, 9, H, W)


@pytest.mark.parametrize("frames", [True, False])
def test_n_step_rows(frames):
    data = make() if frames else plain(make())
    data = data.with_costs(np.arange(11.0))
    got = n_step(data, 3, 0.9)
    # Episodes of 4 (timeout), 1 (terminal) and 6 steps (timeout).
    starts = [0, 1, 4, 5, 6, 7, 8]
    ends = [2, 3, 4, 7, 8, 9, 10]
    np.testing.assert_array_equal(got.observations[:], data.observations[:][starts])
    np.testing.assert_array_equal(got.next_observations[:], data.next_observations[:][ends])
    for row, (start, end) in enumerate(zip(starts, ends)):
        weights = 0.9 ** np.arange(end - start + 1)
        assert got.rewards[row] == pytest.approx(weights @ data.rewards[start : end + 1])
        assert got.costs[row] == pytest.approx(weights @ data.costs[start : end + 1])
    assert got.terminals.tolist() == [False, False, True, False, False, False, False]
    np.testing.assert_array_equal(got.actions, data.actions[starts])
    one = n_step(data, 1, 0.9)
    np.testing.assert_array_equal(one.rewards, data.rewards)
    assert len(one) == 11


# V-D4RL -----------------------------------------------------------------------------------------


def write_npz(folder, told):
    folder.mkdir(parents=True)
    for number, (images, actions, rewards) in enumerate(told):
        length = len(images)
        place = np.arange(length)
        np.savez_compressed(
            folder / f"20220{number}01T000000-ab{number}-{length}.npz",
            image=images.transpose(0, 2, 3, 1),
            action=np.concatenate([np.zeros((1, 2), np.float32), actions]),
            reward=np.concatenate([[0], rewards]).astype(np.float32),
            discount=np.ones(length, np.float32),
            is_first=place == 0,
            is_last=place == length - 1,
            is_terminal=np.zeros(length, bool),
        )


def write_hdf5(path, told):
    path.parent.mkdir(parents=True, exist_ok=True)
    types = [[0] + [1] * (len(images) - 2) + [2] for images, _, _ in told]
    zero = np.zeros((1, 2), np.float32)
    with h5py.File(path, "w") as file:
        columns = {
            "observation": np.concatenate([images for images, _, _ in told]),
            "action": np.concatenate([np.concatenate([zero, actions]) for _, actions, _ in told]),
            "reward": np.concatenate([np.concatenate([[0], rewards]) for *_, rewards in told]),
            "discount": np.ones(sum(map(len, types)), np.float32),
            "step_type": np.concatenate(types),
        }
        for name, column in columns.items():
            file.create_dataset(name, data=column, compression="gzip")


@pytest.fixture(params=["npz", "hdf5"])
def folder(request, tmp_path):
    place, told = tmp_path / "main" / "walker_walk" / "expert" / "64px", episodes()
    if request.param == "npz":
        write_npz(place, told)
    else:
        write_hdf5(place / "shard_0_110.hdf5", told[:2])
        write_hdf5(place / "shard_1_110.hdf5", told[2:])
    return place


def test_both_layouts_are_read(folder, expected):
    data = load_dataset(folder)
    before, after = expected
    np.testing.assert_array_equal(data.observations[:], before)
    np.testing.assert_array_equal(data.next_observations[:], after)
    # A row of the file holds what led to its image, a row of the dataset what is done at it.
    np.testing.assert_array_equal(data.actions, np.concatenate([a for _, a, _ in episodes()]))
    np.testing.assert_array_equal(data.rewards, np.concatenate([r for *_, r in episodes()]))
    assert data.timeouts.nonzero()[0].tolist() == [3, 4, 10] and not data.terminals.any()
    card = data.card
    assert (card.action_low, card.horizon, card.reference_returns) == ((-1, -1), 500, (0, 1000))
    assert card.env_id is None  # frames of 5 × 6 pixels are no published size
    assert card.id == "vd4rl/walker_walk/expert/64px"
    for agent in ("moorl", "drq_bc", "rlpd"):
        assert published(agent, card.id) != published(agent, "nothing"), agent
    assert len(load_dataset(folder, size=5).episodes) == 2
    assert load_dataset(folder, size=6).observations.frames.shape[0] == 14
    one = load_dataset(folder, frame_stack=1, env_id="CartPole-v1")
    assert one.observations.shape[1] == 3 and one.card.env_id == "CartPole-v1"
    file = min(folder.iterdir())
    assert len(load_dataset(file)) == (4 if file.suffix == ".npz" else 5)


def test_by_name_and_with_an_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("SAFERL_DATA_DIR", str(tmp_path))
    place = tmp_path / "vd4rl" / "main" / "cheetah_run" / "medium" / "84px"
    told = np.zeros((3, 3, 84, 84), np.uint8), np.zeros((2, 2), np.float32), np.ones(2)
    write_hdf5(place / "0.hdf5", [told])
    data = load_dataset("vd4rl/main/cheetah_run/medium/84px")
    assert data.card.id == "vd4rl/main/cheetah_run/medium/84px"
    assert data.card.env_id == "dmc/cheetah-run-pixels84-v0"
    assert data.normalised_score(100.0) == 10.0
    with pytest.raises(SaferlError, match=r"no V-D4RL episodes .* put the folder there"):
        load_dataset("vd4rl/main/cheetah_run/expert/84px")


def test_saved_and_loaded_again(tmp_path):
    data = make(terminal=(True, False, True))
    path = save_dataset(data, tmp_path / "mine")
    again = load_dataset(path)
    assert again.fingerprint == data.fingerprint and again.card == data.card
    assert sorted(p.suffix for p in path.iterdir()) == [".json", ".npz", ".npz", ".npz"]
    with np.load(min(path.glob("000000*"))) as file:
        assert file["image"].shape == (5, H, W, 3) and file["discount"].tolist() == [1, 1, 1, 1, 0]
        assert not file["action"][0].any() and file["is_terminal"].tolist() == [0, 0, 0, 0, 1]
    with pytest.raises(SaferlError, match="exists"):
        save_dataset(data, path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_what_is_wrong_with_files(tmp_path):
    told = episodes()
    write_npz(tmp_path / "a", told)
    victim = max((tmp_path / "a").iterdir())
    victim.write_bytes(victim.read_bytes()[:400])
    with pytest.raises(SaferlError, match="cannot be read"):
        load_dataset("vd4rl/a", path=tmp_path / "a")
    write_npz(tmp_path / "b", [told[0], (told[1][0][:, :, :3], *told[1][1:])])
    with pytest.raises(SaferlError, match="differ from"):
        load_dataset(tmp_path / "b")
    write_npz(tmp_path / "c", [(told[0][0], told[0][1], told[0][2][:-1])])
    with pytest.raises(SaferlError, match="an episode has one of each per row"):
        load_dataset(tmp_path / "c")
    write_hdf5(tmp_path / "d" / "0.hdf5", told)
    with h5py.File(tmp_path / "d" / "0.hdf5", "a") as file:
        file["step_type"][-1] = 1
    with pytest.raises(SaferlError, match="shard is cut"):
        load_dataset(tmp_path / "d")
    np.savez(tmp_path / "b" / "0.npz", image=0)
    with pytest.raises(SaferlError, match=r"missing action, reward"):
        load_dataset("vd4rl/b", path=tmp_path / "b")
    with pytest.raises(SaferlError, match="frame_stack must be 1 or more"):
        load_dataset("vd4rl/b", path=tmp_path / "b", frame_stack=0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SaferlError, match="is a folder: name the file in it"):
        load_dataset(tmp_path / "empty")
