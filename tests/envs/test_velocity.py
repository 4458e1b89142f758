"""The velocity tasks: physics, cost, horizon, registration."""

from __future__ import annotations

import pickle
import subprocess
import sys

import gymnasium
import mujoco
import numpy as np
import pytest

import saferl.envs
from saferl.errors import SaferlError

# Speed limits (m/s) and whether the speed is taken in the plane, written out a second time here.
TASKS = {
    "Hopper": (0.7402, False),
    "HalfCheetah": (3.2096, False),
    "Walker2d": (2.3415, False),
    "Ant": (2.6222, True),
    "Swimmer": (0.2282, False),
    "Humanoid": (1.4149, True),
}

# Reward sum, x position, first observation entry and sum of absolute observation entries after 60
# steps of the actions below, as mujoco 3.3.7 gives them (3.2.7 agrees to 1e-8, 3.5.0 does not).
GOLDEN = {
    "Hopper": (-6.89825971656459, -0.20563617971799497, 1.0208310248899364, 21.172677022520773),
    "HalfCheetah": (-16.569475503987046, -0.5756810792965695, -0.115824280651904, 5.76594313427041),
    "Walker2d": (-21.480160366187523, -0.4581110254741228, 0.8325870574328731, 53.9578097865347),
    "Ant": (48.72161655294037, 0.9719495312140043, 0.6429609680507713, 24.681735151753916),
}


@pytest.mark.parametrize("robot", GOLDEN)
def test_golden_trajectory(robot):
    # Unhealthy postures go on, so that 60 steps with contacts are compared for every robot.
    options = {} if robot == "HalfCheetah" else {"terminate_when_unhealthy": False}
    env = gymnasium.make(f"saferl/{robot}Velocity-v0", **options)
    env.reset(seed=0)
    joints, total = np.arange(env.action_space.shape[0]), 0.0
    for step in range(60):
        action = 0.5 * np.sin(0.3 * step + joints).astype(np.float32)
        observation, reward, _, _, info = env.step(action)
        total += reward
    result = (total, info["x_position"], observation[0], np.abs(observation).sum())
    np.testing.assert_allclose(
        result,
        GOLDEN[robot],
        rtol=1e-6,
        err_msg=f"mujoco {mujoco.__version__} moves {robot} differently from the 3.3.7 that D4RL "
        "scores and saferl's bundled data stand on: keep the mujoco pin of pyproject.toml",
    )


@pytest.mark.parametrize("robot", TASKS)
def test_cost_is_the_definition(robot):
    threshold, planar = TASKS[robot]
    env = gymnasium.make(f"saferl/{robot}Velocity-v0")
    env.action_space.seed(1)
    env.reset(seed=1)
    body = env.unwrapped
    assert body.velocity_threshold == threshold

    def position():
        if robot == "Humanoid":  # the centre of mass
            return np.average(body.data.xipos[:, :2], axis=0, weights=body.model.body_mass)
        if robot == "Ant":  # the torso, where the last forward pass saw it
            return body.data.body("torso").xpos[:2].copy()
        return body.data.qpos[:2].copy()

    expected, costs = [], []
    for step in range(200):
        if step % 10 == 0:  # a push: forwards and backwards, or for planar speeds sideways and none
            push = 2 * threshold * (step % 20 == 0)
            velocity = np.zeros_like(body.data.qvel)
            velocity[: body.model.nv] = 0.0
            velocity[1 if planar else 0] = push if planar else push - threshold
            body.set_state(body.init_qpos, velocity)
        before = position()
        info = env.step(env.action_space.sample())[4]
        velocity = (position() - before) / body.dt
        speed = np.hypot(*velocity) if planar else velocity[0]
        assert abs(speed - threshold) > 1e-9  # no comparison hangs on rounding
        expected.append(float(speed > threshold))
        costs.append(info["cost"])
    assert costs == expected
    assert {0.0, 1.0} == set(costs) and all(type(cost) is float for cost in costs)


def test_same_physics_and_reward_as_gymnasium_v4():
    ours = gymnasium.make("saferl/HalfCheetahVelocity-v0")
    with pytest.warns(DeprecationWarning, match="out of date"):
        theirs = gymnasium.make("HalfCheetah-v4")
    np.testing.assert_array_equal(ours.reset(seed=3)[0], theirs.reset(seed=3)[0])
    ours.action_space.seed(3)
    for _ in range(50):
        action = ours.action_space.sample()
        left, right = ours.step(action), theirs.step(action)
        np.testing.assert_array_equal(left[0], right[0])
        assert left[1:4] == right[1:4]


def test_episode_is_truncated_after_1000_steps():
    env = gymnasium.make("saferl/HalfCheetahVelocity-v0")
    env.reset(seed=0)
    action = np.zeros(env.action_space.shape, np.float32)
    ends = [env.step(action)[2:4] for _ in range(1000)]
    assert ends == [(False, False)] * 999 + [(False, True)]


def test_threshold_can_be_chosen_and_survives_pickling():
    env = gymnasium.make("saferl/SwimmerVelocity-v0", velocity_threshold=9.0).unwrapped
    again = pickle.loads(pickle.dumps(env))
    assert (env.velocity_threshold, again.velocity_threshold) == (9.0, 9.0)
    for wrong in (-1.0, float("nan")):
        with pytest.raises(SaferlError, match="speed in m/s of 0 or more"):
            gymnasium.make("saferl/SwimmerVelocity-v0", velocity_threshold=wrong)


FROM_ELSEWHERE = {
    "import": "import gymnasium, saferl.envs",
    "module prefix": "import gymnasium; gymnasium.make('saferl.envs:saferl/HopperVelocity-v0')",
    "entry point": "import gymnasium; from importlib.metadata import entry_points; "
    "[entry.load()() for entry in entry_points(group='gymnasium.envs', name='saferl')]",
}


@pytest.mark.parametrize("way", FROM_ELSEWHERE)
def test_registration_is_found_from_another_folder(way, tmp_path):
    names = ", ".join(f"'saferl/{robot}Velocity-v0'" for robot in TASKS)
    code = (
        f"{FROM_ELSEWHERE[way]}; import sys; "
        f"assert {way == 'module prefix'} or 'mujoco' not in sys.modules; "
        f"assert all(gymnasium.spec(name).max_episode_steps == 1000 for name in [{names}])"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_registering_twice_changes_nothing():
    before = dict(gymnasium.registry)
    saferl.envs.register_envs()
    assert gymnasium.registry == before
