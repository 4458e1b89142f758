"""Actors (normalised observation to action in [-1, 1]) and the `Policy` that leaves the library.

Every actor has ``mode(observations)``, its deterministic action, and ``sample(observations,
random)``.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saferl.errors import SaferlError
from saferl.nn.mlp import MLP, Initialiser, torch_default
from saferl.rng import MemberRandom
from saferl.spec import Spec

LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)


def gaussian_log_prob(noise: Tensor, log_std: Tensor) -> Tensor:
    """Log density of mean + std · noise under the Gaussian, summed over the last axis."""
    return (-0.5 * noise.square() - log_std - LOG_SQRT_2PI).sum(-1)


class DeterministicActor(nn.Module):
    """a = tanh(f(s))."""

    def __init__(
        self,
        init: MemberRandom,
        observation_dim: int,
        action_dim: int,
        hidden: tuple[int, ...],
        layer_norm: bool = False,
        hidden_init: Initialiser = torch_default,
        final_init: Initialiser = torch_default,
    ):
        super().__init__()
        sizes = (observation_dim, *hidden, action_dim)
        self.mlp = MLP(init, sizes, 1, layer_norm, hidden_init, final_init)

    def forward(self, observations: Tensor) -> Tensor:
        """``[M, B, O]`` to ``[M, B, A]``."""
        return self.mlp(observations)[:, 0].tanh()

    def mode(self, observations: Tensor) -> Tensor:
        return self(observations)

    def sample(self, observations: Tensor, random: MemberRandom) -> Tensor:
        return self(observations)


class GaussianActor(nn.Module):
    """N(tanh(f(s)), σ) with one σ per action component, the same for all states (IQL's policy)."""

    def __init__(
        self,
        init: MemberRandom,
        observation_dim: int,
        action_dim: int,
        hidden: tuple[int, ...],
        log_std_min: float = -20.0,
        log_std_max: float = 2.0,
    ):
        super().__init__()
        self.mlp = MLP(init, (observation_dim, *hidden, action_dim))
        self.log_std = nn.Parameter(torch.zeros(self.mlp.members, 1, action_dim))
        self.bounds = (log_std_min, log_std_max)

    def mode(self, observations: Tensor) -> Tensor:
        """``[M, B, O]`` to ``[M, B, A]``."""
        return self.mlp(observations)[:, 0].tanh()

    def log_prob(
        self,
        observations: Tensor,
        actions: Tensor,
        dropout: float = 0.0,
        random: MemberRandom | None = None,
    ) -> Tensor:
        """Log density of actions ``[M, B, A]``, ``[M, B]``; `MLP.forward` explains dropout."""
        log_std = self.log_std.clamp(*self.bounds)
        mean = self.mlp(observations, dropout=dropout, random=random)[:, 0].tanh()
        noise = (actions - mean) * (-log_std).exp()
        return gaussian_log_prob(noise, log_std)

    def sample(self, observations: Tensor, random: MemberRandom) -> Tensor:
        mean = self.mode(observations)
        noise = random.normal(*mean.shape[1:])
        return (mean + self.log_std.clamp(*self.bounds).exp() * noise).clamp(-1, 1)


class TanhGaussianActor(nn.Module):
    """tanh of a Gaussian whose mean and log σ depend on the state (SAC's and CQL's policy).

    ``scale_log_std`` adds a trained multiplier and offset per member to log σ, as the young-geng
    family of CQL implementations does; ``log_std_start`` are their initial values.
    """

    def __init__(
        self,
        init: MemberRandom,
        observation_dim: int,
        action_dim: int,
        hidden: tuple[int, ...],
        log_std_min: float = -20.0,
        log_std_max: float = 2.0,
        final_init: Initialiser = torch_default,
        scale_log_std: bool = False,
        log_std_start: tuple[float, float] = (1.0, -1.0),
        layer_norm: bool = False,
        hidden_init: Initialiser = torch_default,
    ):
        super().__init__()
        sizes = (observation_dim, *hidden, 2 * action_dim)
        self.mlp = MLP(init, sizes, 1, layer_norm, hidden_init, final_init)
        self.bounds = (log_std_min, log_std_max)
        self.multiplier = self.offset = None
        if scale_log_std:
            multiplier, offset = log_std_start
            self.multiplier = nn.Parameter(torch.full((self.mlp.members, 1, 1), multiplier))
            self.offset = nn.Parameter(torch.full((self.mlp.members, 1, 1), offset))

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (before tanh) and log σ, each ``[M, B, A]``."""
        mean, log_std = self.mlp(observations)[:, 0].chunk(2, -1)
        if self.multiplier is not None:
            log_std = self.multiplier * log_std + self.offset
        return mean, log_std.clamp(*self.bounds)

    def mode(self, observations: Tensor) -> Tensor:
        return self(observations)[0].tanh()

    def sample(self, observations: Tensor, random: MemberRandom) -> Tensor:
        mean, log_std = self(observations)
        return (mean + log_std.exp() * random.normal(*mean.shape[1:])).tanh()

    @staticmethod
    def squash(mean: Tensor, log_std: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Reparameterised action ``tanh(mean + σ·noise)`` and its log density (last axis summed).

        ``noise`` may carry extra axes that mean and log σ broadcast to.
        """
        raw = mean + log_std.exp() * noise
        # log(1 - tanh(x)²) = 2 (log 2 - x - softplus(-2x)), exact also where tanh saturates.
        log_slope = 2 * (math.log(2) - raw - F.softplus(-2 * raw))
        return raw.tanh(), gaussian_log_prob(noise, log_std) - log_slope.sum(-1)

    @staticmethod
    def density(mean: Tensor, log_std: Tensor, actions: Tensor) -> Tensor:
        """Log density of actions, clipped to ±0.999 so that atanh stays finite; ``[M, B]``."""
        actions = actions.clamp(-0.999, 0.999)
        noise = (actions.atanh() - mean) * (-log_std).exp()
        return gaussian_log_prob(noise, log_std) - (1 - actions.square()).log().sum(-1)

    def log_prob(self, observations: Tensor, actions: Tensor) -> Tensor:
        """`density` of actions ``[M, B, A]`` at observations, ``[M, B]``."""
        mean, log_std = self(observations)
        return self.density(mean, log_std, actions)


class CategoricalActor(nn.Module):
    """Softmax over discrete actions."""

    def __init__(
        self, init: MemberRandom, observation_dim: int, actions: int, hidden: tuple[int, ...]
    ):
        super().__init__()
        self.mlp = MLP(init, (observation_dim, *hidden, actions))

    def forward(self, observations: Tensor) -> Tensor:
        """Log probabilities ``[M, B, actions]``."""
        return self.mlp(observations)[:, 0].log_softmax(-1)

    def mode(self, observations: Tensor) -> Tensor:
        return self(observations).argmax(-1)

    def sample(self, observations: Tensor, random: MemberRandom) -> Tensor:
        return sample_categorical(self(observations), random)


def sample_categorical(log_prob: Tensor, random: MemberRandom) -> Tensor:
    """Actions ``[M, B]`` from log probabilities ``[M, B, actions]``.

    Gumbel's trick: arg max of log p + Gumbel noise is a sample of the categorical.
    """
    uniform = random.uniform(*log_prob.shape[1:])
    return (log_prob - (-uniform.clamp_min(1e-20).log()).log()).argmax(-1)


class Policy(nn.Module):
    """Raw observation to raw action: the whole function that is saved, evaluated and guarded.

    Observation normaliser and action scaling are buffers, so they travel with the weights.
    """

    actor: Any
    observation_mean: Tensor
    observation_std: Tensor
    action_center: Tensor
    action_half_range: Tensor

    def __init__(self, actor: nn.Module, spec: Spec, members: int):
        super().__init__()
        self.actor, self.spec, self.members = actor, spec, members
        mean = spec.observation_mean or (0.0,) * spec.observation_dim
        std = spec.observation_std or (1.0,) * spec.observation_dim
        self.register_buffer("observation_mean", torch.tensor(mean))
        self.register_buffer("observation_std", torch.tensor(std))
        if not spec.discrete:
            low, high = torch.tensor(spec.action_low), torch.tensor(spec.action_high)
            self.register_buffer("action_center", (high + low) / 2)
            self.register_buffer("action_half_range", (high - low) / 2)

    def member(self, index: int) -> Policy:
        """A policy of one member with weights of its own.

        Raises:
            SaferlError: there is no such member.
        """
        if not 0 <= index < self.members:
            raise SaferlError(f"no member {index}: the policy has {self.members}, counted from 0")
        one = copy.deepcopy(self)
        one.members = 1
        module: Any
        for module in one.actor.modules():
            if hasattr(module, "members"):
                module.members = 1
        for parameter in one.actor.parameters():  # every one has a leading member axis
            parameter.data = parameter.data[index : index + 1].clone()
        return one

    def _normalise(self, observations: Tensor) -> Tensor:
        return (observations - self.observation_mean) / self.observation_std

    def _raw(self, actions: Tensor) -> Tensor:
        if self.spec.discrete:
            return actions
        return actions * self.action_half_range + self.action_center

    @torch.no_grad()
    def forward(self, observations: Tensor) -> Tensor:
        """Deterministic actions: ``[M, B, O]`` raw to ``[M, B, A]`` raw, or ``[M, B]`` int64."""
        return self._raw(self.actor.mode(self._normalise(observations)))

    @torch.no_grad()
    def sample(self, observations: Tensor, random: MemberRandom) -> Tensor:
        """Actions drawn from the policy's own distribution, shapes as in `forward`."""
        return self._raw(self.actor.sample(self._normalise(observations), random))
