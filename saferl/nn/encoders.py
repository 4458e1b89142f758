"""Pixels to features for M members at once, and what puts them in front of any actor or critic.

    features = encoder(random_shift(images, offsets))            [M, B, F]
    values = PixelCritic(trunk, QEnsemble(…))(features, actions)
    actor = PixelActor(encoder, trunk, TanhGaussianActor(…))     mode and sample take pixels

The layout is DrQ's (Yarats et al. 2021, arXiv 2107.09645): convolutions that actor and critics
share and only the critics' loss moves, then a trunk for each.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saferl.errors import SaferlError
from saferl.nn.mlp import MLP, orthogonal
from saferl.rng import MemberRandom

KERNEL = 3


class Encoder(nn.Module):
    """3×3 convolutions without padding, each followed by a ReLU.

    Weights are ``[M, out, in, 3, 3]`` and the members run as groups of one convolution.

    Args:
        image: shape of a stack of frames, channels first or last (the fewest are the channels).
        channels, strides: of each layer. DrQ-v2 has (32, 32, 32, 32) and (2, 1, 1, 1); RLPD's, an
            order of magnitude cheaper at 64 pixels, (32, 64, 128, 256) and (2, 2, 2, 2).

    Attributes:
        size: features F of one image.

    Raises:
        SaferlError: channels and strides differ in number, or an image is too small for them.
    """

    def __init__(
        self,
        init: MemberRandom,
        image: tuple[int, ...],
        channels: tuple[int, ...],
        strides: tuple[int, ...],
    ):
        super().__init__()
        if len(channels) != len(strides):
            raise SaferlError(
                f"channels and strides are one per layer, got {channels} and {strides}"
            )
        self.members, self.image, self.strides = len(init.generators), tuple(image), tuple(strides)
        self.channels_last = image[-1] < image[0]
        depth, *extent = (image[-1], *image[:2]) if self.channels_last else image
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for width, stride in zip(channels, strides):
            weight = torch.empty(self.members, width, depth, KERNEL, KERNEL)
            for m, generator in enumerate(init.generators):
                nn.init.orthogonal_(weight[m], 2**0.5, generator=generator)
            self.weights.append(nn.Parameter(weight))
            self.biases.append(nn.Parameter(torch.zeros(self.members, width)))
            depth, extent = width, [(side - KERNEL) // stride + 1 for side in extent]
        if min(extent) < 1:
            raise SaferlError(
                f"images of {self.image} are too small for layers of strides {self.strides}: use "
                "fewer"
            )
        self.size = depth * extent[0] * extent[1]

    def forward(self, images: Tensor) -> Tensor:
        """Pixels 0 … 255, ``[M, B, *image]`` or flattened ``[M, B, D]``, to ``[M, B, F]``."""
        rows = images.shape[1]
        x = images.reshape(self.members, rows, *self.image)
        if self.channels_last:
            x = x.movedim(-1, 2)
        # Convolutions, their gradients above all, are faster on channels that lie side by side.
        x = x.transpose(0, 1).flatten(1, 2)
        x = x.to(self.weights[0].dtype, copy=True, memory_format=torch.channels_last)
        x = x.div_(255).sub_(0.5)  # in place: fresh memory for a batch of images is slow to get
        for weight, bias, stride in zip(self.weights, self.biases, self.strides):
            x = F.conv2d(x, weight.flatten(0, 1), bias.flatten(), stride, groups=self.members)
            x = x.relu_()
        return x.reshape(rows, self.members, -1).transpose(0, 1)


class Trunk(nn.Module):
    """Linear layer, LayerNorm with each member's own scale and offset, tanh: ``[M, B, F]`` to n."""

    def __init__(self, init: MemberRandom, inputs: int, outputs: int):
        super().__init__()
        self.linear = MLP(init, (inputs, outputs), final_init=orthogonal(1.0))
        members = len(init.generators)
        self.scale = nn.Parameter(torch.ones(members, 1, outputs))
        self.offset = nn.Parameter(torch.zeros(members, 1, outputs))

    def forward(self, features: Tensor) -> Tensor:
        x = self.linear(features)[:, 0]
        return torch.addcmul(self.offset, F.layer_norm(x, x.shape[-1:]), self.scale).tanh()


class PixelActor(nn.Module):
    """An actor of the package on the features of an encoder that the critics own and train."""

    actor: Any

    def __init__(self, encoder: Encoder, trunk: Trunk, actor: nn.Module):
        super().__init__()
        self.encoder, self.trunk, self.actor = encoder, trunk, actor

    def forward(self, features: Tensor) -> Tensor | tuple[Tensor, ...]:
        """What the actor returns, from features ``[M, B, F]``."""
        return self.actor(self.trunk(features))

    def mode(self, observations: Tensor) -> Tensor:
        """Pixels, as the encoder takes them, to actions."""
        return self.actor.mode(self.trunk(self.encoder(observations)))

    def sample(self, observations: Tensor, random: MemberRandom) -> Tensor:
        return self.actor.sample(self.trunk(self.encoder(observations)), random)


class PixelCritic(nn.Module):
    """A `QEnsemble` on the features of an encoder, behind one trunk."""

    def __init__(self, trunk: Trunk, critic: nn.Module):
        super().__init__()
        self.trunk, self.critic = trunk, critic

    def forward(self, features: Tensor, actions: Tensor, frozen: bool = False) -> Tensor:
        """``[M, B, F], [M, B, A]`` to ``[M, E, B]``; ``frozen`` as in `QEnsemble`."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            x = self.trunk(features)
        return self.critic(x, actions, frozen=frozen)


def random_shift(images: Tensor, offsets: Tensor, pad: int) -> Tensor:
    """Images ``[M, B, C, H, W]`` moved by ``offsets - pad`` pixels, their borders repeated.

    ``offsets``: ``[M, B, 2]`` whole numbers 0 … 2 · pad (rows, columns): the top left corner of the
    part that is cut from an image padded by ``pad``. As DrQ augments (arXiv 2004.13649).
    """
    height, width = images.shape[-2:]
    x = _padded(_padded(images.flatten(0, 1), -1, pad), -2, pad)
    rows, channels, tall, wide = x.shape
    # Row k of the view is the part whose first pixel is number k of all padded ones, so that a part
    # is copied line by line; gathering its pixels one by one takes four times as long.
    lines = (channels - 1) * tall * wide + (height - 1) * wide + width
    parts = x.as_strided(
        (x.numel() - lines + 1, channels, height, width), (1, tall * wide, wide, 1)
    )
    first = torch.arange(rows, device=x.device) * (channels * tall * wide)
    y, left = offsets.flatten(0, 1).unbind(-1)
    return parts.index_select(0, first + y * wide + left).view(images.shape)


def _padded(x: Tensor, axis: int, pad: int) -> Tensor:
    """``x`` with the first and the last slice along ``axis`` repeated ``pad`` times more."""
    shape = list(x.shape)
    shape[axis] = pad
    first, last = x.narrow(axis, 0, 1), x.narrow(axis, x.shape[axis] - 1, 1)
    return torch.cat((first.expand(shape), x, last.expand(shape)), axis)
