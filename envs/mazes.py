"""Sparse mazes with D4RL's observations, goals and episodes, in gymnasium-robotics' simulator.

``saferl/PointMaze-{UMaze,Medium,Large}-v0`` (and ``…Dense-v0``) are D4RL's maze2d-…-v1 (Fu et al.,
2020, arXiv:2004.07219), ``saferl/AntMaze-{UMaze,Medium,Large}-v0`` its antmaze-…-v2.

    observation  point: position [2], velocity [2]; ant: positions [15], velocities [14]
    goal         hidden, in one cell; reward 1 within 0.5 of it, else 0 (dense: exp(-distance))
    start        point: any free cell; ant: the cell farthest from the goal
    end          point: never at the goal; ant: at the goal; both truncated at D4RL's limits

gymnasium-robotics observes dictionaries with the goal in them, centres the maze and turns its axes;
here coordinates are D4RL's, so that policies trained on its files find what they know. Its ant is
gymnasium's, five times as strong, with half the time step: here it gets D4RL's gear, time step and
contact softness. D4RL's mujoco was of 2020, so trajectories agree but not to the last digit.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box

from saferl.errors import SaferlError

RADIUS = 0.5  # from the goal, metres: the reward is 1 and the ant's episode ends
GOALS = {"UMaze": (3, 1), "Medium": (6, 6), "Large": (7, 9)}  # row and column, of the ant
POINT_GOALS = GOALS | {"UMaze": (1, 1)}
POINT_HORIZONS = {"UMaze": 300, "Medium": 600, "Large": 800}
ANT_HORIZONS = {"UMaze": 700, "Medium": 1000, "Large": 1000}


def env_ids() -> dict[str, dict[str, Any]]:
    """Arguments of gymnasium's ``register`` for each id."""
    ids: dict[str, dict[str, Any]] = {}
    for size, horizon in POINT_HORIZONS.items():
        for suffix, dense in (("", False), ("Dense", True)):
            ids[f"saferl/PointMaze-{size}{suffix}-v0"] = {
                "entry_point": "saferl.envs.mazes:PointMazeEnv",
                "kwargs": {"size": size, "dense": dense},
                "max_episode_steps": horizon,
            }
    for size, horizon in ANT_HORIZONS.items():
        ids[f"saferl/AntMaze-{size}-v0"] = {
            "entry_point": "saferl.envs.mazes:AntMazeEnv",
            "kwargs": {"size": size},
            "max_episode_steps": horizon,
        }
    return ids


def _robotics(module: str) -> Any:
    try:
        # On its first import the package prints a notice about other tasks.
        with contextlib.redirect_stderr(io.StringIO()):
            return importlib.import_module(f"gymnasium_robotics.envs.maze.{module}")
    except ImportError as error:
        raise SaferlError(
            f'the mazes need gymnasium-robotics ({error}): pip install "saferl[mazes]"'
        ) from error


def walls(size: str) -> np.ndarray:
    """``[rows, columns]`` bool, true where a cell is wall; ``size`` UMaze, Medium or Large.

    Raises:
        SaferlError: gymnasium-robotics, which holds the maps, is not installed.
    """
    maps = _robotics("maps")
    table = {"UMaze": maps.U_MAZE, "Medium": maps.MEDIUM_MAZE, "Large": maps.LARGE_MAZE}
    return np.array(table[size]) == 1


class _MazeEnv(gymnasium.Env):
    """A body in a maze of gymnasium-robotics, seen in D4RL's coordinates.

    - maze: gymnasium-robotics' environment; body: the one inside it that steps the simulator;
    - offset: what is added to its positions to give D4RL's.
    """

    # Declared by gymnasium as an attribute of the object.
    metadata: dict[str, Any] = {  # noqa: RUF012
        "render_modes": ["human", "rgb_array", "depth_array"],
        "render_fps": 50,
    }

    def __init__(self, maze: Any, body: Any, offset: tuple[float, float]):
        self.maze, self.body, self.offset = maze, body, np.array(offset)
        Path(maze.tmp_xml_file_path).unlink(missing_ok=True)  # read already
        self.render_mode = maze.render_mode
        model = body.model
        self.observation_space = Box(-np.inf, np.inf, (model.nq + model.nv,), np.float64)
        self.action_space = Box(-1.0, 1.0, (model.nu,), np.float32)

    def _begin(self, goal: np.ndarray, positions: np.ndarray, velocities: np.ndarray) -> np.ndarray:
        self.goal = goal
        self.maze.goal = goal - self.offset
        self.maze.update_target_site_pos()
        self.body.reset()
        positions[:2] -= self.offset
        self.body.set_state(positions, velocities)
        return self._observation()

    def _observation(self) -> np.ndarray:
        data = self.body.data
        observation = np.concatenate([data.qpos, data.qvel])
        observation[:2] += self.offset
        return observation

    def _step(self, action: np.ndarray) -> tuple[np.ndarray, float]:
        """The observation and the distance to the goal."""
        self.body.step(np.clip(action, -1.0, 1.0))
        observation = self._observation()
        return observation, float(np.linalg.norm(observation[:2] - self.goal))

    def render(self):
        return self.maze.render()

    def close(self):
        self.maze.close()


class PointMazeEnv(_MazeEnv):
    """A ball pushed through a maze. Cell (row, column) has the coordinates (row, column).

    As in D4RL, whose ball starts 0.2 off, the centre of a cell lies at (row - 0.2, column - 0.2).
    An action is the force on each axis as a share of the largest; a step takes 0.01 s.
    """

    OFFSET = 0.2

    def __init__(self, size: str = "UMaze", dense: bool = False, render_mode: str | None = None):
        self.walls, self.dense = walls(size), dense
        self.target = np.array(POINT_GOALS[size], np.float64)
        self.cells = np.argwhere(~self.walls).astype(np.float64)
        # Turned so that x grows with the row and y with the column.
        maze = _robotics("point_maze").PointMazeEnv(
            np.rot90(self.walls).astype(int).tolist(), render_mode
        )
        rows, columns = self.walls.shape
        shift = 0.5 + self.OFFSET
        super().__init__(maze, maze.point_env, (rows / 2 - shift, columns / 2 - shift))

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        cell = self.cells[self.np_random.integers(len(self.cells))]
        positions = cell + self.np_random.uniform(-0.1, 0.1, 2)
        return self._begin(self.target, positions, 0.1 * self.np_random.standard_normal(2)), {}

    def step(self, action):
        observation, distance = self._step(action)
        near = distance <= RADIUS
        reward = float(np.exp(-distance)) if self.dense else float(near)
        return observation, reward, False, False, {"success": near}


class AntMazeEnv(_MazeEnv):
    """The ant in a maze of cells 4 m wide; the cell it starts in is the origin.

    The goal is drawn anew in its cell at each reset, as in D4RL's v2; a step takes 0.1 s.
    """

    def __init__(self, size: str = "UMaze", render_mode: str | None = None):
        self.cell = 4.0 * (np.array(GOALS[size])[::-1] - 1)  # x by the column, y by the row
        layout = walls(size)
        # Upside down, so that y grows with the row.
        maze = _robotics("ant_maze_v5").AntMazeEnv(
            render_mode, layout[::-1].astype(int).tolist(), include_cfrc_ext_in_observation=False
        )
        rows, columns = layout.shape
        super().__init__(maze, maze.ant_env, (2.0 * columns - 6, 2.0 * rows - 6))
        model = self.body.model
        model.opt.timestep = 0.02
        model.actuator_gear[:, 0] = 30
        model.geom_solimp[:, :3] = 0.8, 0.8, 0.01

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        draw = self.np_random
        goal = self.cell + draw.uniform(0, 1, 2) + draw.uniform(0, 0.5, 2)
        model = self.body.model
        positions = model.qpos0 + draw.uniform(-0.1, 0.1, model.nq)
        positions[:2] = draw.uniform(-0.1, 0.1, 2)
        return self._begin(goal, positions, 0.1 * draw.standard_normal(model.nv)), {}

    def step(self, action):
        observation, distance = self._step(action)
        near = distance <= RADIUS
        return observation, float(near), near, False, {"success": near}
