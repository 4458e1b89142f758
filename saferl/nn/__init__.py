"""Member-batched networks: perceptrons, value ensembles, actors, a VAE and the exported policy."""

from saferl.nn.critics import DiscreteQEnsemble, QEnsemble, VEnsemble, polyak
from saferl.nn.mlp import MLP, orthogonal, torch_default, xavier
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
    "VAE",
    "CategoricalActor",
    "DeterministicActor",
    "DiscreteQEnsemble",
    "GaussianActor",
    "Policy",
    "QEnsemble",
    "TanhGaussianActor",
    "VEnsemble",
    "orthogonal",
    "polyak",
    "torch_default",
    "xavier",
]
