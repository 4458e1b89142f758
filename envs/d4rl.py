"""D4RL's Ant: gymnasium's Ant-v4 with the 84 zeros that D4RL's observations end in.

D4RL was recorded with a mujoco-py that left the contact forces at zero, so its observations have
111 numbers, of which Ant-v4 reports the first 27.
"""

from __future__ import annotations

import numpy as np
from gymnasium.envs.mujoco.ant_v4 import AntEnv
from gymnasium.spaces import Box

ZEROS = np.zeros(84)


class D4RLAntEnv(AntEnv):
    """``saferl/D4RLAnt-v0``: for policies trained on ``d4rl/ant-…``."""

    def __init__(self, **options):
        super().__init__(**options)
        self.observation_space = Box(-np.inf, np.inf, (111,), np.float64)

    def _get_obs(self):
        return np.concatenate([super()._get_obs(), ZEROS])
