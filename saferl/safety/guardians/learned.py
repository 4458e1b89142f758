"""Guardians that learn a network: disagreement of dynamics, reconstruction by a VAE."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from saferl.errors import SaferlError
from saferl.nn import MLP
from saferl.nn.data_buffers import as_tensor
from saferl.nn.features import FeatureMap
from saferl.rng import MemberRandom
from saferl.safety.guardians.base import Guardian

CLIP = 10.0
"""Gradient norm beyond which a step is shortened."""


def _network(seed: int, sizes: tuple[int, ...], ensemble: int = 1) -> MLP:
    return MLP(MemberRandom((seed,)), sizes, ensemble)


def _train(networks: list[nn.Module], loss: Callable[[Tensor], Tensor], rows: int, steps: int,
           batch: int, lr: float, random: torch.Generator) -> None:  # fmt: skip
    """Adam with cosine decay on ``loss(row numbers [batch])``."""
    parameters = [p for network in networks for p in network.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=lr, fused=True)
    with torch.enable_grad():
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
            index = torch.randint(rows, (batch,), generator=random).to(parameters[0].device)
            optimizer.zero_grad(set_to_none=True)
            loss(index).backward()
            nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
    for network in networks:
        network.requires_grad_(False)


class Ensemble(Guardian):
    """Disagreement of several models of the next observation.

    Score: root mean square, over observation components in units of their standard deviation, of
    the standard deviation over the models' predictions. Low where data agree on the answer, so it
    sees lack of data only through the models: near the data it may be blind.

    Args:
        model: predicts ``[E, B, O]`` raw next observations from raw ``[B, O]`` and ``[B, A]``
            (discrete ``[B]`` int64), E ≥ 2. It stays the caller's: not trained here, not moved to a
            device, not in ``state_dict``. None trains perceptrons, each on its own bootstrap
            weights of the rows; `fit` then needs ``next_observations``.
        size, hidden, steps, batch_size, lr, seed: of those perceptrons.
    """

    # Tensors once there are data, None before.
    output_scale: Any

    def __init__(
        self,
        features: FeatureMap | None = None,
        model: Callable[[Tensor, Tensor], Tensor] | None = None,
        size: int = 5,
        hidden: tuple[int, ...] = (64, 64),
        steps: int = 1000,
        batch_size: int = 256,
        lr: float = 1e-3,
        seed: int = 0,
    ):
        super().__init__(features)
        if size < 2:
            raise SaferlError(f"an ensemble disagrees from 2 models on, got size={size}")
        self._model = (model,)  # a tuple hides a module from this one's state
        self.size, self.hidden, self.steps = size, tuple(hidden), steps
        self.batch_size, self.lr, self.seed = batch_size, lr, seed
        self.declare("output_scale")
        self.network: Any = None  # an `MLP`, once fitted

    def _fit(self, features, weights, groups, next_observations) -> None:
        observations = self.rows[:, : self.feature_map.observation_dim]
        if self._model[0] is not None:
            self.output_scale = self._scale(observations)
            return
        if next_observations is None:
            raise SaferlError("pass next_observations= to fit, or model= to the ensemble guardian")
        next_observations = as_tensor(next_observations, self.device).float()
        if next_observations.shape != observations.shape:
            raise SaferlError(
                f"next_observations {list(next_observations.shape)} must have the shape of "
                f"observations, {list(observations.shape)}"
            )
        if not next_observations.isfinite().all():
            raise SaferlError("next_observations hold values that are not finite: remove the rows")
        # What is learnt is the change, in its own units; disagreement counts in the observation's.
        change = next_observations - observations
        scale = self._scale(change)
        targets = (change - change.mean(0)) / scale
        self.output_scale = self._scale(observations) / scale
        random = torch.Generator().manual_seed(self.seed)
        n = len(features)
        # Poisson(1) counts: the bootstrap of a large sample.
        counts = torch.poisson(torch.ones(self.size, n), generator=random).to(self.device)
        sizes = (features.shape[1], *self.hidden, targets.shape[1])
        self.network = _network(self.seed, sizes, self.size).to(self.device)

        def loss(index: Tensor) -> Tensor:
            errors = self.network(features[index][None])[0] - targets[index]
            return (counts[:, index] * errors.square().mean(2)).mean(1).sum()

        _train([self.network], loss, n, self.steps, self.batch_size, self.lr, random)

    @staticmethod
    def _scale(x: Tensor) -> Tensor:
        spread = x.std(0, correction=0)
        return torch.where(spread > 0, spread, 1.0)

    def _score(self, features: Tensor, rows: Tensor) -> Tensor:
        model = self._model[0]
        if model is None:
            predictions = self.network(features[None])[0]
        else:
            o = self.feature_map.observation_dim
            actions = rows[:, -1].long() if self.feature_map.discrete else rows[:, o:]
            predictions = model(rows[:, :o], actions)
            if predictions.dim() != 3 or predictions.shape[1:] != (len(rows), o):
                raise SaferlError(
                    f"the ensemble's model returned {list(predictions.shape)}, not "
                    f"[E, {len(rows)}, {o}]"
                )
        spread = predictions.std(0, correction=0) / self.output_scale
        return spread.square().mean(1).sqrt()

    def prepare_load(self, state: dict[str, Tensor]) -> None:
        super().prepare_load(state)
        self.network = _from_state(self, state, "network")


class VAE(Guardian):
    """Negative evidence bound of a variational auto-encoder of the features.

    Score: Σ_j [(x_j - x̂_j)² / 2σ_j² + log σ_j] + KL(q(z|x) ‖ N(0, I)), x̂ decoded from the mean of
    q(z|x), so it draws nothing. σ is learnt, one per feature.

    Args:
        latent_dim: components of z; None takes as many as features, at most 10.
        hidden, steps, batch_size, lr, seed: of encoder and decoder and their training.
    """

    # Tensors once there are data, None before.
    log_std: Any

    def __init__(
        self,
        features: FeatureMap | None = None,
        latent_dim: int | None = None,
        hidden: tuple[int, ...] = (64, 64),
        steps: int = 1000,
        batch_size: int = 256,
        lr: float = 3e-3,
        seed: int = 0,
    ):
        super().__init__(features)
        self.latent_dim, self.hidden, self.steps = latent_dim, tuple(hidden), steps
        self.batch_size, self.lr, self.seed = batch_size, lr, seed
        self.declare("log_std")
        self.encoder: Any = None  # `MLP`s, once fitted
        self.decoder: Any = None

    def _fit(self, features, weights, groups, next_observations) -> None:
        n, dim = features.shape
        latent = self.latent_dim or min(10, dim)
        self.encoder = _network(self.seed, (dim, *self.hidden, 2 * latent)).to(self.device)
        self.decoder = _network(self.seed + 1, (latent, *self.hidden, dim)).to(self.device)
        noise_scale = _LogStd(dim).to(self.device)
        random = torch.Generator().manual_seed(self.seed)

        def loss(index: Tensor) -> Tensor:
            noise = torch.randn(len(index), latent, generator=random).to(self.device)
            return self._bound(features[index], noise_scale.clamped(), noise).mean()

        networks = [self.encoder, self.decoder, noise_scale]
        _train(networks, loss, n, self.steps, self.batch_size, self.lr, random)
        self.log_std = noise_scale.clamped().detach().clone()

    def _bound(self, x: Tensor, log_std: Tensor, noise: Tensor | None = None) -> Tensor:
        mean, spread = self.encoder(x[None])[0, 0].chunk(2, -1)
        spread = spread.clamp(-6, 3)
        z = mean if noise is None else mean + spread.exp() * noise
        errors = (x - self.decoder(z[None])[0, 0]) * (-log_std).exp()
        divergence = 0.5 * (mean.square() + (2 * spread).exp() - 1) - spread
        return (0.5 * errors.square() + log_std).sum(1) + divergence.sum(1)

    def _score(self, features: Tensor, rows: Tensor) -> Tensor:
        return self._bound(features, self.log_std)

    def prepare_load(self, state: dict[str, Tensor]) -> None:
        super().prepare_load(state)
        self.encoder = _from_state(self, state, "encoder")
        self.decoder = _from_state(self, state, "decoder")


class _LogStd(nn.Module):
    """log σ per feature, kept above -4 so that a constant feature does not end the training."""

    def __init__(self, dim: int):
        super().__init__()
        self.value = nn.Parameter(torch.full((dim,), -2.0))

    def clamped(self) -> Tensor:
        return self.value.clamp(-4, 4)


def _from_state(guardian: Guardian, state: dict[str, Any], name: str) -> MLP | None:
    """An untrained `MLP` of the shapes that a state holds under ``name``; None if it holds none."""
    layers = sorted(k for k in state if k.startswith(f"{name}.weights."))
    if not layers:
        return None
    shapes = [state[f"{name}.weights.{i}"].shape for i in range(len(layers))]
    sizes = (shapes[0][2], *(shape[3] for shape in shapes))
    network = _network(0, sizes, shapes[0][1])
    return network.requires_grad_(False).to(guardian.device)
