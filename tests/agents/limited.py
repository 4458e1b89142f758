"""What the tests of agents under a cost limit share: small agents, toys, and what reaches what."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from saferl.data import Dataset
from saferl.replay import Batch, ReplayBuffer
from saferl.spec import Spec
from saferl.training.engine import Engine

from .reference import MEMBERS, OBS, A, B, make_batch

T = 20  # steps of an episode


def make(cls, members=MEMBERS, horizon: int = T, **settings):
    """A small agent; ``settings`` are its configuration."""
    spec = Spec(OBS, A, False, (-1.0,) * A, (1.0,) * A, horizon=horizon)
    return cls(spec, cls.make_config({"hidden": [8, 8]} | settings), members)


def costly(agent, seed: int = 0, rows: int = B) -> Batch:
    return make_batch(agent, seed, rows, costs=True)


def bare(dataset: Dataset) -> Dataset:
    """Without costs."""
    return Dataset(**dataset._arrays() | {"costs": None}, card=dataset.card)


def gradients(agent) -> dict[str, list[Tensor]]:
    """The last update's gradients, by network and its first part (or free parameter)."""
    found: dict[str, list[Tensor]] = {}
    for name, value in vars(agent).items():
        if isinstance(value, nn.Parameter):
            if value.grad is not None:
                found[name] = [value.grad]
        elif isinstance(value, nn.Module):
            for key, parameter in value.named_parameters():
                if parameter.grad is not None:
                    found.setdefault(f"{name}.{key.split('.')[0]}", []).append(parameter.grad)
    return found


def differing(one, two) -> set[str]:
    """Parts whose last gradients differ between two agents."""
    mine, theirs = gradients(one), gradients(two)
    assert mine.keys() == theirs.keys()
    return {k for k in mine if any(not torch.equal(a, b) for a, b in zip(mine[k], theirs[k]))}


def ends(cls) -> tuple[Batch, Batch]:
    """For both members, the rows of `walk` that end in a terminal, and those that time out."""
    dataset = walk()
    spec = dataset.spec(cls.Config())
    buffer = ReplayBuffer.from_dataset(dataset, spec, MEMBERS)
    return tuple(
        buffer.gather(torch.from_numpy(np.flatnonzero(flags)).expand(len(MEMBERS), -1))
        for flags in (dataset.terminals, dataset.timeouts)
    )


def walk(episodes: int = 8) -> Dataset:
    """Random rows in episodes of four steps, which end in a terminal and in a time-out in turn."""
    rng = np.random.default_rng(0)
    n = 4 * episodes
    last = np.arange(n) % 4 == 3
    odd = np.arange(n) // 4 % 2 == 1
    return Dataset.from_arrays(
        rng.normal(size=(n, OBS)), rng.uniform(-1, 1, (n, A)), rng.normal(size=n), last & odd,
        last & ~odd, rng.normal(size=(n, OBS)), costs=rng.random(n), horizon=4, id="walk",
        action_low=(-1.0,) * A, action_high=(1.0,) * A,
    )  # fmt: skip


def elsewhere(batch: Batch) -> Batch:
    """The same transitions with other successors."""
    return batch._replace(next_observations=batch.next_observations + 1)


def toy(episodes: int = 120, reward=lambda a: (a + 1) / 2, low: float = -1.0) -> Dataset:
    """Ten steps, each paying (a + 1) / 2 and costing relu(a)²; the states say nothing.

    Logged actions are uniform on [low, 1]. The best policy under a limit L is a = √(L / 10) in
    every step.
    """
    rng = np.random.default_rng(0)
    n = episodes * 10
    s, a, following = rng.normal(size=(n, 1)), rng.uniform(low, 1, (n, 1)), rng.normal(size=(n, 1))
    return Dataset.from_arrays(
        s, a, reward(a[:, 0]), np.zeros(n), np.arange(n) % 10 == 9, following,
        costs=np.maximum(a[:, 0], 0) ** 2, action_low=(-1.0,), action_high=(1.0,), horizon=10,
        id="toy",
    )  # fmt: skip


def constant(action: float = 0.8) -> Dataset:
    """The toy whose logged action is always the same."""
    dataset = toy(20)
    actions = np.full_like(dataset.actions, action)
    return Dataset(**dataset._arrays() | {"actions": actions}, card=dataset.card)


def trained(cls, dataset: Dataset, updates: int, members=(5,), **settings):
    """The agent after a run on a dataset, and the means of its metrics over the last fifth."""
    config = cls.make_config({"hidden": [24, 24], "batch_size": 64, "reward_scale": 1} | settings)
    dataset = cls.prepare(dataset, config)
    spec = dataset.spec(config)
    agent = cls(spec, config, members)
    agent.fit(dataset, lambda line: None)
    buffer = ReplayBuffer.from_dataset(dataset, spec, agent.seeds)
    buffer.restrict(agent.rows(dataset))
    engine = Engine(agent, buffer)
    engine.run(updates - updates // 5)
    engine.read()
    engine.run(updates // 5)
    return agent, engine.read()


def actions_of(policy, rows: int = 41) -> Tensor:
    """What a policy of one observation does over the toy's states, ``[M, rows]``."""
    states = torch.linspace(-2, 2, rows).view(1, -1, 1).expand(policy.members, -1, -1)
    return policy(states)[..., 0]
