"""Episodes of a policy in a learned model, under a guardian, and what is estimated from them.

World      start states and the support lookup
simulate   N episodes of H steps in a model
Rows       states as the networks read them, each once where states are few
advantages generalised advantage estimation of several signals at once
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from saferl.data.dataset import Dataset
from saferl.models import Model, Step
from saferl.nn import CategoricalActor
from saferl.nn.data_buffers import DataBuffers
from saferl.nn.policies import sample_categorical
from saferl.nn.search import distinct_rows, row_keys
from saferl.rng import MemberRandom
from saferl.safety.guardians import Guardian
from saferl.safety.guardians.fitting import flat
from saferl.spec import Spec

from ..shared.ood_table import MAX_TABLE

MAX_STARTS = 50_000
"""Logged states that episodes may start from, at most."""
REFUSED = -1e9
"""Logit of an action that is masked: no probability, and no infinities in gradients."""


def resample(dataset: Dataset, seed: int) -> Dataset:
    """As many episodes, drawn with replacement."""
    count = len(dataset.episodes)
    return dataset.subset(episodes=np.random.default_rng(seed).integers(count, size=count))


class World(DataBuffers):
    """Start states and support lookup.

    A state is a raw observation ``[O]``. Where states can be counted (a model that replays logged
    rows, discrete actions) it is an index into `states`; the guardian's flags and the rows that
    the models replay are then looked up in tables. Everything learnt is in buffers.
    """

    # Tensors once there are data, None before.
    starts: Any
    states: Any
    flagged: Any
    permitted: Any

    guardian: Any  # a calibrated `Guardian`, or None

    def __init__(self, guardian: Guardian | None):
        super().__init__()
        self.guardian = guardian
        self.declare("starts", "states", "flagged", "permitted")

    @torch.no_grad()
    def fit(self, dataset: Dataset, starts: str, actions: int, models: Iterable[Any]) -> None:
        """Take starts; where ``actions`` (their number) is above 0, count states if they are few.

        ``models`` replay rows of the dataset.
        """
        observations = torch.tensor(flat(dataset.observations), device=self.device)
        if starts == "initial":
            rows = torch.as_tensor(dataset.episodes[:, 0].copy(), device=self.device)
        else:
            rows = torch.arange(len(dataset), device=self.device)
        rows = rows[:: -(-len(rows) // MAX_STARTS)]
        self.starts = observations[rows]
        if not actions:
            return
        next_observations = torch.tensor(flat(dataset.next_observations), device=self.device)
        states = torch.cat((observations, next_observations))
        keys, first, number, multipliers = distinct_rows(states)
        if len(keys) * actions > MAX_TABLE:
            return
        self.states, self.starts = states[first], number[rows]
        for model in models:
            arrival = torch.searchsorted(keys, row_keys(model.successors, multipliers))
            model.number(self.states, arrival)
        if self.guardian is not None:
            self.permitted, self.flagged = supported(self.guardian, self.states, actions)

    def see(self, states: Tensor) -> Tensor:
        """Raw observations ``[M, B, O]``."""
        return states if self.states is None else self.states[states]

    def ood(self, states: Tensor, actions: Tensor) -> Tensor:
        """``[M, B]`` 0/1 of states and raw actions; 0 without a guardian."""
        if self.guardian is None:
            return torch.zeros(states.shape[:2], device=self.device)
        if self.flagged is None:
            return self.guardian.is_ood(states, actions).float()
        return self.flagged[states, actions].float()

    def allowed(self, states: Tensor, actions: int) -> Tensor:
        """``[M, B, actions]`` bool: which actions a mask leaves."""
        if self.permitted is None:
            return supported(self.guardian, states, actions)[0]
        return self.permitted[states]

    def draw(self, count: int, random: MemberRandom) -> Tensor:
        """Places to start from, ``[M, count]`` or ``[M, count, O]``."""
        return self.starts[random.integers(len(self.starts), count)]

    def step(self, model: Any, states: Tensor, actions: Tensor, random: MemberRandom) -> Step:
        """A transition of the model, whose next observations are states."""
        move = model.step if self.states is None else model.walk
        return move(states, actions, random)


def supported(guardian: Guardian, observations: Tensor, actions: int) -> tuple[Tensor, Tensor]:
    """Mask and flags of every action, both ``[*, actions]`` bool.

    The mask leaves the supported actions; the best supported one where none is.
    """
    every = torch.arange(actions, device=observations.device)
    scores = guardian.score(observations.unsqueeze(-2), every)
    flagged = guardian.flag(scores)
    best = every == scores.argmin(-1, keepdim=True)
    return torch.where(flagged.all(-1, keepdim=True), best, ~flagged), flagged


class MaskedActor(nn.Module):
    """A softmax over the actions that a guardian supports, in training and wherever it is used."""

    shift: Tensor
    scale: Tensor

    def __init__(self, inner: CategoricalActor, guardian: Guardian, spec: Spec):
        super().__init__()
        self.inner, self.actions = inner, spec.action_dim
        self._guardian = (guardian,)  # not a part: its tables are the agent's, once
        size = spec.observation_dim
        for name, values, default in (
            ("shift", spec.observation_mean, 0.0),
            ("scale", spec.observation_std, 1.0),
        ):
            tensor = torch.tensor(values or (default,) * size)
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, observations: Tensor, allowed: Tensor | None = None) -> Tensor:
        """Log probabilities ``[M, B, actions]``; the mask is looked up unless it is given."""
        if allowed is None:
            raw = observations * self.scale + self.shift
            allowed = supported(self._guardian[0], raw, self.actions)[0]
        return self.inner(observations).masked_fill(~allowed, REFUSED).log_softmax(-1)

    def mode(self, observations: Tensor) -> Tensor:
        return self(observations).argmax(-1)

    def sample(self, observations: Tensor, random: MemberRandom) -> Tensor:
        return sample_categorical(self(observations), random)


class Rollout(NamedTuple):
    """N episodes of at most H steps for each member, side by side."""

    states: Tensor  # [M, N, H + 1] where states are counted, else [M, N, H + 1, O], raw
    actions: Tensor  # [M, N, H, A] as drawn, or [M, N, H] int64
    allowed: Tensor | None  # [M, N, H, actions] bool, under a mask
    rewards: Tensor  # [M, N, H], raw
    costs: Tensor  # [M, N, H, C], user units
    ood: Tensor  # [M, N, H], 1 where the guardian calls the step unsupported
    alive: Tensor  # [M, N, H], 1 until the episode is over; all that is above is 0 or void after it
    ended: Tensor  # [M, N, H], 1 at the step that ended it; never 1 where H cut it

    @property
    def open(self) -> Tensor:
        """``[M, N]``, 1 where an episode was cut by H."""
        return self.alive[..., -1] * (1 - self.ended[..., -1])


@torch.no_grad()
def simulate(
    model: Model,
    world: World,
    episodes: int,
    horizon: int,
    random: MemberRandom,
    decide: Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]],
    *,
    absorb: bool = False,
    mask: int = 0,
) -> Rollout:
    """Simulate N = ``episodes`` episodes of H = ``horizon`` steps.

    Args:
        decide: from states (see `World`) and the mask to actions as drawn and raw actions, which
            the model and the guardian are asked about.
        absorb: an unsupported step ends the episode; the model is then not believed about it, so
            it has neither reward nor cost.
        mask: number of actions, of which `decide` is given the supported ones; 0: no mask.
    """
    state = world.draw(episodes, random)
    alive = torch.ones(state.shape[:2], device=state.device)
    states, steps = [state], []
    for _ in range(horizon):
        allowed = world.allowed(state, mask) if mask else None
        actions, raw = decide(state, allowed)
        ood = world.ood(state, raw) * alive
        found = world.step(model, state, raw, random)
        counts = alive * (1 - ood) if absorb else alive
        ended = torch.maximum(found.terminals, ood) if absorb else found.terminals
        ended = alive * ended
        rewards, costs = found.rewards * counts, found.costs * counts[..., None]
        steps.append((actions, allowed, rewards, costs, ood, alive, ended))
        alive = alive - ended
        goes_on = (alive > 0).view(*alive.shape, *(1,) * (state.dim() - 2))
        state = torch.where(goes_on, found.next_observations, state)
        states.append(state)
    columns: list[Any] = [
        None if column[0] is None else torch.stack(column, 2) for column in zip(*steps)
    ]
    return Rollout(torch.stack(states, 2), *columns)


@torch.no_grad()
def advantages(
    signals: Tensor,
    values: Tensor,
    alive: Tensor,
    ended: Tensor,
    discount: Tensor | float,
    weight: float,
) -> Tensor:
    """Generalised advantage estimates (Schulman et al. 2016, arXiv 1506.02438) of K signals.

        δ_t = x_t + γ n_t V(s_{t+1}) - V(s_t),   A_t = δ_t + γ λ n_t A_{t+1}

    with n_t = 0 at the last step of an episode that ended; one that H cut goes on in V(s_H).

    Args:
        signals: ``[M, N, H, K]``, a reward or costs.
        values: ``[M, N, H + 1, K]``, of every state and of the one behind the last step.
        alive, ended: ``[M, N, H]``, as in `Rollout`.
        discount: γ, a number or ``[M, 1, K]``. weight: λ.

    Returns:
        ``[M, N, H, K]``, 0 after an episode is over.
    """
    goes_on = (alive * (1 - ended))[..., None]
    advantage = torch.zeros_like(values[:, :, 0])
    found = []
    for t in range(signals.shape[2] - 1, -1, -1):
        discounted = discount * goes_on[:, :, t]
        delta = signals[:, :, t] + discounted * values[:, :, t + 1] - values[:, :, t]
        advantage = (delta + weight * discounted * advantage) * alive[:, :, t, None]
        found.append(advantage)
    return torch.stack(found[::-1], 2)


class Rows(NamedTuple):
    """Inputs of networks: one row per simulated state, or one per distinct state where fewer."""

    observations: Tensor  # [M, U, O], the agent's units
    allowed: Tensor | None  # [M, U, actions] bool, under a mask
    lookup: Tensor | None  # [M, B], which of the U rows each state is; None: row by row

    def pick(self, outputs: Any) -> Any:
        """Outputs ``[M, U, …]``, or a tuple of them, to those of each state ``[M, B, …]``."""
        if self.lookup is None:
            return outputs
        if isinstance(outputs, tuple):
            return tuple(map(self.pick, outputs))
        index = self.lookup.view(*self.lookup.shape, *(1,) * (outputs.dim() - 2))
        return outputs.gather(1, index.expand(-1, -1, *outputs.shape[2:]))

    def pick_last(self, outputs: Tensor) -> Tensor:
        """Outputs ``[M, K, U]`` to those of each state ``[M, K, B]``."""
        if self.lookup is None:
            return outputs
        return outputs.gather(2, self.lookup[:, None].expand(-1, outputs.shape[1], -1))

    def first(self, count: int) -> Rows:
        """The first ``count`` states."""
        if self.lookup is not None:
            return self._replace(lookup=self.lookup[:, :count])
        allowed = None if self.allowed is None else self.allowed[:, :count]
        return Rows(self.observations[:, :count], allowed, None)


def standardise(values: Tensor, weight: Tensor) -> Tensor:
    """``[M, B, K]`` to mean 0 and deviation 1 over rows of weight 1, ``[M, B]``."""
    weight = weight[..., None]
    count = weight.sum(1, keepdim=True)
    centred = values - (weight * values).sum(1, keepdim=True) / count
    std = ((weight * centred.square()).sum(1, keepdim=True) / count).sqrt()
    return centred / (std + 1e-8)


def discounting(discount: Tensor | float, horizon: int, like: Tensor) -> Tensor:
    """γ^t for t < H as ``[M, 1, H, K]`` of γ ``[M, 1, K]`` (or a number)."""
    powers = torch.arange(horizon, dtype=like.dtype, device=like.device)
    base = torch.as_tensor(discount, dtype=like.dtype, device=like.device)
    base = base.reshape(1, 1, 1) if base.dim() == 0 else base
    return base.unsqueeze(2) ** powers[:, None]
