"""Member-batched networks: perceptrons, values, actors, a VAE, encoders of pixels, the policy."""

from saferl.nn.critics import DiscreteQEnsemble, QEnsemble, VEnsemble, polyak
from saferl.nn.encoders import Encoder, PixelActor, PixelCritic, Trunk, random_shift
from saferl.nn.mlp import MLP, PRECISIONS, compute_in, orthogonal, torch_default, xavier
from saferl.nn.policies import (
    CategoricalActor,
    DeterministicActor,
    GaussianActor,
    Policy,
    TanhGaussianActor,
)
from saferl.nn.vae import VAE

__all__ = [
    "MLP",
    "PRECISIONS",
    "VAE",
    "CategoricalActor",
    "DeterministicActor",
    "DiscreteQEnsemble",
    "Encoder",
    "GaussianActor",
    "PixelActor",
    "PixelCritic",
    "Policy",
    "QEnsemble",
    "TanhGaussianActor",
    "Trunk",
    "VEnsemble",
    "compute_in",
    "orthogonal",
    "polyak",
    "random_shift",
    "torch_default",
    "xavier",
]
