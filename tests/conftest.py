"""What all tests share: one thread, no network, a cache of their own, a toy task."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import gymnasium
import numpy as np
import pytest
import torch

from saferl.data import Dataset

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_thread():
    """A command that a test ran must not slow down or change those after it."""
    torch.set_num_threads(1)


@pytest.fixture
def float64():
    """Rounding far below the tolerance, so that a small systematic error shows."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """No test reads or writes the user's data folders."""
    monkeypatch.setenv("SAFERL_DATA_DIR", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path_factory.getbasetemp() / "d4rl"))


class PointEnv(gymnasium.Env):
    """A point on a line: action in [-2, 2] moves it by a tenth; reward -|x|, cost 1 where x > 0.5.

    Episodes are truncated after 20 steps; |x| > 3 terminates.
    """

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gymnasium.spaces.Box(-2.0, 2.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = float(self.np_random.uniform(-1, 1))
        self.t = 0
        return np.array([self.x, 1.0]), {}

    def step(self, action):
        self.x += 0.1 * float(action[0])
        self.t += 1
        cost = float(self.x > 0.5)
        return np.array([self.x, 1.0]), -abs(self.x), abs(self.x) > 3, self.t >= 20, {"cost": cost}


if "PointTest-v0" not in gymnasium.registry:
    gymnasium.register("PointTest-v0", entry_point=PointEnv)


def point_dataset(episodes: int = 20, seed: int = 0, **card) -> Dataset:
    """Random play in `PointEnv`, with costs."""
    rng = np.random.default_rng(seed)
    env = PointEnv()
    rows = []
    for episode in range(episodes):
        observation, _ = env.reset(seed=seed + episode)
        ended = False
        while not ended:
            action = rng.uniform(-2, 2, 1).astype(np.float32)
            following, reward, terminated, truncated, info = env.step(action)
            rows.append((observation, action, reward, terminated, truncated and not terminated,
                         following, info["cost"]))  # fmt: skip
            observation, ended = following, terminated or truncated
    columns = [np.array(column) for column in zip(*rows)]
    card = {"id": "point", "env_id": "PointTest-v0", "action_low": (-2.0,), "action_high": (2.0,),
            "reference_returns": (-20.0, 0.0)} | card  # fmt: skip
    return Dataset.from_arrays(*columns, **card)


@pytest.fixture(scope="session")
def point() -> Dataset:
    return point_dataset()
