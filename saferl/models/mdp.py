"""Exact answers on finite Markov decision processes: evaluation, and episodes of a policy.

Where states and actions can be counted, expected returns and costs are linear algebra, not
estimates, so a learner's result can be compared with the truth, and with the best policy that keeps
the same budgets (`saferl.models.planning`). Everything is float64 numpy and scipy.

Values follow from a policy's occupancy: the expected number of visits to each state before the
episode ends, μ = d₀ + γ P_πᵀ μ over the states that are not terminal. With γ = 1 every policy must
end its episodes with probability one.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import linalg, sparse

from saferl.errors import SaferlError, unknown


@dataclass(frozen=True)
class TabularMDP:
    """A finite Markov decision process with S states and A actions.

    Attributes:
        transitions: probability of the next state, ``[S, A, S]`` array or ``[S·A, S]`` scipy sparse
            (row s·A + a); kept as sparse rows. Rows of terminal states are not read.
        rewards: ``[S, A]``, expected reward of the step.
        initial: ``[S]``, distribution of the first state.
        terminal: ``[S]`` bool, states in which an episode is over.
        costs: name → ``[S, A]``, expected cost of the step in user units.
        supported: ``[S, A]`` bool, true where the pair has support; None: all have.

    Raises:
        SaferlError: shapes that disagree, probabilities that are negative or do not sum to one.
    """

    transitions: Any
    rewards: np.ndarray
    initial: np.ndarray
    terminal: np.ndarray
    costs: Mapping[str, np.ndarray] = field(default_factory=dict)
    supported: np.ndarray | None = None

    def __post_init__(self):
        rewards = np.asarray(self.rewards, np.float64)
        if rewards.ndim != 2:
            raise SaferlError(f"rewards must be [states, actions], got {list(rewards.shape)}")
        states, actions = rewards.shape
        rows = self.transitions
        if not sparse.issparse(rows):
            rows = np.asarray(rows, np.float64)
            if rows.shape != (states, actions, states):
                raise SaferlError(
                    f"transitions have shape {list(rows.shape)}: they must be "
                    f"{[states, actions, states]}, as rewards are {[states, actions]}"
                )
            rows = rows.reshape(states * actions, states)
        rows = sparse.csr_array(rows, dtype=np.float64)
        if rows.shape != (states * actions, states):
            raise SaferlError(
                f"sparse transitions have shape {list(rows.shape)}: they must be "
                f"{[states * actions, states]}, as rewards are {[states, actions]}"
            )
        set_ = object.__setattr__
        set_(self, "transitions", rows)
        set_(self, "rewards", rewards)
        set_(self, "terminal", shaped("terminal", self.terminal, (states,), bool))
        set_(self, "initial", shaped("initial", self.initial, (states,)))
        costs = {k: shaped(f"cost {k}", v, (states, actions)) for k, v in self.costs.items()}
        set_(self, "costs", costs)
        supported = np.ones((states, actions), bool) if self.supported is None else self.supported
        set_(self, "supported", shaped("supported", supported, (states, actions), bool))
        total = np.asarray(rows.sum(1)).reshape(states, actions)[~self.terminal]
        if (rows.data < 0).any() or (np.abs(total - 1) > 1e-6).any():
            raise SaferlError("transition probabilities must be 0 or more and sum to one")
        if (self.initial < 0).any() or abs(self.initial.sum() - 1) > 1e-6:
            raise SaferlError("initial probabilities must be 0 or more and sum to one")

    @property
    def states(self) -> int:
        return self.rewards.shape[0]

    @property
    def actions(self) -> int:
        return self.rewards.shape[1]

    def cost(self, name: str) -> np.ndarray:
        """The cost called ``name``, ``[S, A]``; an unknown name is an error naming the nearest."""
        if name not in self.costs:
            raise unknown("cost", name, self.costs)
        return self.costs[name]

    def policy(self, policy: Any) -> np.ndarray:
        """Checked probabilities ``[S, A]`` from the same, or from one action per state ``[S]``.

        Raises:
            SaferlError: another shape, an action outside the table, or rows (of states that are
                not terminal) that are no distribution.
        """
        policy = np.asarray(policy)
        shape = (self.states, self.actions)
        if policy.shape == (self.states,) and policy.dtype.kind in "iu":
            outside = (policy < 0) | (policy >= self.actions)
            if outside.any():
                state = int(outside.argmax())
                raise SaferlError(
                    f"action {policy[state]} in state {state} is outside the table: actions are "
                    f"0 … {self.actions - 1}"
                )
            table = np.zeros(shape)
            table[np.arange(self.states), policy] = 1.0
            return table
        if policy.shape != shape:
            raise SaferlError(
                f"the policy has shape {list(policy.shape)}: give {list(shape)} probabilities, or "
                f"{[self.states]} whole numbers, one action per state"
            )
        rows = policy[~self.terminal]
        if not ((rows >= 0).all() and np.allclose(rows.sum(1), 1, atol=1e-6)):
            raise SaferlError("the policy's probabilities must be 0 or more and sum to one per row")
        return policy.astype(np.float64)

    def expected_next(self, values: np.ndarray) -> np.ndarray:
        """Expected value of the next state, ``[S]`` to ``[S, A]``; terminal states count 0."""
        values = np.where(self.terminal, 0.0, values)
        return (self.transitions @ values).reshape(self.states, self.actions)

    def under(self, policy: np.ndarray) -> np.ndarray:
        """P_π among the states that are not terminal, dense."""
        live = np.flatnonzero(~self.terminal)
        s, a = np.nonzero(policy[live])
        pairs = live[s] * self.actions + a
        choose = sparse.csr_array((policy[live[s], a], (s, pairs)),
                                  shape=(len(live), self.states * self.actions))  # fmt: skip
        return (choose @ self.transitions).toarray()[:, live]


def shaped(name: str, values: Any, shape: tuple[int, ...], dtype: Any = np.float64) -> np.ndarray:
    array = np.asarray(values, dtype)
    if array.shape != shape:
        raise SaferlError(f"{name} has shape {list(array.shape)}: it must be {list(shape)}")
    return array


def solve(matrix: np.ndarray, right: np.ndarray) -> np.ndarray:
    """(I - matrix)⁻¹ right; an error where some episode never ends."""
    system = -matrix
    system[np.diag_indices_from(system)] += 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", linalg.LinAlgWarning)  # told below, as an error
        factors = linalg.lu_factor(system, overwrite_a=True, check_finite=False)
    if np.abs(np.diag(factors[0])).min(initial=1.0) < 1e-12:
        raise SaferlError(
            "the policy has episodes that never end, so undiscounted sums do not exist: give a "
            "discount below 1"
        )
    return linalg.lu_solve(factors, right, check_finite=False)


# Evaluation -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """Exact expectations over an episode, from the initial distribution.

    Attributes:
        value: return (survival where the reward is 1 on survival).
        costs: name → cost per episode.
        length: steps per episode.
        ood: steps per episode on pairs without support; ``ood_rate`` is their share of the steps.
        visits: ``[S, A]``, how often each pair is visited.
    """

    value: float
    costs: dict[str, float]
    length: float
    ood: float
    visits: np.ndarray

    @property
    def ood_rate(self) -> float:
        return self.ood / self.length if self.length else 0.0


def exact_evaluate(mdp: TabularMDP, policy: Any, discount: float = 1.0) -> Evaluation:
    """Return, costs, length and share of unsupported steps of a policy, by one linear solve.

    Args:
        policy: ``[S, A]`` probabilities, or ``[S]`` whole numbers.
        discount: γ per step; all sums, ``length`` too, are discounted with it.

    Raises:
        SaferlError: a policy of another shape or no distribution; γ = 1 and episodes that do not
            end.
    """
    policy = mdp.policy(policy)
    assert mdp.supported is not None
    live = ~mdp.terminal
    under = mdp.under(policy)
    visits = np.zeros(mdp.states)
    visits[live] = solve(discount * under.T, mdp.initial[live])
    pairs = visits[:, None] * np.where(live[:, None], policy, 0.0)
    return Evaluation(
        value=float((pairs * mdp.rewards).sum()),
        costs={name: float((pairs * cost).sum()) for name, cost in mdp.costs.items()},
        length=float(pairs.sum()),
        ood=float(pairs[~mdp.supported].sum()),
        visits=pairs,
    )


# Sampling ---------------------------------------------------------------------------------------


def sample_episodes(
    mdp: TabularMDP, policy: Any, episodes: int, seed: int = 0, horizon: int = 10_000
) -> dict[str, np.ndarray]:
    """Play a policy; all episodes advance together.

    Args:
        episodes: how many. horizon: steps after which an episode is cut (a timeout).

    Returns:
        ``states``, ``actions``, ``next_states`` int64 and ``terminals``, ``timeouts`` bool, each
        ``[N]``; whole episodes one after the other.

    Raises:
        SaferlError: fewer than one episode or step, a seed below 0, a policy of the wrong shape.
    """
    if int(episodes) != episodes or episodes < 1 or horizon < 1:
        raise SaferlError(f"episodes and horizon must be 1 or more, got {episodes} and {horizon}")
    if int(seed) != seed or seed < 0:
        raise SaferlError(f"seed must be a whole number of 0 or more, got {seed}")
    random = np.random.default_rng(seed)
    policy = mdp.policy(policy)
    initial = sparse.csr_array(np.where(mdp.terminal, 0.0, mdp.initial)[None])
    first, act, move = _Rows(initial), _Rows(sparse.csr_array(policy)), _Rows(mdp.transitions)
    state = first(np.zeros(int(episodes), np.int64), random)
    running, steps = np.arange(int(episodes)), []
    for t in range(int(horizon)):
        action = act(state, random)
        next_state = move(state * mdp.actions + action, random)
        ended = mdp.terminal[next_state]
        cut = ~ended & (t == horizon - 1)
        steps.append((running, state, action, next_state, ended, cut))
        running, state = running[~ended], next_state[~ended]
        if not len(running):
            break
    columns = [np.concatenate(column) for column in zip(*steps)]
    order = np.argsort(columns[0], kind="stable")
    names = ("states", "actions", "next_states", "terminals", "timeouts")
    return {name: column[order] for name, column in zip(names, columns[1:])}


class _Rows:
    """Draws columns of sparse rows in proportion to their values, by bisection of one sum."""

    def __init__(self, rows: sparse.csr_array):
        self.pointers, self.columns = rows.indptr.astype(np.int64), rows.indices
        self.sums = np.concatenate([[0.0], np.cumsum(rows.data)])

    def __call__(self, which: np.ndarray, random: np.random.Generator) -> np.ndarray:
        first, last = self.pointers[which], self.pointers[which + 1]
        low, high = self.sums[first], self.sums[last]
        drawn = low + random.random(len(which)) * (high - low)
        index = np.searchsorted(self.sums, drawn, side="right") - 1
        # Rounding may step just outside of the row.
        return self.columns[np.clip(index, first, last - 1)].astype(np.int64)


def mixture(mdp: TabularMDP, policy: Any, share: float, other: Any = None) -> np.ndarray:
    """``share`` of ``other`` (uniform over all actions by default) mixed into ``policy``."""
    if not 0 <= share <= 1:
        raise SaferlError(f"the share of a mixture lies between 0 and 1, got {share}")
    uniform = np.full((mdp.states, mdp.actions), 1 / mdp.actions)
    other = uniform if other is None else mdp.policy(other)
    return (1 - share) * mdp.policy(policy) + share * other
