"""A tank that is to be kept full and must not run over.

The state is the level, 0 to 1, and the flow out of it. The action opens the valve in. The reward is
the level; a level above 0.8 costs 1 per step. An episode has 100 steps.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np


class Tank(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(0.0, 1.0, (2,), np.float32)
    action_space = gymnasium.spaces.Box(0.0, 1.0, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None):
        super().reset(seed=seed)  # makes self.np_random, so that a seed decides the episode
        self.level, self.flow = self.np_random.uniform(0.2, 0.4), 0.5
        return self._observation(), {}

    def step(self, action):
        self.flow = float(np.clip(self.flow + self.np_random.normal(0, 0.05), 0, 1))
        self.level += 0.1 * (float(action[0]) - self.flow)
        self.level = float(np.clip(self.level, 0, 1))
        cost = float(self.level > 0.8)  # any number of 0 or more
        return self._observation(), self.level, False, False, {"cost": cost}

    def _observation(self):
        return np.array([self.level, self.flow], np.float32)


def register() -> None:
    """Called once by saferl; named in the entry-point group ``gymnasium.envs``."""
    if "example/Tank-v0" not in gymnasium.registry:
        gymnasium.register("example/Tank-v0", entry_point=Tank, max_episode_steps=100)
