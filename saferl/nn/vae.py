"""Conditional variational auto-encoder of actions, for M members at once."""

from __future__ import annotations

from torch import Tensor, nn

from saferl.nn.mlp import MLP
from saferl.rng import MemberRandom


class VAE(nn.Module):
    """Encoder q(z|s, a) = N(μ, σ), decoder tanh(f(s, z)); actions in [-1, 1].

    The heads of μ and log σ are the two halves of the encoder's last layer.

    Args:
        latent_dim: components of z, twice the action's by default.
        log_std_min, log_std_max: clip of log σ.
    """

    def __init__(
        self,
        init: MemberRandom,
        observation_dim: int,
        action_dim: int,
        hidden: tuple[int, ...],
        latent_dim: int | None = None,
        log_std_min: float = -4.0,
        log_std_max: float = 15.0,
    ):
        super().__init__()
        self.latent_dim = 2 * action_dim if latent_dim is None else latent_dim
        self.encoder = MLP(init, (observation_dim + action_dim, *hidden, 2 * self.latent_dim))
        self.decoder = MLP(init, (observation_dim + self.latent_dim, *hidden, action_dim))
        self.bounds = (log_std_min, log_std_max)

    def encode(
        self, observations: Tensor, actions: Tensor, frozen: bool = False
    ) -> tuple[Tensor, Tensor]:
        """μ and log σ, each ``[M, B, Z]``, of actions ``[M, B, A]`` at ``[M, B, O]``."""
        heads = self.encoder(observations, actions, frozen=frozen)[:, 0]
        mean, log_std = heads.chunk(2, -1)
        return mean, log_std.clamp(*self.bounds)

    def decode(self, observations: Tensor, latents: Tensor, frozen: bool = False) -> Tensor:
        """Actions ``[M, B, A]`` of latents ``[M, B, Z]``."""
        return self.decoder(observations, latents, frozen=frozen)[:, 0].tanh()

    def forward(
        self, observations: Tensor, actions: Tensor, noise: Tensor, frozen: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The actions as decoded from z = μ + σ · noise ``[M, B, Z]``, and μ and log σ.

        ``frozen`` where the loss moves what chose the actions, not the VAE.
        """
        mean, log_std = self.encode(observations, actions, frozen)
        return self.decode(observations, mean + log_std.exp() * noise, frozen), mean, log_std

    @staticmethod
    def divergence(mean: Tensor, log_std: Tensor) -> Tensor:
        """KL(N(μ, σ) ‖ N(0, 1)) of each component, in nats, the shape of μ."""
        return -0.5 * (1 + 2 * log_std - mean.square() - (2 * log_std).exp())
