"""dm_control behind gymnasium: states and pixels, and data recorded from it."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import saferl
from saferl.data import load_dataset, save_dataset
from saferl.envs import dmc
from saferl.errors import SaferlError
from saferl.registry import make_env

try:
    dmc._suite(pixels=False)
except SaferlError:
    pytest.skip("needs dm_control", allow_module_level=True)


@pytest.fixture(scope="module")
def pixels():
    """A walker seen at 64 pixels, rendered fast; one for all tests, as a context costs seconds."""
    env = dmc.DMControlEnv("walker", "walk", 64, shadows=False)
    try:
        env.reset(seed=0)
    except SaferlError:
        pytest.skip("cannot render here")
    yield env
    env.close()


def test_every_listed_task_exists():
    tasks = dmc._suite(pixels=False).ALL_TASKS
    assert {(name.rpartition("-")[0], name.rpartition("-")[2]) for name in dmc.TASKS} <= set(tasks)
    with pytest.raises(SaferlError, match="no task walker-fly"):
        dmc.DMControlEnv("walker", "fly")
    with pytest.raises(SaferlError, match="action_repeat must be 1 or more"):
        dmc.DMControlEnv("walker", "walk", action_repeat=0)


@pytest.mark.filterwarnings("ignore:.*infinity")
def test_states():
    env = make_env("dmc/walker-walk-v0")
    check_env(env.unwrapped, skip_render_check=True)
    first, _ = env.reset(seed=3)
    assert first.shape == (24,) and env.action_space.shape == (6,)
    action = np.full(6, 0.3, np.float32)
    path = [env.step(action) for _ in range(5)]
    np.testing.assert_array_equal(env.reset(seed=3)[0], first)
    np.testing.assert_array_equal(env.step(action)[0], path[0][0])
    # Two control steps whose rewards are summed.
    raw = dmc._suite(pixels=False).load("walker", "walk", task_kwargs={"random": 0})
    raw.task._random = np.random.RandomState(3)
    raw.reset()
    for observation, reward, *_ in path:
        steps = [raw.step(action) for _ in range(2)]
        assert reward == pytest.approx(sum(step.reward for step in steps))
        now = np.concatenate([np.ravel(part) for part in steps[1].observation.values()])
        np.testing.assert_allclose(observation, now)
    env.close()


def test_an_episode_is_cut_off_after_1000_control_steps():
    env = make_env("dmc/cartpole-swingup-v0")
    env.reset(seed=0)
    steps = [env.step(env.action_space.sample())[1:4] for _ in range(500)]
    assert [ended for _, *ended in steps] == [[False, False]] * 499 + [[False, True]]
    assert 0 <= sum(reward for reward, *_ in steps) <= 1000
    env.close()


def test_pixels_are_stacked_frames(pixels):
    env = pixels
    first, _ = env.reset(seed=1)
    assert first.shape == (9, 64, 64) and first.dtype == np.uint8
    assert env.observation_space.contains(first) and 20 < first.mean() < 200
    np.testing.assert_array_equal(first[:3], first[6:])  # repeated at the start
    second = env.step(np.ones(6, np.float32))[0]
    np.testing.assert_array_equal(second[:6], first[3:])
    assert (second[6:] != first[6:]).any()
    np.testing.assert_array_equal(second[6:].transpose(1, 2, 0), env._frame(64))
    assert (first[6:] == env.reset(seed=1)[0][6:]).mean() > 0.99


class Short:
    """The first steps of an episode."""

    def __init__(self, env, steps):
        self.env, self.steps, self.unwrapped = env, steps, env
        self.action_space, self.observation_space = env.action_space, env.observation_space

    def reset(self, seed=None):
        self.left = self.steps
        return self.env.reset(seed=seed)

    def step(self, action):
        self.left -= 1
        observation, reward, terminated, _, info = self.env.step(action)
        return observation, reward, terminated, self.left == 0, info

    def close(self):
        pass


def test_recorded_data_are_v_d4rl_files_and_train(pixels, tmp_path):
    data = dmc.record(lambda: Short(pixels, 7), episodes=3, seed=4)
    assert len(data) == 21 and data.observations.frames.shape == (24, 3, 64, 64)
    assert data.timeouts.nonzero()[0].tolist() == [6, 13, 20] and not data.terminals.any()
    assert "not V-D4RL data" in data.card.origin and "without shadows" in data.card.notes[0]
    env = Short(pixels, 7)
    observation, _ = env.reset(seed=5)  # the second episode, played again
    for row in range(7, 14):
        assert (data.observations[row] == observation).mean() > 0.99
        observation, reward, *_ = env.step(data.actions[row])
        assert data.rewards[row] == pytest.approx(reward)
        assert (data.next_observations[row] == observation).mean() > 0.99
    folder = save_dataset(data, tmp_path / "walker_walk" / "random")
    again = load_dataset(folder)
    assert again.fingerprint == data.fingerprint and again.card == data.card

    small = {"hidden": [16], "channels": [4, 4, 4, 4], "strides": [2, 2, 2, 2], "batch_size": 4}
    run = saferl.train(
        "drq_bc", again, env=lambda: Short(pixels, 7), steps=3, members=1, eval_interval=0,
        eval_episodes=1, out=tmp_path / "run", settings=small, progress=False,
    )  # fmt: skip
    assert run.evaluation.lengths.tolist() == [7]
    cloned = dmc.record(lambda: Short(pixels, 7), 1, run.policy(), seed=10_000)
    assert cloned.rewards.sum() == pytest.approx(run.evaluation.returns[0], rel=1e-4)

    own = load_dataset(save_dataset(cloned, tmp_path / "walker_walk" / "cloned"))
    settings = small | {"inner_steps": 2, "random_steps": 3, "offline_share": 0.5}
    run = saferl.train(
        "moorl", own, env=lambda: Short(pixels, 7), steps=9, members=1, eval_interval=0,
        eval_episodes=1, out=tmp_path / "moorl", settings=settings, progress=False,
    )  # fmt: skip
    assert run.agent.updates == 6
    mine = saferl.gathered(run.path)
    assert len(mine) == 9 and mine.observations.frames.shape[1:] == (3, 64, 64)


def test_record_wants_pixels():
    with pytest.raises(SaferlError, match="record is for pixels"):
        dmc.record("dmc/walker-walk-v0", 1)
    with pytest.raises(SaferlError, match="episodes must be 1 or more"):
        dmc.record("dmc/walker-walk-v0", 0)


@pytest.mark.parametrize(
    ("setup", "message"),
    [
        ("import sys; sys.modules['dm_control'] = None", 'pip install "saferl[dmc]"'),
        ("import saferl.envs.dmc as d; d.find_library = lambda name: None", "install libegl1"),
        ("import os; os.environ['MUJOCO_GL'] = 'nonsense'", "try MUJOCO_GL=egl or osmesa"),
    ],
)
def test_what_is_missing_is_told(setup, message):
    code = (
        "import os\n"
        "for name in ('MUJOCO_GL', 'DISPLAY', 'WAYLAND_DISPLAY'): os.environ.pop(name, None)\n"
        f"{setup}\n"
        "from saferl.registry import make_env\n"
        "make_env('dmc/walker-walk-pixels-v0')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert message in result.stderr.splitlines()[-1], result.stderr
