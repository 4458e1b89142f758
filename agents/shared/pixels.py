"""What agents share that learn from pixels: an encoder of the critics', seen by the actor.

For actor-critics that call ``self.actor(x)`` and ``self.critic(x, actions)``: where the task's
observations are vectors x is an observation and nothing here does anything; where they are pixels
x are the encoder's features of a randomly shifted image (`saferl.nn.encoders`). The critics' loss
alone moves the encoder. The shift is drawn anew for s, for s' and for the actor's step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from saferl.nn import Encoder, PixelActor, PixelCritic, Trunk, random_shift
from saferl.replay import Batch
from saferl.rng import MemberRandom

from .agent import Agent
from .config import AgentConfig


@dataclass(frozen=True)
class PixelConfig(AgentConfig):
    """Fields for pixels, without effect on vectors. Defaults: RLPD's at 64 pixels."""

    channels: tuple[int, ...] = (32, 64, 128, 256)  # of the convolutions
    strides: tuple[int, ...] = (2, 2, 2, 2)  # of the convolutions
    features: int = 50  # units of a trunk
    pad: int = 4  # pixels of the largest shift; 0: none


PixelConfigT = TypeVar("PixelConfigT", bound=PixelConfig)


class PixelAgent(Agent[PixelConfigT]):
    """An agent that may learn from pixels: its configuration is a `PixelConfig`."""

    critic: nn.Module

    @property
    def inputs(self) -> int:
        """Number of inputs of actor and critics."""
        return self.config.features if self.spec.image else self.spec.observation_dim

    def behind_pixels(
        self, init: MemberRandom, actor: nn.Module, critic: nn.Module
    ) -> tuple[nn.Module, nn.Module]:
        """Wrap with a shared encoder and separate trunks, if observations are images.

        Raises:
            SaferlError: the layers do not fit the images.
        """
        c = self.config
        if not self.spec.image:
            return actor, critic
        encoder = Encoder(init, self.spec.image, c.channels, c.strides)
        trunks = [Trunk(init, encoder.size, c.features) for _ in range(2)]
        return PixelActor(encoder, trunks[0], actor), PixelCritic(trunks[1], critic)

    def moved_by_actor(self) -> tuple[nn.Module, ...]:
        """Modules that the actor's loss steps."""
        return (self.actor.trunk, self.actor.actor) if self.spec.image else (self.actor,)

    def moved_by_critics(self) -> tuple[nn.Module, ...]:
        """Modules that the critics' loss steps."""
        return (self.actor.encoder, self.critic) if self.spec.image else (self.critic,)

    def encode(self, images: Tensor, offsets: Tensor) -> Tensor:
        """Features ``[M, B, F]`` of images shifted by offsets ``[M, B, 2]``."""
        pad = self.config.pad
        return self.actor.encoder(random_shift(images, offsets, pad) if pad else images)

    def shifts(self, rows: int, draws: int) -> tuple[Tensor, ...]:
        """Offsets ``[M, rows, 2]``, so many draws."""
        return self.random.integers(2 * self.config.pad + 1, draws, rows, 2).unbind(1)

    def seen(self, batch: Batch) -> Batch:
        """For the critics' step: features of s, and without gradient those of s'."""
        if not self.spec.image:
            return batch
        offsets, next_offsets = self.shifts(batch.rewards.shape[1], 2)
        observations = self.encode(batch.observations, offsets)
        with torch.no_grad():
            after = self.encode(batch.next_observations, next_offsets)
        return batch._replace(observations=observations, next_observations=after)

    @torch.no_grad()
    def seen_by_actor(self, batch: Batch) -> Batch:
        """For the actor's step: features of s, without gradient."""
        if not self.spec.image:
            return batch
        (offsets,) = self.shifts(batch.rewards.shape[1], 1)
        return batch._replace(observations=self.encode(batch.observations, offsets))
