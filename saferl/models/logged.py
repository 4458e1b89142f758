"""Models that replay logged rows: `KNNModel` and `TabularModel` (see `saferl.models`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse
from torch import Tensor

from saferl.data.validate import row_hashes
from saferl.errors import SaferlError
from saferl.models.base import Model, Step
from saferl.models.mdp import TabularMDP
from saferl.nn.features import FeatureMap
from saferl.nn.search import Search
from saferl.rng import MemberRandom
from saferl.spec import Spec

MAX_PAIRS = 20_000_000
"""Largest table of a `TabularModel`, states times actions."""
SMOOTHING = 1e-3
"""Share of the uniform distribution in a table's log-likelihood, so that surprises stay finite."""


class _Replay(Model):
    """Logged rows in the order of their pair: pair p holds ``count[p]`` from ``start[p]`` on."""

    # Tensors once there are data, None before.
    pairs: Any
    start: Any
    count: Any
    successors: Any
    next_index: Any
    rewards: Any
    row_costs: Any
    row_outcomes: Any
    near: Any
    near_weight: Any
    arrival: Any

    def __init__(
        self,
        init: MemberRandom,
        spec: Spec,
        costs: int = 1,
        outcomes: int = 1,
        features: FeatureMap | None = None,
    ):
        super().__init__(init, spec, costs, outcomes)
        if features is None:
            n_actions = spec.action_dim if spec.discrete else None
            features = FeatureMap(n_actions=n_actions, action_encoding="onehot")
        self.feature_map = features
        self.declare("pairs", "start", "count", "successors", "next_index", "rewards", "row_costs",
                     "row_outcomes")  # fmt: skip
        self.declare("near", "near_weight", "arrival")  # of numbered states, by `number`
        self._means: Tensor | None = None

    @property
    def fitted(self) -> bool:
        return self.pairs is not None

    def prepare_load(self, state: dict[str, Tensor]) -> None:
        self._means = None

    def _arrange(self, data: dict[str, Tensor], ids: Tensor) -> Tensor:
        """Sort rows by pair ``ids`` ``[N]``; returns the distinct ids in order."""
        rows = self.feature_map.fit(data["observations"], data["actions"])
        distinct, pair, count = ids.unique(return_inverse=True, return_counts=True)
        order = pair.argsort(stable=True)
        self.count, self.start = count, count.cumsum(0) - count
        self.pairs = self.feature_map.encode(rows[order[self.start]])
        # Many rows lead to the same state where states repeat: each is kept once.
        self.successors, self.next_index = _distinct(data["next_observations"][order])
        self.rewards, self.row_costs = data["rewards"][order], data["costs"][order]
        self.row_outcomes = data["outcomes"][order]
        self._means = None
        return distinct

    def _near(self, observations: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Pairs ``[M, B, k]`` whose rows may be replayed, and their probabilities."""
        raise NotImplementedError

    def _row(self, pair: Tensor, uniform: Tensor) -> Tensor:
        """A row of each pair ``[M, B]``, from uniform numbers ``[M, B, 2]``."""
        return _pick(self.start[pair], self.count[pair], uniform[..., 0])

    @torch.no_grad()
    def step(self, observations: Tensor, actions: Tensor, random: MemberRandom) -> Step:
        self._ready()
        return self._replay(*self._near(observations, actions), self.successors, random)

    @torch.no_grad()
    def number(self, states: Tensor, arrival: Tensor) -> None:
        """Make `walk` possible, which finds by number what `step` searches for.

        Args:
            states: ``[S, O]``, in which discrete actions are asked about.
            arrival: the number of each of `successors` among them.
        """
        self._ready()
        found = [
            self._near(states[None], torch.full((1, len(states)), action, device=self.device))
            for action in range(self.spec.action_dim)
        ]
        self.near, self.near_weight = (torch.stack(part, 2)[0] for part in zip(*found))
        self.arrival = arrival

    @torch.no_grad()
    def walk(self, places: Tensor, actions: Tensor, random: MemberRandom) -> Step:
        """`step` from and to numbers of states, ``[M, B]`` int64."""
        near, weight = self.near[places, actions], self.near_weight[places, actions]
        return self._replay(near, weight, self.arrival, random)

    def _replay(self, near: Tensor, weight: Tensor, where: Tensor, random: MemberRandom) -> Step:
        """A row of one of the pairs ``[M, B, k]``, leading to that row of ``where`` ``[U, …]``."""
        uniform = random.uniform(near.shape[1], 3)
        chosen = (weight.cumsum(-1) <= uniform[..., :1]).sum(-1, keepdim=True)
        pair = near.gather(-1, chosen.clamp_max(near.shape[-1] - 1)).squeeze(-1)
        row = self._row(pair, uniform[..., 1:])
        outcomes = self.row_outcomes[row]
        return Step(
            where[self.next_index[row]],
            self.rewards[row],
            self.row_costs[row],
            (outcomes > 0).to(weight.dtype),
            outcomes,
        )

    def _group_means(self, count: Tensor) -> Tensor:
        """Means over consecutive groups of ``count`` rows, ``[G, D]``.

        Columns: next observation where the episode goes on (else 0), next observation, reward,
        costs, share of each outcome.
        """
        next_states = self.successors[self.next_index]
        ends = F.one_hot(self.row_outcomes, self.outcomes + 1).float()
        columns = (
            next_states * ends[:, :1],
            next_states,
            self.rewards[:, None],
            self.row_costs,
            ends,
        )
        rows = torch.cat(columns, 1)
        total = rows.new_zeros(len(count), rows.shape[1])
        total.index_add_(0, torch.repeat_interleave(count), rows)
        return total / count.clamp_min(1)[:, None]

    def _pair_means(self) -> Tensor:
        return self._group_means(self.count)

    @torch.no_grad()
    def expect(self, observations: Tensor, actions: Tensor) -> Step:
        self._ready()
        if self._means is None or self._means.device != self.device:
            self._means = self._pair_means()
        near, weight = self._near(observations, actions)
        mean = (self._means[near] * weight.unsqueeze(-1)).sum(-2)
        o = observations.shape[-1]
        alive, last, rewards, costs, outcomes = mean.split(
            (o, o, 1, self.costs, self.outcomes + 1), -1
        )
        goes_on = outcomes[..., :1]
        next_observations = torch.where(goes_on > 0, alive / goes_on.clamp_min(1e-12), last)
        return Step(
            next_observations, rewards.squeeze(-1), costs, outcomes[..., 1:].sum(-1), outcomes
        )


def _pick(start: Tensor, count: Tensor, uniform: Tensor) -> Tensor:
    """start + floor(uniform · count), below start + count whatever the rounding."""
    return start + torch.minimum((uniform * count).long(), count - 1)


class KNNModel(_Replay):
    """The successor of one of the k nearest logged pairs.

    Each distinct pair of the data is one neighbour; a neighbour at distance d with n logged rows is
    replayed with probability proportional to n · exp(-d² / 2h²), one of its rows at random. k = 1
    is OGSRL's model, but for pairs logged more than once, of which it takes an arbitrary row.

    Args:
        features: `FeatureMap` of the distance; by default standardised columns, one-hot actions
            where discrete.
        k: neighbours.
        bandwidth: h, in the feature map's units; None takes the median distance of a logged pair to
            the nearest other one.
        rows: logged rows that are kept, evenly spaced; None: all. A search takes as long as they
            are many, and rows that follow each other closely resemble each other.
    """

    bandwidth: Tensor

    def __init__(
        self,
        init: MemberRandom,
        spec: Spec,
        costs: int = 1,
        outcomes: int = 1,
        features: FeatureMap | None = None,
        k: int = 1,
        bandwidth: float | None = None,
        rows: int | None = None,
    ):
        super().__init__(init, spec, costs, outcomes, features)
        if k < 1 or (bandwidth is not None and not bandwidth > 0):
            raise SaferlError(f"k must be 1 or more, bandwidth above 0: got {k} and {bandwidth}")
        if rows is not None and rows < 1:
            raise SaferlError(f"rows must be 1 or more, or None for all: got {rows}")
        self.k, self._given, self.most = int(k), bandwidth, rows
        self.register_buffer("bandwidth", torch.tensor(float("nan")))
        self._search: Search | None = None

    def _fit(self, data: dict[str, Tensor], random: MemberRandom, say: Callable) -> None:
        step = -(-len(data["rewards"]) // (self.most or len(data["rewards"])))
        data = {name: column[::step] for name, column in data.items()}
        actions = data["actions"].reshape(len(data["rewards"]), -1).float()
        self._arrange(data, _keys(torch.cat((data["observations"], actions), 1)))
        self._search = None
        width = self._given
        if width is None:
            width = 1.0
            if self.k > 1 and len(self.pairs) > 1:
                some = self.pairs[:: -(-len(self.pairs) // 2000)]
                width = float(Search(self.pairs)(some, 2)[0][:, 1].median().clamp_min(1e-6))
        self.bandwidth.fill_(width)
        say(f"model: {len(self.rewards)} rows, {len(self.pairs)} distinct pairs, k {self.k}")

    def prepare_load(self, state: dict[str, Tensor]) -> None:
        super().prepare_load(state)
        self._search = None

    def _near(self, observations: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        if self._search is None or self._search.references is not self.pairs:
            self._search = Search(self.pairs)
        rows = self.feature_map.rows(observations, actions)
        x = self.feature_map.encode(rows)
        distance, near = self._search(x.flatten(0, 1), min(self.k, len(self.pairs)))
        logits = self.count[near].log() - distance.square() / (2 * self.bandwidth.square())
        shape = (*x.shape[:2], -1)
        return near.view(shape), logits.softmax(-1).view(shape)


class TabularModel(_Replay):
    """Counts: the logged successors of the same state and action.

    A state is the nearest row of a table. With prior weight κ, a pair with n rows replays one of
    its own with probability n / (n + κ) and else one of its state's, under whatever action: the
    posterior mean under a Dirichlet prior of weight κ around the state's pooled successors. A pair
    that was never logged behaves like the nearest one that was.

    Args:
        features: `FeatureMap` of the distance between pairs, as in `KNNModel`.
        prior: κ, in rows.
        states: ``[S, O]`` table of states, whose order is then that of `mdp`; None takes the
            distinct observations and next observations of the data.
    """

    # Tensors once there are data, None before.
    states: Any
    state_scale: Any
    state_start: Any
    state_count: Any
    actions: Any
    initial: Any
    logged: Any
    nearest: Any

    def __init__(
        self,
        init: MemberRandom,
        spec: Spec,
        costs: int = 1,
        outcomes: int = 1,
        features: FeatureMap | None = None,
        prior: float = 0.0,
        states: Any = None,
    ):
        super().__init__(init, spec, costs, outcomes, features)
        if not prior >= 0:
            raise SaferlError(f"prior is a number of rows, 0 or more; got {prior}")
        self.prior, self._given = float(prior), states
        self.declare("states", "state_scale", "state_start", "state_count", "actions", "initial")
        self.declare("logged", "nearest")  # state · A + action of each pair; pair of each of those

    def _fit(self, data: dict[str, Tensor], random: MemberRandom, say: Callable) -> None:
        s, a = data["observations"], data["actions"]
        goes_on = data["next_observations"][data["outcomes"] == 0]
        if self._given is None:
            self.states = _distinct(torch.cat((s, goes_on)))[0]
        else:
            self.states = torch.as_tensor(self._given, dtype=s.dtype, device=self.device)
        self.actions = (
            torch.arange(self.spec.action_dim, device=self.device)
            if self.spec.discrete
            else _distinct(a)[0]
        )
        total = len(self.states) * len(self.actions)
        if total > MAX_PAIRS:
            raise SaferlError(
                f"{len(self.states)} states × {len(self.actions)} actions are too many for a table:"
                " take the model 'knn' or 'ensemble'"
            )
        # Scaled, so that no column decides for its unit which state is nearest.
        std = s.std(0, correction=0)
        self.state_scale = torch.where(std > 0, 1 / std, 1.0)
        distinct, inverse = _distinct(s)
        state, action = self._state(distinct)[inverse], self._action(a)
        self.logged = self._arrange(data, state * len(self.actions) + action)
        self.nearest = torch.full((total,), -1, device=self.device)
        self.nearest[self.logged] = torch.arange(len(self.logged), device=self.device)
        unseen = (self.nearest < 0).nonzero()[:, 0]
        search = Search(self.pairs)
        for block in unseen.split(65536):
            pair = block // len(self.actions), block % len(self.actions)
            rows = self.feature_map.rows(self.states[pair[0]], self.actions[pair[1]])
            self.nearest[block] = search(self.feature_map.encode(rows), 1)[1][:, 0]
        self.state_count = torch.bincount(state, minlength=len(self.states))
        self.state_start = self.state_count.cumsum(0) - self.state_count
        first = torch.ones_like(state, dtype=torch.bool)
        first[1:] = data["episodes"].diff() != 0
        self.initial = torch.bincount(state[first], minlength=len(self.states)).double()
        self.initial /= self.initial.sum()
        say(f"model: {len(state)} rows, {len(self.logged)} of {total} pairs logged")

    def _state(self, observations: Tensor) -> Tensor:
        return _nearest(observations * self.state_scale, self.states * self.state_scale)

    def _action(self, actions: Tensor) -> Tensor:
        if self.spec.discrete:
            return actions
        return _nearest(actions, self.actions)

    def _near(self, observations: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        pair = self._state(observations) * len(self.actions) + self._action(actions)
        near = self.nearest[pair].unsqueeze(-1)
        return near, torch.ones_like(near, dtype=observations.dtype)

    def _row(self, pair: Tensor, uniform: Tensor) -> Tensor:
        own = super()._row(pair, uniform)
        if not self.prior:
            return own
        # Rows are in the order of states, so those of a pair's state lie side by side.
        state = self.logged[pair] // len(self.actions)
        pooled = _pick(self.state_start[state], self.state_count[state], uniform[..., 0])
        share = self.prior / (self.prior + self.count[pair])
        return torch.where(uniform[..., 1] < share, pooled, own)

    def _pair_means(self) -> Tensor:
        own = super()._pair_means()
        if not self.prior:
            return own
        pooled = self._group_means(self.state_count)[self.logged // len(self.actions)]
        share = (self.prior / (self.prior + self.count))[:, None]
        return (1 - share) * own + share * pooled

    @property
    def counts(self) -> np.ndarray:
        """``[S, A]`` int64, how often each pair was logged."""
        self._ready()
        table = self.count.new_zeros(len(self.states) * len(self.actions))
        table[self.logged] = self.count
        return table.view(len(self.states), -1).cpu().numpy()

    def _laws(self) -> sparse.csr_array:
        """Probabilities of each pair's successor, ``[P, S + K]``: a state, or how it ended."""
        states, rows = len(self.states), len(self.next_index)
        to = self._state(self.successors).cpu().numpy()[self.next_index.cpu().numpy()]
        ends = self.row_outcomes.cpu().numpy()
        to = np.where(ends > 0, states + ends - 1, to)

        def law(count: Tensor) -> sparse.csr_array:
            pointers = np.concatenate([[0], count.cpu().numpy().cumsum()])
            weight = np.repeat(1 / np.maximum(np.diff(pointers), 1), np.diff(pointers))
            shape = (len(count), states + self.outcomes)
            found = sparse.csr_array((weight[:rows], to.copy(), pointers), shape=shape)
            found.sum_duplicates()
            return found

        own = law(self.count)
        if not self.prior:
            return own
        pooled = law(self.state_count)[(self.logged // len(self.actions)).cpu().numpy()]
        share = self.prior / (self.prior + self.count.cpu().numpy())
        return sparse.csr_array(
            sparse.diags_array(1 - share) @ own + sparse.diags_array(share) @ pooled
        )

    def mdp(self, names: Sequence[str] = ("cost",)) -> TabularMDP:
        """The model as a table of S + K states, the last K being the ways to end.

        ``names`` are those of the costs; pairs with at least one row count as supported, and the
        initial distribution is that of the logged episodes.

        Raises:
            SaferlError: not fitted; a number of names other than C.
        """
        self._ready()
        if len(names) != self.costs:
            raise SaferlError(f"the model has {self.costs} costs, got {len(names)} names")
        states, actions = len(self.states), len(self.actions)
        total, ends = states + self.outcomes, self.outcomes
        nearest = self.nearest.cpu().numpy()
        laws = self._laws()[nearest]
        still = sparse.csr_array(  # never read: an episode that ended stays where it is
            np.repeat(np.eye(ends, total, states), actions, 0)
        )
        means = self._pair_means()[self.nearest].double().cpu().numpy()
        first = 2 * self.states.shape[1]

        def table(column: int) -> np.ndarray:
            return np.concatenate([means[:, column].reshape(states, actions),
                                   np.zeros((ends, actions))])  # fmt: skip

        return TabularMDP(
            sparse.csr_array(sparse.vstack([laws, still])),
            table(first),
            np.concatenate([self.initial.cpu().numpy(), np.zeros(ends)]),
            np.arange(total) >= states,
            {name: table(first + 1 + j) for j, name in enumerate(names)},
            np.concatenate([self.counts > 0, np.ones((ends, actions), bool)]),
        )

    def log_likelihood(self, data: dict[str, Tensor]) -> Tensor:
        """Log-probability of the next state, or of how the episode ended, smoothed."""
        shape = data["rewards"].shape
        to = self._state(data["next_observations"])
        to = torch.where(data["outcomes"] > 0, len(self.states) + data["outcomes"] - 1, to)
        pair = self._near(data["observations"], data["actions"])[0]
        laws = self._laws()
        rows, columns = (x.flatten().cpu().numpy().copy() for x in (pair, to))
        chance = laws[rows, columns]
        chance = (1 - SMOOTHING) * np.asarray(chance).ravel() + SMOOTHING / laws.shape[1]
        return torch.as_tensor(np.log(chance)).view(shape)


def _keys(rows: Tensor) -> Tensor:
    """64-bit hashes ``[N]`` int64, equal for equal rows ``[N, D]``."""
    hashes = row_hashes((rows + 0.0).cpu().numpy())  # + 0.0 turns -0 into 0
    return torch.from_numpy(hashes.view(np.int64)).to(rows.device)


def _distinct(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct rows ``[U, D]``, and which of them each row is, ``[N]``."""
    if rows.dim() == 1:
        return rows.unique(return_inverse=True)
    inverse = _keys(rows).unique(return_inverse=True)[1]
    distinct = rows.new_empty(int(inverse.max()) + 1, rows.shape[1])
    distinct[inverse] = rows
    return distinct, inverse


def _nearest(rows: Tensor, table: Tensor) -> Tensor:
    """Number of the nearest row ``[*]`` of ``table`` ``[S, D]`` for each of ``[*, D]``."""
    found = Search(table, tree=False)(rows.reshape(-1, rows.shape[-1]), 1)[1]
    return found.view(rows.shape[:-1])
