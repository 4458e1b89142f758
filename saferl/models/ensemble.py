"""A probabilistic neural ensemble as a model of the environment (see `saferl.models`).

Each element is a perceptron whose outputs are a diagonal Gaussian over the change of the
observation, the reward and the costs, and logits over how the step ends; trained by maximum
likelihood on batches of its own (Chua et al., "Deep Reinforcement Learning in a Handful of Trials",
NeurIPS 2018; the end of episodes is ours). Training stops on held-out episodes, and each element
keeps the weights that were best there.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from saferl.errors import SaferlError
from saferl.models.base import Model, Step
from saferl.nn import MLP
from saferl.rng import MemberRandom
from saferl.spec import Spec

LOG_VARIANCE = (-10.0, 2.0)
"""Soft bounds of the logarithm of a variance, in squared standard deviations of the data."""


class EnsembleModel(Model):
    """M members of E networks; a rollout draws an element for every row and step.

    Args:
        hidden: units of each hidden layer. ensemble: E.
        lr: Adam's rate. batch_size: rows per element and update.
        epochs: most passes over the data. patience: passes without a better element before the end.
        holdout: share of the episodes that early stopping looks at.
    """

    input_mean: Tensor
    input_std: Tensor
    target_mean: Tensor
    target_std: Tensor
    low: Tensor
    high: Tensor
    trained: Tensor

    def __init__(
        self,
        init: MemberRandom,
        spec: Spec,
        costs: int = 1,
        outcomes: int = 1,
        hidden: tuple[int, ...] = (200, 200),
        ensemble: int = 5,
        lr: float = 1e-3,
        batch_size: int = 256,
        epochs: int = 100,
        patience: int = 5,
        holdout: float = 0.1,
    ):
        super().__init__(init, spec, costs, outcomes)
        if not 0 < holdout < 1 or min(ensemble, batch_size, epochs, patience) < 1 or not lr > 0:
            raise SaferlError(
                "holdout must lie between 0 and 1, ensemble, batch_size, epochs, patience must be "
                "1 or more, and lr above 0"
            )
        self.lr, self.batch_size, self.epochs = lr, batch_size, epochs
        self.patience, self.holdout, self.ensemble = patience, holdout, ensemble
        self.width = spec.observation_dim + 1 + self.costs  # numbers under the Gaussian
        inputs = spec.observation_dim + spec.action_dim
        self.mlp = MLP(init, (inputs, *hidden, 2 * self.width + 1 + self.outcomes), ensemble)
        # A member axis for what is learnt from the data too, so that a member's state is a slice.
        for name, size in (("input", inputs), ("target", self.width)):
            self.register_buffer(f"{name}_mean", torch.zeros(self.members, 1, size))
            self.register_buffer(f"{name}_std", torch.ones(self.members, 1, size))
        for name in ("low", "high"):  # range of reward and costs, which samples are clamped to
            self.register_buffer(name, torch.zeros(self.members, 1, 1 + self.costs))
        self.register_buffer("trained", torch.zeros(self.members, dtype=torch.bool))

    @property
    def fitted(self) -> bool:
        return bool(self.trained.all())

    def _inputs(self, observations: Tensor, actions: Tensor) -> Tensor:
        """``[..., O + A]``, not yet standardised; discrete actions one-hot."""
        if self.spec.discrete:
            actions = _one_hot(actions, self.spec.action_dim).to(observations.dtype)
        return torch.cat((observations, actions), -1)

    def _heads(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and log-variance of the standardised targets, logits; ``[M, E, B, …]``.

        ``inputs``: ``[M, B, in]``, or ``[M, E, B, in]``.
        """
        axis = (slice(None), *(None,) * (inputs.dim() - 3))
        x = (inputs - self.input_mean[axis]) / self.input_std[axis]
        mean, log_variance, logits = self.mlp(x).split(
            (self.width, self.width, 1 + self.outcomes), -1
        )
        low, high = LOG_VARIANCE
        log_variance = high - F.softplus(high - log_variance)
        return mean, low + F.softplus(log_variance - low), logits

    def _loss(self, inputs: Tensor, targets: Tensor, outcomes: Tensor) -> Tensor:
        """Negative log-likelihood ``[M, E, B]`` in standardised units, up to a constant.

        The last observation of an episode that ended is often a placeholder, so its change is left
        out.
        """
        mean, log_variance, logits = self._heads(inputs)
        gaussian = 0.5 * (log_variance + (targets - mean).square() * (-log_variance).exp())
        goes_on = (outcomes == 0).unsqueeze(-1)
        o = self.spec.observation_dim
        gaussian = torch.cat((gaussian[..., :o] * goes_on, gaussian[..., o:]), -1)
        end = -logits.log_softmax(-1).gather(-1, outcomes.unsqueeze(-1)).squeeze(-1)
        return gaussian.sum(-1) + end

    def _fit(self, data: dict[str, Tensor], random: MemberRandom, say: Callable) -> None:
        s, outcomes = data["observations"], data["outcomes"]
        inputs = self._inputs(s, data["actions"])
        targets = torch.cat(
            (data["next_observations"] - s, data["rewards"][:, None], data["costs"]), 1
        )
        episodes = int(data["episodes"][-1]) + 1
        held = min(max(1, round(self.holdout * episodes)), episodes - 1)
        if held < 1:
            raise SaferlError("the ensemble holds out whole episodes: give two or more")
        # The same episodes for every member, so that a member does not depend on those beside it.
        chosen = torch.randperm(episodes, generator=torch.Generator().manual_seed(0))[:held]
        test = torch.isin(data["episodes"], chosen.to(s.device))
        o = s.shape[1]
        goes_on, kept = targets[~test & (outcomes == 0), :o], targets[~test, o:]
        self._standardise("input", inputs[~test].mean(0), inputs[~test].std(0, correction=0))
        self._standardise(
            "target",
            torch.cat((goes_on.mean(0), kept.mean(0))).nan_to_num(),
            torch.cat((goes_on.std(0, correction=0), kept.std(0, correction=0))).nan_to_num(),
        )
        extremes = targets[:, o:]
        self.low.copy_(extremes.amin(0).expand(self.members, 1, -1))
        self.high.copy_(extremes.amax(0).expand(self.members, 1, -1))
        targets = (targets - self.target_mean[0]) / self.target_std[0]

        train = (~test).nonzero()[:, 0]
        parameters = list(self.mlp.parameters())
        optimizer = torch.optim.Adam(parameters, self.lr)
        best = [p.detach().clone() for p in parameters]
        least = torch.full((self.members, self.ensemble), math.inf, device=s.device)
        since = torch.zeros(self.members, device=s.device)  # passes without a better element
        epoch, batches = 0, max(1, len(train) // self.batch_size)
        while epoch < self.epochs and bool((since < self.patience).any()):
            epoch += 1
            for _ in range(batches):
                draw = random.integers(len(train), self.ensemble, self.batch_size)
                rows = train[draw]
                with torch.enable_grad():
                    loss = self._loss(inputs[rows], targets[rows], outcomes[rows]).mean(-1).sum()
                gradients = torch.autograd.grad(loss, parameters)
                for parameter, gradient in zip(parameters, gradients):
                    parameter.grad = gradient
                optimizer.step()
            with torch.no_grad():
                found = self._held_out(inputs[test], targets[test], outcomes[test])
                better = found < least - 1e-3 * least.abs().nan_to_num(posinf=0.0)
                better &= (since < self.patience)[:, None]  # a member that stopped has stopped
                least = torch.where(better, found, least)
                for kept, parameter in zip(best, parameters):
                    kept.copy_(torch.where(better[..., None, None], parameter, kept))
                since = torch.where(better.any(1), 0.0, since + 1)
        with torch.no_grad():
            for kept, parameter in zip(best, parameters):
                parameter.copy_(kept)
                parameter.grad = None
        self.trained.fill_(True)
        say(f"model: {epoch} epochs of {batches} updates, held-out loss {float(least.mean()):.3f}")

    def _standardise(self, what: str, mean: Tensor, std: Tensor) -> None:
        getattr(self, f"{what}_mean").copy_(mean.expand(self.members, 1, -1))
        std = torch.where(std > 1e-6, std, 1.0)
        getattr(self, f"{what}_std").copy_(std.expand(self.members, 1, -1))

    def _held_out(self, inputs: Tensor, targets: Tensor, outcomes: Tensor) -> Tensor:
        """Mean loss of each element, ``[M, E]``, over rows shared by all."""
        total = inputs.new_zeros(self.members, self.ensemble)
        for start in range(0, len(inputs), 4096):
            rows = slice(start, start + 4096)
            shape = (self.members, self.ensemble)
            total += self._loss(
                inputs[rows].expand(self.members, -1, -1),
                targets[rows],
                outcomes[rows].expand(*shape, -1),
            ).sum(-1)
        return total / len(inputs)

    def _moments(self, observations: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Means and standard deviations in raw units, probabilities; ``[M, E, B, …]``."""
        mean, log_variance, logits = self._heads(self._inputs(observations, actions))
        scale = self.target_std[:, None]
        mean = mean * scale + self.target_mean[:, None]
        return mean, (0.5 * log_variance).exp() * scale, logits.softmax(-1)

    def _step(self, observations: Tensor, numbers: Tensor, chance: Tensor, outcomes: Tensor):
        o = self.spec.observation_dim
        paid = numbers[..., o:].clamp(self.low, self.high)
        terminals = chance[..., 1:].sum(-1)
        return Step(
            observations + numbers[..., :o], paid[..., 0], paid[..., 1:], terminals, outcomes
        )

    @torch.no_grad()
    def step(self, observations: Tensor, actions: Tensor, random: MemberRandom) -> Step:
        mean, std, chance = self._moments(observations, actions)
        rows = observations.shape[1]
        element = random.integers(self.ensemble, rows)[:, None, :, None]

        def chosen(x: Tensor) -> Tensor:
            return x.gather(1, element.expand(-1, -1, -1, x.shape[-1])).squeeze(1)

        numbers = chosen(mean) + chosen(std) * random.normal(rows, self.width)
        chance = chosen(chance)
        uniform = random.uniform(rows, 1)
        outcomes = (chance.cumsum(-1) <= uniform).sum(-1).clamp_max(self.outcomes)
        ended = _one_hot(outcomes, 1 + self.outcomes).to(chance.dtype)
        return self._step(observations, numbers, ended, outcomes)

    @torch.no_grad()
    def expect(self, observations: Tensor, actions: Tensor) -> Step:
        mean, _, chance = self._moments(observations, actions)
        chance = chance.mean(1)
        return self._step(observations, mean.mean(1), chance, chance)

    @torch.no_grad()
    def log_likelihood(self, data: dict[str, Tensor]) -> Tensor:
        """Log-density of the next observation under the mixture, where the episode goes on."""
        mean, std, _ = self._moments(data["observations"], data["actions"])
        o = self.spec.observation_dim
        change = (data["next_observations"] - data["observations"]).unsqueeze(1)
        gaussian = torch.distributions.Normal(mean[..., :o], std[..., :o])
        density = gaussian.log_prob(change).sum(-1).logsumexp(1) - math.log(self.ensemble)
        return density.where(data["outcomes"] == 0, math.nan)

    @torch.no_grad()
    def disagreement(self, observations: Tensor, actions: Tensor) -> Tensor:
        """``[M, B]``: RMS over outputs of the spread of the elements' means, in data units."""
        mean, _, _ = self._heads(self._inputs(observations, actions))
        return mean.std(1, correction=0).square().mean(-1).sqrt()


def _one_hot(index: Tensor, count: int) -> Tensor:
    """``[*]`` to ``[*, count]`` bool; ``F.one_hot`` reads the largest index on the host."""
    return index.unsqueeze(-1) == torch.arange(count, device=index.device)
