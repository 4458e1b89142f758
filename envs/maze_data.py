"""PointMaze datasets by D4RL's recipe: a planner goes from random cell to random cell.

``load_dataset("saferl/pointmaze-{umaze,medium,large}-{planner,noisy}-v0")``: the ball is started
once and then sent to one uniformly drawn cell after the other, along the shortest path, by a
proportional-derivative controller on the way-points (D4RL's ``waypoint_controller``). In ``noisy``
data the controller's actions get Gaussian noise of standard deviation 0.5, D4RL's ``--noisy``. The
data so hold pieces of paths to the goal of evaluation, seldom a whole one: the test is to stitch.
"""

from __future__ import annotations

import sys
import zlib
from collections import deque
from typing import Any

import numpy as np

from saferl.data import Card, Dataset
from saferl.data.sources.d4rl import card as d4rl_card
from saferl.errors import unknown

from .generated import SIZE, generated, show, whole
from .mazes import POINT_HORIZONS, PointMazeEnv

NOISE = {"planner": 0.0, "noisy": 0.5}  # standard deviation, of actions in [-1, 1]
GAIN, DAMPING = 10.0, 1.0  # on the distance to the way-point, and on the velocity
NEAR = 0.1  # from a way-point or the target, metres: on to the next
_IDS = {
    f"pointmaze-{size.lower()}-{kind}-v0": (size, kind) for size in POINT_HORIZONS for kind in NOISE
}


def ids() -> list[str]:
    """Names of the datasets, without their ``saferl/``."""
    return list(_IDS)


class Planner:
    """Shortest paths over free cells, and the controller that follows them.

    ``send(position, cell)`` plans, ``act(position, velocity)`` returns the action, within ±1
    before noise, and whether the ball is at its target.
    """

    def __init__(self, walls: np.ndarray, random: np.random.Generator):
        self.walls, self.random = walls, random
        self.waypoints: list[np.ndarray] = []

    def send(self, position: np.ndarray, target: tuple[int, int]) -> None:
        row, column = np.floor(position + PointMazeEnv.OFFSET + 0.5).astype(int)
        path = shortest_path(self.walls, (int(row), int(column)), target)
        # Way-points lie between the middle of a cell and its coordinates, the target on these.
        self.waypoints = [cell - self.random.uniform(0, 0.2, 2) for cell in np.array(path[:-1])]
        self.waypoints.append(np.array(target, np.float64))

    def act(self, position: np.ndarray, velocity: np.ndarray) -> tuple[np.ndarray, bool]:
        toward = self.waypoints[0] - position
        near = bool(np.linalg.norm(toward) < NEAR)
        arrived = near and len(self.waypoints) == 1
        if near and not arrived:
            self.waypoints.pop(0)
        return np.clip(GAIN * toward - DAMPING * velocity, -1.0, 1.0), arrived


def shortest_path(
    walls: np.ndarray, start: tuple[int, int], target: tuple[int, int]
) -> list[tuple[int, int]]:
    """Cells after ``start`` up to ``target``, by breadth-first search; the target if it is both."""
    before, queue = {target: target}, deque([target])
    while start not in before:
        row, column = here = queue.popleft()
        for cell in ((row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)):
            if not walls[cell] and cell not in before:
                before[cell] = here
                queue.append(cell)
    path = [before[start]]
    while path[-1] != target:
        path.append(before[path[-1]])
    return path


def load(
    name: str,
    size: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
    *,
    clip_actions: bool = False,
    **overrides: Any,
) -> Dataset:
    """A PointMaze dataset, generated on first use (100 000 rows in about 10 s) and then cached.

    The rewards are those of the environment that the card names: 1 where the step ends within 0.5
    of its one goal. Nothing is terminal; an arrival at a target, or as many steps as an episode of
    the evaluation has, is a timeout, after which the ball goes on from where it is.

    Args:
        name: ``pointmaze-{umaze,medium,large}-{planner,noisy}-v0``.
        size: number of transitions, 100 000 by default (D4RL's files have 1, 2 and 4 million).
        seed: 0 or more; the same arguments give the same data on one machine.
        progress: show a bar while generating; by default if standard error is a terminal.
        clip_actions: without effect here. overrides: fields of the `Card` to replace.

    Raises:
        SaferlError: an unknown name or card field, a size below 1, no gymnasium-robotics, or a
            cache folder that cannot be written.
    """
    if name not in _IDS:
        raise unknown("saferl dataset", name, ids())
    size = SIZE if size is None else whole("size", size, 1)
    seed = whole("seed", seed, 0)
    maze, kind = _IDS[name]
    facts = d4rl_card(f"maze2d-{maze.lower()}-v1")
    card = Card(
        id=f"saferl/{name}",
        env_id=f"saferl/PointMaze-{maze}-v0",
        action_low=(-1.0, -1.0),
        action_high=(1.0, 1.0),
        horizon=POINT_HORIZONS[maze],
        reference_returns=facts.reference_returns,
        reference_source="D4RL",
        licence="Apache-2.0",
        origin="generated by saferl with a way-point planner, after D4RL's recipe; not D4RL data",
        notes=(
            "scores use D4RL's reference returns, but published D4RL scores are not comparable: "
            "the data differ",
            "one long path through random targets; timeouts mark arrivals, and the last row",
            f"noise on the planner's actions: standard deviation {NOISE[kind]:g}",
        ),
    )
    changed = card.replace(**overrides)
    recipe = {"name": name, "size": size, "seed": seed, "noise": NOISE[kind], "version": 1}
    dataset = generated(recipe, card, lambda: _generate(maze, recipe, show(progress)))
    return dataset if changed == card else dataset.with_card(**overrides)


def _generate(maze: str, recipe: dict[str, Any], progress: bool) -> dict[str, Any]:
    """Arrays of `Dataset` for a recipe."""
    from tqdm import trange

    name, size, noise = recipe["name"], recipe["size"], recipe["noise"]
    env, horizon = PointMazeEnv(maze), POINT_HORIZONS[maze]
    random = np.random.default_rng([zlib.crc32(name.encode()), recipe["seed"]])
    planner = Planner(env.walls, random)
    cells = [(int(row), int(column)) for row, column in env.cells]
    if progress:
        print(f"making {name}: {size} transitions, kept for the next time", file=sys.stderr)
    observations = np.empty((size + 1, 4), np.float32)
    actions = np.empty((size, 2), np.float32)
    rewards, timeouts = np.zeros(size, np.float32), np.zeros(size, bool)
    try:
        now, _ = env.reset(seed=int(random.integers(2**31)))
        observations[0], steps = now, 0
        for row in trange(size, desc="collecting", unit="step", disable=not progress):
            if steps == 0:
                planner.send(now[:2], cells[random.integers(len(cells))])
            action, arrived = planner.act(now[:2], now[2:])
            if noise:
                action = action + noise * random.standard_normal(2)
            actions[row] = np.clip(action, -1.0, 1.0)
            now, rewards[row], *_ = env.step(actions[row])
            observations[row + 1] = now
            steps += 1
            if arrived or steps == horizon:
                timeouts[row], steps = True, 0
    finally:
        env.close()
    timeouts[-1] = True
    return {
        "observations": observations[:-1],
        "actions": actions,
        "rewards": rewards,
        "costs": None,
        "next_observations": observations[1:],
        "terminals": np.zeros(size, bool),
        "timeouts": timeouts,
    }
