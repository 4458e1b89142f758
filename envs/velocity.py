"""Velocity-cost tasks: run as fast as you can, but each step above a speed limit costs 1.

The physics, observations and rewards are gymnasium's ``-v4`` robots', on which D4RL's scores are
defined too; ``info["cost"]`` is 1.0 where the speed over the step exceeds the threshold, else 0.0.
Speed and thresholds are those of Safety-Gymnasium's SafetyHopperVelocity-v1 and its siblings (Ji et
al., 2023, arXiv:2310.12567): velocity along x, or for Ant and Humanoid speed in the plane. An
episode is truncated after 1000 steps, so its cost lies in [0, 1000].

The classes extend the robots' own classes: a wrapper would add a call to every step, and making
"Hopper-v4" by its id warns that v5 exists.
"""

from __future__ import annotations

import math
from typing import Any

from gymnasium.envs.mujoco.ant_v4 import AntEnv
from gymnasium.envs.mujoco.half_cheetah_v4 import HalfCheetahEnv
from gymnasium.envs.mujoco.hopper_v4 import HopperEnv
from gymnasium.envs.mujoco.humanoid_v4 import HumanoidEnv
from gymnasium.envs.mujoco.swimmer_v4 import SwimmerEnv
from gymnasium.envs.mujoco.walker2d_v4 import Walker2dEnv

from saferl.envs import VELOCITY_THRESHOLDS
from saferl.errors import SaferlError


class _VelocityCost:
    """Puts ``info["cost"]`` on a robot whose step reports ``x_velocity`` (and ``y_velocity``)."""

    robot: str
    planar = False
    _ezpickle_kwargs: dict[str, Any]

    def __init__(self, *args, velocity_threshold: float | None = None, **kwargs):
        """``velocity_threshold``: metres per second; the task's own when None.

        Other arguments go to gymnasium's class, ``gymnasium.make`` passes them on. Raises
        `SaferlError` for a threshold that is negative or not a number.
        """
        if velocity_threshold is None:
            velocity_threshold = VELOCITY_THRESHOLDS[self.robot]
        if not velocity_threshold >= 0:
            raise SaferlError(
                f"velocity_threshold must be a speed in m/s of 0 or more, got {velocity_threshold}"
            )
        super().__init__(*args, **kwargs)
        # The robots' EzPickle records their own arguments: a copy must get the threshold as well.
        self._ezpickle_kwargs["velocity_threshold"] = velocity_threshold
        self.velocity_threshold = float(velocity_threshold)

    def step(self, action):
        robot: Any = super()
        observation, reward, terminated, truncated, info = robot.step(action)
        speed = info["x_velocity"]
        if self.planar:
            speed = math.sqrt(speed**2 + info["y_velocity"] ** 2)
        info["cost"] = 1.0 if speed > self.velocity_threshold else 0.0
        return observation, reward, terminated, truncated, info


class HopperVelocityEnv(_VelocityCost, HopperEnv):
    robot = "Hopper"


class HalfCheetahVelocityEnv(_VelocityCost, HalfCheetahEnv):
    robot = "HalfCheetah"


class Walker2dVelocityEnv(_VelocityCost, Walker2dEnv):
    robot = "Walker2d"


class AntVelocityEnv(_VelocityCost, AntEnv):
    robot = "Ant"
    planar = True


class SwimmerVelocityEnv(_VelocityCost, SwimmerEnv):
    robot = "Swimmer"


class HumanoidVelocityEnv(_VelocityCost, HumanoidEnv):
    robot = "Humanoid"
    planar = True
