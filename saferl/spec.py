"""What an agent must know of a task: sizes, and how raw units map to the units it computes in.

Agents see normalised observations, actions in [-1, 1] and transformed rewards; the buffer applies
the mapping once when data enter, and the exported `Policy` carries its inverse. So no agent ever
normalises by itself, and none can forget to.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from saferl.errors import SaferlError

Floats = tuple[float, ...]


class Units(Protocol):
    """What an agent's configuration says of the units that it learns in."""

    @property
    def normalize_observations(self) -> bool: ...

    @property
    def normalize_rewards(self) -> bool: ...

    @property
    def reward_scale(self) -> float: ...

    @property
    def reward_shift(self) -> float: ...


@dataclass(frozen=True)
class Spec:
    """Sizes and affine maps between raw units and an agent's units.

    - observation: ``(raw - observation_mean) / observation_std``, flattened to ``observation_dim``;
    - continuous action: affine from ``[action_low, action_high]`` to ``[-1, 1]``;
    - reward: ``reward_scale * raw + reward_shift``; costs stay in user units.
    """

    observation_dim: int
    action_dim: int  # components of a continuous action, or the number of discrete actions
    discrete: bool = False
    action_low: Floats = ()
    action_high: Floats = ()
    observation_mean: Floats = ()  # empty: not normalised
    observation_std: Floats = ()
    reward_scale: float = 1.0
    reward_shift: float = 0.0
    horizon: int = 0  # steps of the longest episode; 0: unknown
    image: tuple[int, ...] = ()  # (channels, height, width) of uint8 pixels; empty: a vector
    frame_stack: int = 1  # frames in the channels of an image

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Spec:
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return cls(**fields)

    @classmethod
    def from_spaces(cls, observation_space: Any, action_space: Any) -> Spec:
        """The spec of a gymnasium environment, nothing normalised (online training)."""
        import gymnasium

        observation_dim = int(gymnasium.spaces.flatdim(observation_space))
        if isinstance(action_space, gymnasium.spaces.Discrete):
            return cls(observation_dim, int(action_space.n), discrete=True)
        if not isinstance(action_space, gymnasium.spaces.Box):
            raise SaferlError(neither_box_nor_discrete(action_space))
        low, high = action_space.low.ravel(), action_space.high.ravel()
        pixels = observation_space.dtype == np.uint8 and len(observation_space.shape or ()) == 3
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            raise SaferlError(
                "the action space has infinite bounds: wrap the environment with "
                "gymnasium.wrappers.RescaleAction or a bounded Box"
            )
        return cls(
            observation_dim,
            int(low.size),
            action_low=tuple(map(float, low)),
            action_high=tuple(map(float, high)),
            image=tuple(map(int, observation_space.shape)) if pixels else (),
        )

    def observations(self, raw: np.ndarray) -> np.ndarray:
        """Raw observations ``[N, *O]`` to the agent's, float32 ``[N, observation_dim]``."""
        flat = raw.reshape(len(raw), -1).astype(np.float32, copy=False)
        if not self.observation_mean:
            return flat
        mean = np.asarray(self.observation_mean, np.float32)
        return (flat - mean) / np.asarray(self.observation_std, np.float32)

    def actions(self, raw: np.ndarray) -> np.ndarray:
        """Raw actions ``[N, A]`` to [-1, 1]; discrete ``[N]`` to a float column ``[N, 1]``."""
        if self.discrete:
            return raw.reshape(len(raw), 1).astype(np.float32)
        low = np.asarray(self.action_low, np.float32)
        high = np.asarray(self.action_high, np.float32)
        raw = raw.reshape(len(raw), -1).astype(np.float32, copy=False)
        if (low == -1).all() and (high == 1).all():
            return raw
        return (raw - low) * (2 / (high - low)) - 1

    def rewards(self, raw: np.ndarray) -> np.ndarray:
        if self.reward_scale == 1 and self.reward_shift == 0:
            return raw
        return (raw * np.float32(self.reward_scale) + np.float32(self.reward_shift)).astype(
            np.float32
        )

    # The way back, to rounding.

    def raw_observations(self, observations: np.ndarray) -> np.ndarray:
        if not self.observation_mean:
            return observations
        std, mean = (np.array(x, np.float32) for x in (self.observation_std, self.observation_mean))
        return observations * std + mean

    def raw_actions(self, actions: np.ndarray) -> np.ndarray:
        """Continuous ones."""
        low, high = (np.array(x, np.float32) for x in (self.action_low, self.action_high))
        return low + (high - low) * (actions + 1) / 2

    def raw_rewards(self, rewards: np.ndarray) -> np.ndarray:
        return (rewards - np.float32(self.reward_shift)) / np.float32(self.reward_scale)


def action_levels(space: Any) -> tuple[int, ...] | None:
    """Levels of each number of an action of ``MultiDiscrete`` or ``MultiBinary``, else None."""
    import gymnasium

    if isinstance(space, gymnasium.spaces.MultiDiscrete):
        return tuple(int(level) for level in np.ravel(space.nvec))
    if isinstance(space, gymnasium.spaces.MultiBinary):
        return (2,) * int(np.prod(space.shape))
    return None


def neither_box_nor_discrete(space: Any) -> str:
    """What is wrong with an action space, and the remedy."""
    levels = action_levels(space)
    if levels is None:
        return (
            f"action space {space} is neither Box nor Discrete: wrap the environment so that it is"
        )
    return (
        f"action space {space} has several numbers per action: wrap the environment in "
        "saferl.envs.FlattenActions, which makes one integer of each combination, as the data do "
        f"with action_levels={levels}"
    )
