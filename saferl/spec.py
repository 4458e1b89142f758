"""What an agent must know of a task: sizes, and how raw units map to the units it computes in.

Agents see normalised observations, actions in [-1, 1] and transformed rewards; the buffer applies
the mapping once when data enter, and the exported `Policy` carries its inverse. So no agent ever
normalises by itself, and none can forget to.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from saferl.data.frames import is_image
from saferl.errors import SaferlError

Floats = tuple[float, ...]


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
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})

    @classmethod
    def from_dataset(cls, dataset: Any, config: Any) -> Spec:
        """The spec of a `Dataset` under an agent's configuration.

        ``config.normalize_observations`` standardises with (s - mean) / (std + 1e-3) over the
        dataset, as TD3+BC does; ``config.normalize_rewards`` scales rewards by 1000 / (largest -
        smallest episode return), as IQL does, before ``reward_scale`` and ``reward_shift``.
        """
        mean: Floats = ()
        std: Floats = ()
        image = dataset.observations.shape[1:] if is_image(dataset.observations) else ()
        if image and config.normalize_observations:
            raise SaferlError(
                "pixels are not normalised: set normalize_observations=false, and use an agent "
                "that takes pixels (`saferl list`)"
            )
        if config.normalize_observations:
            mean, std = _moments(dataset.observations)
        scale = float(config.reward_scale)
        if config.normalize_rewards:
            returns = dataset.episode_returns()
            spread = float(returns.max() - returns.min()) if len(returns) else 0.0
            if spread <= 0:
                raise SaferlError(
                    "normalize_rewards needs episodes of different return, but all returns are "
                    "equal: pass --set normalize_rewards=false"
                )
            scale *= 1000.0 / spread
        card = dataset.card
        return cls(
            observation_dim=dataset.observation_dim,
            action_dim=dataset.action_dim,
            discrete=dataset.discrete,
            action_low=() if dataset.discrete else tuple(map(float, card.action_low)),
            action_high=() if dataset.discrete else tuple(map(float, card.action_high)),
            observation_mean=mean,
            observation_std=std,
            reward_scale=scale,
            reward_shift=float(config.reward_shift),
            horizon=dataset.horizon,
            image=tuple(int(size) for size in image),
            frame_stack=getattr(dataset.observations, "stack", 1),
        )

    @classmethod
    def from_spaces(cls, observation_space: Any, action_space: Any) -> Spec:
        """The spec of a gymnasium environment, nothing normalised (online training)."""
        import gymnasium

        observation_dim = int(gymnasium.spaces.flatdim(observation_space))
        if isinstance(action_space, gymnasium.spaces.Discrete):
            return cls(observation_dim, int(action_space.n), discrete=True)
        if not isinstance(action_space, gymnasium.spaces.Box):
            raise SaferlError(
                f"action space {action_space} is neither Box nor Discrete: wrap the environment so "
                "that it is"
            )
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
        std, mean = (np.float32(x) for x in (self.observation_std, self.observation_mean))
        return observations * std + mean

    def raw_actions(self, actions: np.ndarray) -> np.ndarray:
        """Continuous ones."""
        low, high = np.float32(self.action_low), np.float32(self.action_high)
        return low + (high - low) * (actions + 1) / 2

    def raw_rewards(self, rewards: np.ndarray) -> np.ndarray:
        return (rewards - np.float32(self.reward_shift)) / np.float32(self.reward_scale)


def _moments(observations: np.ndarray, chunk: int = 65536) -> tuple[Floats, Floats]:
    """Mean and standard deviation (+ 1e-3) per component, in float64 without a full-size copy."""
    n = len(observations)
    flat = observations.reshape(n, -1)
    blocks = [slice(i, i + chunk) for i in range(0, n, chunk)]
    mean = sum(flat[b].sum(0, dtype=np.float64) for b in blocks) / n
    variance = sum(((flat[b] - mean) ** 2).sum(0) for b in blocks) / n
    return tuple(mean.tolist()), tuple((np.sqrt(variance) + 1e-3).tolist())
