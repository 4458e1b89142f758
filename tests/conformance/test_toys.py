"""Small problems with known answers: stitching, conservatism, and learning online."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch

from saferl.agents.shared.agent import Agent
from saferl.data import Dataset
from saferl.registry import agent_class
from saferl.replay import ReplayBuffer
from saferl.rollout import VectorEnv
from saferl.spec import Spec
from saferl.training.engine import Engine
from saferl.training.online import OnlineEngine

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
    spec = dataset.spec(config)
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


FAST = {"actor_lr": 3e-3, "critic_lr": 3e-3, "tau": 0.05}
STITCHERS = {
    "td3_bc": FAST | {"alpha": 10.0},
    "iql": FAST | {"value_lr": 3e-3, "expectile": 0.9, "beta": 10.0},
    "cql": FAST | {"temperature_lr": 3e-3, "critic_hidden": [32, 32], "weight": 0.3, "samples": 4},
    "a2pr": FAST
    | {"value_lr": 3e-3, "critic_hidden": [32, 32], "value_hidden": [32, 32]}
    | {"vae_hidden": [32, 32]},
    "discrete_cql": {"lr": 3e-3, "tau": 0.05, "weight": 0.05},
}


@pytest.fixture(scope="module")
def cloned() -> dict[bool, np.ndarray]:
    """What cloning does, by whether actions are discrete."""
    return {
        discrete: steps_to_goal(
            train("discrete_bc" if discrete else "bc", corridor(discrete), 200, lr=3e-3)
        )
        for discrete in (False, True)
    }


@pytest.mark.parametrize("name", STITCHERS)
def test_offline_agents_stitch_where_cloning_cannot(name, cloned):
    discrete = agent_class(name).discrete
    learned = steps_to_goal(train(name, corridor(discrete), 400, **STITCHERS[name]))
    assert (learned <= 7).all(), learned
    assert (cloned[discrete] == HORIZON).all(), cloned


def narrow() -> Dataset:
    """A single decision whose reward grows with the action, logged around 0.3 alone."""
    rng = np.random.default_rng(0)
    action = np.clip(rng.normal(0.3, 0.1, (400, 1)), -1, 1)
    state = np.zeros((400, 1))
    return Dataset.from_arrays(
        state, action, 2 * action[:, 0], np.ones(400, bool), np.zeros(400, bool), state,
        action_low=(-1.0,), action_high=(1.0,), id="narrow",
    )  # fmt: skip


def test_cql_values_actions_outside_the_data_below_those_inside():
    """Without the penalty the critic extrapolates the reward's slope to the largest action."""

    def values(weight: float) -> np.ndarray:
        agent = train("cql", narrow(), 150, **STITCHERS["cql"] | {"weight": weight})
        actions = (
            torch.tensor([-0.9, -0.3, 0.3, 0.9]).view(1, 1, -1, 1).expand(len(SEEDS), -1, -1, -1)
        )
        with torch.no_grad():
            return agent.critic.many(torch.zeros(len(SEEDS), 1, 1), actions)[:, :, 0].numpy()

    far_below, below, logged, above = np.moveaxis(values(5.0), -1, 0)
    assert (far_below < logged - 1).all()
    assert (below < logged - 0.5).all()
    assert (above < logged - 0.5).all()
    *_, logged, above = np.moveaxis(values(0.0), -1, 0)
    assert (above > logged + 0.5).all()


def test_discrete_cql_keeps_to_logged_actions():
    """Action 0 is never logged; the penalty puts its value below that of action 1."""
    rng = np.random.default_rng(0)
    state = rng.normal(size=(200, 1))
    dataset = Dataset.from_arrays(
        state, np.ones(200, np.int64), np.full(200, -1.0), np.ones(200, bool), np.zeros(200, bool),
        state, n_actions=2, id="narrow",
    )  # fmt: skip

    def chosen(weight: float) -> float:
        agent = train(
            "discrete_cql", dataset, 200, **STITCHERS["discrete_cql"] | {"weight": weight}
        )
        rows = torch.linspace(-1, 1, 21).view(1, -1, 1).expand(len(SEEDS), -1, -1)
        return agent.policy()(rows).float().mean().item()

    assert chosen(1.0) == 1
    assert chosen(0.0) < 0.2  # an unseen action keeps a value near 0, above the logged -1


class Point(gymnasium.Env):
    """A point on a line: the action moves it, and the reward is minus its distance from 0."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float64)
    action_space = gymnasium.spaces.Box(-2.0, 2.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.t = float(self.np_random.uniform(-1, 1)), 0
        return np.array([self.x]), {}

    def step(self, action):
        self.x = float(np.clip(self.x + 0.1 * action[0], -2, 2))
        self.t += 1
        return np.array([self.x]), -abs(self.x), False, self.t >= 20, {"cost": 0.0}


def test_sac_learns_online():
    cls = agent_class("sac")
    rates = {"actor_lr": 3e-3, "critic_lr": 3e-3, "temperature_lr": 3e-3, "tau": 0.02}
    config = cls.make_config(
        {"hidden": [32, 32], "batch_size": 64, "discount": 0.9, "random_steps": 100} | rates
    )
    agent = cls(Spec.from_spaces(Point.observation_space, Point.action_space), config, SEEDS)
    engine = OnlineEngine(agent, VectorEnv(Point, len(SEEDS), None), 1000)
    engine.run(500)
    engine.close()
    policy = agent.policy()
    x, returns = torch.linspace(-1, 1, 9).repeat(len(SEEDS), 1), torch.zeros(len(SEEDS), 9)
    for _ in range(20):
        x = (x + 0.1 * policy(x[..., None])[..., 0]).clamp(-2, 2)
        returns -= x.abs()
    # Standing still earns -11 on average over these starts; the best policy -1.1.
    assert (returns.mean(-1) > -2).all(), returns.mean(-1)
