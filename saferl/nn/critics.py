"""State-action, state and discrete-action value networks, all ensembles of `MLP`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from saferl.nn.mlp import MLP, Initialiser, torch_default
from saferl.rng import MemberRandom


class QEnsemble(nn.Module):
    """E critics Q(s, a) for each member."""

    def __init__(
        self,
        init: MemberRandom,
        observation_dim: int,
        action_dim: int,
        hidden: tuple[int, ...],
        ensemble: int = 2,
        layer_norm: bool = False,
        hidden_init: Initialiser = torch_default,
        final_init: Initialiser = torch_default,
    ):
        super().__init__()
        self.mlp = MLP(
            init,
            (observation_dim + action_dim, *hidden, 1),
            ensemble,
            layer_norm,
            hidden_init,
            final_init,
        )

    def forward(
        self,
        observations: Tensor,
        actions: Tensor,
        elements: int | None = None,
        frozen: bool = False,
    ) -> Tensor:
        """``[M, B, O], [M, B, A]`` to ``[M, E, B]``, or only the first ``elements`` critics.

        ``frozen``: no gradient to the critics' weights, only to the actions.
        """
        return self.mlp(observations, actions, elements=elements, frozen=frozen).squeeze(-1)

    def many(self, observations: Tensor, actions: Tensor) -> Tensor:
        """K actions for each state: ``[M, B, O], [M, B, K, A]`` to ``[M, E, B, K]``."""
        return self.mlp.many(observations, actions).squeeze(-1)


class VEnsemble(nn.Module):
    """E state-value networks V(s) for each member (by default E = 1)."""

    def __init__(
        self, init: MemberRandom, observation_dim: int, hidden: tuple[int, ...], ensemble: int = 1
    ):
        super().__init__()
        self.mlp = MLP(init, (observation_dim, *hidden, 1), ensemble)

    def forward(self, observations: Tensor) -> Tensor:
        """``[M, B, O]`` to ``[M, E, B]``."""
        return self.mlp(observations).squeeze(-1)


class DiscreteQEnsemble(nn.Module):
    """E critics with one output per action, or one per action and quantile of the return.

    Args:
        quantiles: 0 for the expected return alone; else outputs are the return's quantiles at
            (i + ½) / quantiles and a value is their mean.
    """

    def __init__(
        self,
        init: MemberRandom,
        observation_dim: int,
        actions: int,
        hidden: tuple[int, ...],
        ensemble: int = 1,
        quantiles: int = 0,
    ):
        super().__init__()
        self.actions, self.quantiles = actions, quantiles
        self.mlp = MLP(init, (observation_dim, *hidden, actions * max(1, quantiles)), ensemble)

    def distribution(self, observations: Tensor) -> Tensor:
        """``[M, B, O]`` to ``[M, E, B, actions, quantiles]`` (one "quantile" if there are none)."""
        return self.mlp(observations).unflatten(-1, (self.actions, max(1, self.quantiles)))

    def forward(self, observations: Tensor) -> Tensor:
        """Values, ``[M, B, O]`` to ``[M, E, B, actions]``."""
        return self.distribution(observations).mean(-1)

    def mode(self, observations: Tensor) -> Tensor:
        """The greedy action under the ensemble's mean, ``[M, B]`` int64."""
        return self(observations).mean(1).argmax(-1)

    def sample(self, observations: Tensor, random: MemberRandom) -> Tensor:
        """Greedy as well: a value network has no distribution of its own."""
        return self.mode(observations)


@torch.no_grad()
def polyak(target: nn.Module, source: nn.Module, rate: float) -> None:
    """target ← rate · source + (1 − rate) · target, in place, one fused call."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), rate)
