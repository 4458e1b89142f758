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

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        """``[M, B, O], [M, B, A]`` to ``[M, E, B]``."""
        return self.mlp(torch.cat((observations, actions), -1)).squeeze(-1)


class VEnsemble(nn.Module):
    """E state-value networks V(s) for each member (E = 1 unless told otherwise)."""

    def __init__(
        self, init: MemberRandom, observation_dim: int, hidden: tuple[int, ...], ensemble: int = 1
    ):
        super().__init__()
        self.mlp = MLP(init, (observation_dim, *hidden, 1), ensemble)

    def forward(self, observations: Tensor) -> Tensor:
        """``[M, B, O]`` to ``[M, E, B]``."""
        return self.mlp(observations).squeeze(-1)


class DiscreteQEnsemble(nn.Module):
    """E critics with one output per action."""

    def __init__(
        self,
        init: MemberRandom,
        observation_dim: int,
        actions: int,
        hidden: tuple[int, ...],
        ensemble: int = 1,
    ):
        super().__init__()
        self.mlp = MLP(init, (observation_dim, *hidden, actions), ensemble)

    def forward(self, observations: Tensor) -> Tensor:
        """``[M, B, O]`` to ``[M, E, B, actions]``."""
        return self.mlp(observations)

    def mode(self, observations: Tensor) -> Tensor:
        """The greedy action under the ensemble's mean, ``[M, B]`` int64."""
        return self.mlp(observations).mean(1).argmax(-1)

    def sample(self, observations: Tensor, random: MemberRandom) -> Tensor:
        """Greedy as well: a value network has no distribution of its own."""
        return self.mode(observations)


@torch.no_grad()
def polyak(target: nn.Module, source: nn.Module, rate: float) -> None:
    """target ← rate · source + (1 − rate) · target, in place, one fused call."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), rate)
