"""Small problems with known answers: stitching, conservatism, and learning online."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch

from saferl.agents.base import Agent
from saferl.data import Dataset
from saferl.data.buffer import ReplayBuffer
from saferl.registry import agent_class
from saferl.spec import Spec
from saferl.training.engine import Engine, OnlineEngine

SEEDS = (0, 1, 2)
HORIZON = 20
STEP = 0.2


def move(x: np.ndarray, action: np.ndarray) -> np.ndarray:
    """A corridor [0, 1]: walls on the left, the goal at 1."""
    return np.clip(x + STEP * action, 0, 1)


def corridor(discrete: bool, episodes: int = 60) -> Dataset:
    """Each episode covers one half well and the other badly, and none goes from 0 to the goal.

    "Starters" run from 0 to the middle and then dither backwards; "finishers" start in the middle
    or before it, run to the goal from there, but backwards in the first half. Most actions logged
    in the first half lead away from the goal, so cloning stays at the wall; both halves together
    show a way of 5 steps.
    """
    rng = np.random.default_rng(0)
    rows = []
    for episode in range(episodes):
        starter = episode % 2 == 0
        x = 0.0 if starter else rng.uniform(0.2, 0.8)
        for t in range(HORIZON):
            good = (x < 0.5) == starter
            if discrete:
                action = int(good)
                effect = 2 * action - 1
            else:
                action = effect = np.clip((0.9 if good else -0.9) + 0.1 * rng.normal(), -1, 1)
            following = move(x, effect)
            goal = following >= 1
            rows.append((x, action, 10.0 * goal, goal, t == HORIZON - 1 and not goal, following))
            x = following
            if goal:
                break
    x, action, reward, terminal, timeout, following = (np.array(c) for c in zip(*rows))
    kind = {"n_actions": 2} if discrete else {"action_low": (-1.0,), "action_high": (1.0,)}
    return Dataset.from_arrays(
        x[:, None], action if discrete else action[:, None], reward, terminal, timeout,
        following[:, None], id="corridor", **kind,
    )  # fmt: skip


def train(name: str, dataset: Dataset, updates: int, **settings) -> Agent:
    cls = agent_class(name)
    config = cls.make_config({"hidden": [32, 32], "batch_size": 64, "discount": 0.9} | settings)
    spec = Spec.from_dataset(dataset, config)
    agent = cls(spec, config, SEEDS)
    Engine(agent, ReplayBuffer.from_dataset(dataset, spec, SEEDS)).run(updates)
    return agent


def steps_to_goal(agent: Agent) -> np.ndarray:
    """Steps from 0 to the goal for each member; the horizon if it is not reached."""
    policy = agent.policy()
    x, steps = np.zeros(len(SEEDS)), np.full(len(SEEDS), HORIZON)
    for t in range(HORIZON):
        rows = torch.from_numpy(x.astype(np.float32))[:, None, None]
        actions = policy(rows)[:, 0].numpy()
        x = move(x, 2 * actions - 1 if agent.discrete else actions[:, 0])
        steps = np.where(x >= 1, np.minimum(steps, t + 1), steps)
    return steps


STITCHERS = {
    "td3_bc": (800, {"alpha": 10.0, "actor_lr": 1e-3, "critic_lr": 1e-3, "tau": 0.02}),
    "iql": (800, {"beta": 10.0, "expectile": 0.9, "actor_lr": 1e-3, "critic_lr": 1e-3,
                  "value_lr": 1e-3, "tau": 0.02}),
    "cql": (800, {"critic_hidden": [32, 32], "weight": 0.3, "samples": 4, "actor_lr": 1e-3,
                  "critic_lr": 1e-3, "temperature_lr": 1e-3, "tau": 0.02}),
    "discrete_cql": (800, {"weight": 0.1, "lr": 1e-3, "tau": 0.02}),
}  # fmt: skip


@pytest.mark.parametrize("name", STITCHERS)
def test_offline_agents_stitch_where_cloning_cannot(name):
    dataset = corridor(agent_class(name).discrete)
    updates, settings = STITCHERS[name]
    learned = steps_to_goal(train(name, dataset, updates, **settings))
    assert (learned <= 7).all(), learned
    clone = "discrete_bc" if agent_class(name).discrete else "bc"
    cloned = steps_to_goal(train(clone, dataset, 300, lr=3e-3))
    assert (cloned == HORIZON).all(), cloned
