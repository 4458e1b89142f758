"""Member-batched networks: perceptrons, value ensembles, actors, a VAE and the exported policy."""

from saferl.nn.critics import DiscreteQEnsemble, QEnsemble, VEnsemble, polyak
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
    "GaussianActor",
    "Policy",
    "QEnsemble",
    "TanhGaussianActor",
    "VEnsemble",
    "compute_in",
    "orthogonal",
    "polyak",
    "torch_default",
    "xavier",
]
