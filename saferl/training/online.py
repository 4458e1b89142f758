"""Online training: each step acts once in every member's environment, then updates once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saferl.data.buffer import ReplayBuffer
from saferl.rng import MemberRandom
from saferl.spec import Spec
from saferl.training.engine import Engine


class OnlineEngine(Engine):
    """One environment per member: each step acts once in each, then updates once.

    The first ``agent.config.random_steps`` steps act uniformly at random and do not update. A
    resumed run begins new episodes; everything else continues where it was.
    """

    def __init__(
        self,
        agent: Any,
        make_env: Callable[[], Any],
        capacity: int,
        seeds: Sequence[int],
        say: Callable[[str], None] = lambda line: None,
    ):
        self.envs = [make_env() for _ in seeds]
        self.buffer = ReplayBuffer(
            agent.spec, capacity, seeds, agent.device, costs=True, own_rows=True, say=say
        )
        super().__init__(agent, self.buffer)
        self.random = MemberRandom(seeds, agent.device, stream=3)
        self.policy = agent.policy()
        self.steps = 0
        self._spaces = [(env.observation_space, env.action_space) for env in self.envs]
        self._observations = [
            self._flat(m, env.reset(seed=seed)[0])
            for m, (env, seed) in enumerate(zip(self.envs, seeds))
        ]
        self._episodes = np.zeros((len(self.envs), 3))  # return, cost, length so far
        self._finished: list[list[np.ndarray]] = [[] for _ in self.envs]

    def _flat(self, member: int, observation: Any) -> np.ndarray:
        from gymnasium.spaces import flatten

        return flatten(self._spaces[member][0], observation).astype(np.float32)

    def run(self, steps: int) -> None:
        """``steps`` environment steps per member, each followed by one update."""
        for _ in range(steps):
            self._act()
            if self.steps > self.agent.config.random_steps:
                self._update()

    def _act(self) -> None:
        observations = np.stack(self._observations)
        spec: Spec = self.agent.spec
        if self.steps < self.agent.config.random_steps:
            low, high = np.asarray(spec.action_low), np.asarray(spec.action_high)
            actions = low + (high - low) * self.random.uniform(spec.action_dim).cpu().numpy()
        else:
            rows = torch.from_numpy(observations).to(self.agent.device)[:, None]
            actions = self.policy.sample(rows, self.random)[:, 0].cpu().numpy()
        self.steps += 1
        outcomes = []
        for m, env in enumerate(self.envs):
            shaped = actions[m].reshape(self._spaces[m][1].shape)
            observation, reward, terminated, truncated, info = env.step(shaped)
            cost = float(info.get("cost", 0.0))
            observation = self._flat(m, observation)
            outcomes.append((reward, observation, terminated, cost))
            self._episodes[m] += (reward, cost, 1)
            self._observations[m] = observation
            if terminated or truncated:
                self._finished[m].append(self._episodes[m].copy())
                self._episodes[m] = 0
                self._observations[m] = self._flat(m, env.reset()[0])
        rewards, nexts, terminals, costs = (np.array(column) for column in zip(*outcomes))
        fields = (observations, actions, rewards, nexts, terminals, costs)
        self.buffer.extend(*(field[:, None] for field in fields))

    def read(self) -> dict[str, np.ndarray]:
        """Metrics as in `Engine`, and the mean return, cost and length of finished episodes."""
        means = super().read()
        if all(self._finished):
            episodes = np.stack([np.mean(done, 0) for done in self._finished], 1)
            means |= dict(zip(("train_return", "train_cost", "train_length"), episodes))
            self._finished = [[] for _ in self.envs]
        return means

    def state_dict(self) -> dict[str, Tensor]:
        state = super().state_dict()
        state |= {f"buffer.{k}": v for k, v in self.buffer.state_dict(rows=True).items()}
        state["steps"] = torch.tensor(self.steps)
        state["random"] = self.random.state_dict()["state"]
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        super().load_state_dict(state)
        self.steps = int(state["steps"])
        self.random.load_state_dict({"state": state["random"]})

    def close(self) -> None:
        for env in self.envs:
            env.close()
