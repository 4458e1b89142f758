"""Files in the exact layouts of D4RL, DSRL and Minari train end to end by their ids."""

from __future__ import annotations

import h5py
import numpy as np
import pytest

import saferl

N, EPISODE = 400, 100
rng = np.random.default_rng(0)


def walk(observation_dim: int, action_dim: int) -> dict[str, np.ndarray]:
    """Four episodes of N / 4 steps; the first terminates, the others time out."""
    ends = np.arange(1, N + 1) % EPISODE == 0
    return {
        "observations": rng.normal(size=(N, observation_dim)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (N, action_dim)).astype(np.float32),
        "rewards": rng.normal(size=N).astype(np.float32),
        "terminals": ends & (np.arange(N) < EPISODE),
        "timeouts": ends & (np.arange(N) >= EPISODE),
    }


def train(agent, dataset, tmp_path, **options):
    options = {"settings": {"hidden": [8]}, "eval_episodes": 1} | options
    return saferl.train(agent, dataset, steps=10, members=2, out=tmp_path / "run", device="cpu",
                        progress=False, **options)  # fmt: skip


@pytest.mark.parametrize("version", [0, 2])
def test_d4rl(tmp_path, monkeypatch, version):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    arrays = walk(11, 3)
    name = "hopper_medium.hdf5" if version == 0 else "hopper_medium-v2.hdf5"
    with h5py.File(tmp_path / name, "w") as file:
        for key, value in arrays.items():
            file[key] = value
        file["infos/qpos"] = np.zeros((N, 6))
        file["metadata/algorithm"] = np.bytes_("SAC")
        if version == 2:
            file["next_observations"] = rng.normal(size=(N, 11)).astype(np.float32)
    run = train("iql", f"d4rl/hopper-medium-v{version}", tmp_path)
    assert run.evaluation.costs is None  # Hopper-v4 has none
    assert run.agent.spec.reward_scale != 1  # the configuration of the family was applied
    score = run.evaluation.table(reference_returns=(-20.272305, 3234.3))[0]["score"]
    assert -5 < score < 20  # an untrained hopper on D4RL's scale


def test_d4rl_timeouts_bootstrap_and_terminals_do_not(tmp_path, monkeypatch):
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    arrays = walk(11, 3) | {"next_observations": rng.normal(size=(N, 11)).astype(np.float32)}
    with h5py.File(tmp_path / "hopper_medium-v2.hdf5", "w") as file:
        for key, value in arrays.items():
            file[key] = value
    dataset = saferl.load_dataset("d4rl/hopper-medium-v2")
    agent = saferl.make_agent("td3_bc", dataset)
    buffer = saferl.ReplayBuffer.from_dataset(dataset, agent.spec, [0])
    terminals = buffer.rows[:, buffer.layout.columns["terminals"].start].numpy().astype(bool)
    np.testing.assert_array_equal(terminals, arrays["terminals"])
    assert not terminals[arrays["timeouts"]].any()


def test_dsrl(tmp_path, monkeypatch):
    monkeypatch.setenv("DSRL_DATASET_DIR", str(tmp_path))
    from saferl.data.sources import dsrl

    arrays = walk(11, 3) | {"costs": rng.integers(0, 2, (N, 1)).astype(np.float32)}
    arrays["next_observations"] = rng.normal(size=(N, 11)).astype(np.float32)
    arrays["rewards"] = arrays["rewards"][:, None]  # (N, 1), as published files have
    file_name = dsrl.task("OfflineHopperVelocityGymnasium-v1")["file"].rsplit("/", 1)[-1]
    with h5py.File(tmp_path / file_name, "w") as file:
        for key, value in arrays.items():
            file.create_dataset(key, data=value, compression="gzip")
    run = train("bc", "dsrl/OfflineHopperVelocityGymnasium-v1", tmp_path, cost_limits=[20, 40])
    rows = run.evaluation.table([20, 40])
    assert {row["limit"] for row in rows} == {20, 40} and rows[0]["cost_mean"] is not None


@pytest.mark.filterwarnings("ignore::UserWarning:minari")  # on absent environment specs
def test_minari(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    import minari
    from gymnasium.spaces import Box
    from minari.data_collector import EpisodeBuffer

    episodes = [
        EpisodeBuffer(
            id=k,
            observations=rng.normal(size=(51, 2)).astype(np.float32),
            actions=rng.uniform(-2, 2, (50, 1)).astype(np.float32),
            rewards=rng.normal(size=50),
            terminations=[False] * 50,
            truncations=[False] * 49 + [True],
            infos={"cost": rng.integers(0, 2, 51).astype(np.float64)},
        )
        for k in range(6)
    ]
    minari.create_dataset_from_buffers(
        "test/line-v0",
        episodes,
        observation_space=Box(-np.inf, np.inf, (2,), np.float32),
        action_space=Box(-2, 2, (1,), np.float32),
        algorithm_name="random", author="test", author_email="t@example.org",
        code_permalink="https://example.org", description="a line",
    )  # fmt: skip
    run = train("td3_bc", "minari/test/line-v0", tmp_path, env="tests.conftest:PointTest-v0",
                cost_limits=[5])  # fmt: skip
    assert run.evaluation.table([5])[0]["limit"] == 5
