"""Mazes in D4RL's coordinates, and the datasets of the planner."""

from __future__ import annotations

import sys

import gymnasium
import mujoco
import numpy as np
import pytest

import saferl
from saferl.data import load_dataset
from saferl.data.sources import d4rl
from saferl.errors import SaferlError

try:
    import gymnasium_robotics  # noqa: F401
except ImportError:
    pytest.skip("needs gymnasium-robotics", allow_module_level=True)

from saferl.envs import maze_data, mazes

MEDIUM = ["########", "#OO##OO#", "#OO#OOO#", "##OOO###", "#OO#OOO#", "#O#OO#O#", "#OOO#OG#",
          "########"]  # fmt: skip
SIZES = ["UMaze", "Medium", "Large"]


def d4rl_point_maze(rows: list[str]) -> tuple[mujoco.MjModel, mujoco.MjData]:
    """D4RL's maze2d from its definition: cell (w, h) lies at (w + 1, h + 1), the ball at 1.2."""
    boxes = "".join(
        f'<geom type="box" size="0.5 0.5 0.2" pos="{w + 1} {h + 1} 0"/>'
        for w, row in enumerate(rows)
        for h, tile in enumerate(row)
        if tile == "#"
    )
    model = mujoco.MjModel.from_xml_string(f"""<mujoco>
      <compiler inertiafromgeom="true" angle="radian"/>
      <option timestep="0.01" gravity="0 0 0" iterations="20" integrator="Euler"/>
      <default><joint damping="1" limited="false"/>
        <geom friction=".5 .1 .1" density="1000" margin="0.002" condim="1" contype="2"
              conaffinity="1"/></default>
      <worldbody>
        <geom type="plane" size="40 40 0.25" pos="0 0 -0.1" contype="1" conaffinity="0"/>
        <body pos="1.2 1.2 0"><geom type="sphere" size="0.1" contype="1"/>
          <joint name="x" type="slide" axis="1 0 0"/><joint name="y" type="slide" axis="0 1 0"/>
        </body>{boxes}</worldbody>
      <actuator><motor joint="x" ctrlrange="-1 1" ctrllimited="true" gear="100"/>
        <motor joint="y" ctrlrange="-1 1" ctrllimited="true" gear="100"/></actuator>
    </mujoco>""")
    return model, mujoco.MjData(model)


def test_the_ball_moves_as_in_d4rl():
    env = mazes.PointMazeEnv("Medium")
    model, data = d4rl_point_maze(MEDIUM)
    random, bumps, cells = np.random.default_rng(0), 0, set()
    for episode in range(8):
        now, _ = env.reset(seed=episode)
        mujoco.mj_resetData(model, data)
        data.qpos[:], data.qvel[:] = now[:2], now[2:]
        for step in range(150):
            if step % 40 == 0:
                push = random.uniform(-1, 1, 2)
            now, *_ = env.step(push)
            data.qvel[:] = np.clip(data.qvel, -5, 5)
            data.ctrl[:] = push
            mujoco.mj_step(model, data)
            bumps += data.ncon > 1  # the ground is always touched
            cells.add(tuple(np.round(now[:2]).astype(int)))
        # The walls stand at other places of the world, so the last digits differ.
        np.testing.assert_allclose(now, np.concatenate([data.qpos, data.qvel]), atol=1e-6)
    assert bumps > 200 and len(cells) > 8


@pytest.mark.parametrize("size", SIZES)
def test_coordinates_goals_and_horizons(size):
    env = gymnasium.make(f"saferl/PointMaze-{size}-v0", disable_env_checker=True)
    raw = env.unwrapped
    centres = {
        tuple(np.round(raw.body.model.geom_pos[i, :2] + raw.offset + 0.2).astype(int).tolist())
        for i in range(raw.body.model.ngeom)
        if raw.body.model.geom_type[i] == mujoco.mjtGeom.mjGEOM_BOX
    }
    assert centres == {tuple(cell) for cell in np.argwhere(raw.walls).tolist()}
    assert not raw.walls[tuple(raw.target.astype(int))]
    facts = d4rl.card(f"maze2d-{size.lower()}-v1")
    assert (facts.env_id, facts.horizon) == (env.spec.id, env.spec.max_episode_steps)
    starts = np.array([env.reset(seed=seed)[0] for seed in range(60)])
    assert starts.shape == (60, 4) and env.observation_space.shape == (4,)
    cells = np.round(starts[:, :2]).astype(int)
    assert not raw.walls[tuple(cells.T)].any() and len(np.unique(cells, axis=0)) > 6
    assert np.abs(starts[:, :2] - cells).max() <= 0.1
    np.testing.assert_array_equal(env.reset(seed=5)[0], starts[5])  # whatever was played before

    ant = gymnasium.make(f"saferl/AntMaze-{size}-v0", disable_env_checker=True)
    facts = d4rl.card(f"antmaze-{size.lower()}{'' if size == 'UMaze' else '-play'}-v2")
    assert (facts.env_id, facts.horizon) == (ant.spec.id, ant.spec.max_episode_steps)
    raw = ant.unwrapped
    centres = {
        tuple(np.round((raw.body.model.geom_pos[i, :2] + raw.offset) / 4 + 1).astype(int).tolist())
        for i in range(raw.body.model.ngeom)
        if raw.body.model.geom_type[i] == mujoco.mjtGeom.mjGEOM_BOX
    }
    assert centres == {(column, row) for row, column in np.argwhere(mazes.walls(size)).tolist()}
    env.close(), ant.close()


def test_reward_and_end():
    env = mazes.PointMazeEnv("UMaze")
    dense = mazes.PointMazeEnv("UMaze", dense=True)
    env.reset(seed=0), dense.reset(seed=0)
    for start, reward in ((1.45, 1.0), (1.55, 0.0)):
        for one in (env, dense):
            one.body.set_state(np.array([1.0, start]) - one.offset, np.zeros(2))
        observation, got, terminated, truncated, info = env.step(np.zeros(2))
        np.testing.assert_allclose(observation, [1.0, start, 0, 0], atol=1e-3)
        assert (got, terminated, truncated, info) == (reward, False, False, {"success": got == 1})
        assert dense.step(np.zeros(2))[1] == pytest.approx(np.exp(1 - start), abs=1e-3)

    ant = mazes.AntMazeEnv("UMaze")
    goals = []
    for seed in range(20):
        observation, _ = ant.reset(seed=seed)
        goals.append(ant.goal)
        assert observation.shape == (29,) and np.abs(observation[:2]).max() <= 0.1
    goals = np.array(goals)  # row 3, column 1: two cells up, none across
    assert (goals >= [0, 8]).all() and (goals <= [1.5, 9.5]).all() and goals.std(0).min() > 0.1
    assert not ant.step(np.zeros(8))[2]
    for away, ended in ((0.3, True), (0.8, False)):
        positions = ant.body.data.qpos.copy()
        positions[:2] = ant.goal - ant.offset + [away, 0]
        ant.body.set_state(positions, np.zeros(14))
        _, reward, terminated, _, info = ant.step(np.zeros(8))
        assert (reward, terminated, info["success"]) == (float(ended), ended, ended)


def test_the_ant_is_d4rls():
    env = mazes.AntMazeEnv("UMaze")
    model = env.body.model
    assert env.body.dt == pytest.approx(0.1) and (model.actuator_gear[:, 0] == 30).all()
    assert (model.actuator_ctrlrange == [-1, 1]).all()
    np.testing.assert_allclose(model.geom_solimp[:, :3], [[0.8, 0.8, 0.01]] * model.ngeom)
    np.testing.assert_allclose(model.geom_solref, [[0.02, 1.0]] * model.ngeom)
    # In the order of D4RL's model: hip 4, ankle 4, hip 1 …
    joints = [model.joint(int(i)).name for i in model.actuator_trnid[:, 0]]
    assert joints == [f"{part}_{leg}" for leg in (4, 1, 2, 3) for part in ("hip", "ankle")]
    first = [env.reset(seed=3)[0], *(env.step(np.full(8, 0.5))[0] for _ in range(5))]
    again = [env.reset(seed=3)[0], *(env.step(np.full(8, 0.5))[0] for _ in range(5))]
    np.testing.assert_array_equal(first, again)


def test_without_the_package(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("gymnasium_robotics")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gymnasium_robotics", None)
    with pytest.raises(SaferlError, match=r'pip install "saferl\[mazes\]"'):
        saferl.registry.make_env("saferl/AntMaze-UMaze-v0")
    with pytest.raises(SaferlError, match=r'pip install "saferl\[mazes\]"'):
        load_dataset("saferl/pointmaze-umaze-planner-v0", size=10)


def test_shortest_paths():
    walls = np.array([[tile == "#" for tile in row] for row in MEDIUM])
    path = maze_data.shortest_path(walls, (1, 1), (6, 1))  # round a wall, by the one door
    assert path[1:] == [(2, 2), (3, 2), (4, 2), (4, 1), (5, 1), (6, 1)]
    assert path[0] in ((1, 2), (2, 1))
    assert len(maze_data.shortest_path(walls, (1, 1), (6, 6))) == 10
    assert maze_data.shortest_path(walls, (2, 2), (2, 2)) == [(2, 2)]


@pytest.mark.parametrize("kind", ["planner", "noisy"])
def test_planner_data(kind, monkeypatch):
    name = f"saferl/pointmaze-medium-{kind}-v0"
    data = load_dataset(name, size=6000)
    assert len(data) == 6000 and not data.problems and data.costs is None
    assert not data.terminals.any() and data.timeouts[-1]
    # One path: a row begins where the last ended, also after an arrival.
    np.testing.assert_array_equal(data.next_observations[:-1], data.observations[1:])
    near = np.linalg.norm(data.next_observations[:, :2] - [6, 6], axis=1) <= 0.5
    np.testing.assert_array_equal(data.rewards, near)
    assert 0 < near.mean() < 0.2
    # The controller arrives at every target, long before an episode's limit.
    arrivals = data.episodes[:-1, 1] - 1
    at = data.observations[arrivals, :2]
    assert np.linalg.norm(at - np.round(at), axis=1).max() < 0.1
    assert len(arrivals) > 20 and data.episode_lengths().max() < 450
    assert len(np.unique(np.round(at), axis=0)) > 12  # free cells: 26
    assert np.abs(data.actions).max() <= 1

    env = mazes.PointMazeEnv("Medium")
    env.reset(seed=0)
    for row in range(0, 6000, 200):
        state = data.observations[row].astype(np.float64)
        env.body.set_state(state[:2] - env.offset, state[2:])
        following, *_ = env.step(data.actions[row])
        np.testing.assert_allclose(following, data.next_observations[row], atol=1e-3)

    def refuse(*_):
        raise AssertionError("generated again")

    other = load_dataset(name, size=3000)
    np.testing.assert_array_equal(other.actions, data.actions[:3000])
    assert load_dataset(name, size=3000, seed=1).fingerprint != other.fingerprint
    monkeypatch.setattr(maze_data, "_generate", refuse)
    assert load_dataset(name, size=6000).fingerprint == data.fingerprint
    assert load_dataset(name, size=6000, horizon=50).card.horizon == 50
    assert data.normalised_score(277.39) == 100


def test_errors():
    with pytest.raises(SaferlError, match="pointmaze-umaze-noisy-v0"):
        load_dataset("saferl/pointmaze-umaze-noise-v0")
    with pytest.raises(SaferlError, match="whole number of 1 or more"):
        load_dataset("saferl/pointmaze-umaze-noisy-v0", size=0)


@pytest.mark.parametrize("agent", ["bc", "iql"])
def test_agents_train_and_are_evaluated(agent, tmp_path):
    data = load_dataset("saferl/pointmaze-umaze-planner-v0", size=2000)
    quick = {"settings": {"hidden": [16], "batch_size": 32}, "eval_interval": 0, "progress": False}
    run = saferl.train(agent, data, steps=30, members=2, eval_episodes=2, out=tmp_path, **quick)
    assert run.evaluation.lengths.tolist() == [300] * 4  # no episode ends at the goal
    assert run.evaluation.costs is None
