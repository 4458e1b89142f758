"""Exact answers on finite Markov decision processes: evaluation, planning, planning under budgets.

Where states and actions can be counted, expected returns and costs are linear algebra, not
estimates, so a learner's result can be compared with the truth and with the best policy that keeps
the same budgets. Everything is float64 numpy and scipy.

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
from scipy.optimize import linprog

from saferl.errors import SaferlError, unknown

TIE = 1e-9
"""Actions whose values differ by less are equally good; the one with the lower number is taken."""
ITERATIONS = 1000
"""Policy iteration and cutting planes end long before; this bounds them where rounding cycles."""
SLACK = 1e-7
"""Budgets are kept to this, relative to the larger of the budget and one."""


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
        set_(self, "terminal", _shaped("terminal", self.terminal, (states,), bool))
        set_(self, "initial", _shaped("initial", self.initial, (states,)))
        costs = {k: _shaped(f"cost {k}", v, (states, actions)) for k, v in self.costs.items()}
        set_(self, "costs", costs)
        supported = np.ones((states, actions), bool) if self.supported is None else self.supported
        set_(self, "supported", _shaped("supported", supported, (states, actions), bool))
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

    def following(self, values: np.ndarray) -> np.ndarray:
        """Expected value of the next state, ``[S]`` to ``[S, A]``; terminal states count 0."""
        values = np.where(self.terminal, 0.0, values)
        return (self.transitions @ values).reshape(self.states, self.actions)

    def _under(self, policy: np.ndarray) -> np.ndarray:
        """P_π among the states that are not terminal, dense."""
        live = np.flatnonzero(~self.terminal)
        s, a = np.nonzero(policy[live])
        pairs = live[s] * self.actions + a
        choose = sparse.csr_array((policy[live[s], a], (s, pairs)),
                                  shape=(len(live), self.states * self.actions))  # fmt: skip
        return (choose @ self.transitions).toarray()[:, live]


def _shaped(name: str, values: Any, shape: tuple[int, ...], dtype: Any = np.float64) -> np.ndarray:
    array = np.asarray(values, dtype)
    if array.shape != shape:
        raise SaferlError(f"{name} has shape {list(array.shape)}: it must be {list(shape)}")
    return array


def _solve(matrix: np.ndarray, right: np.ndarray) -> np.ndarray:
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
    live = ~mdp.terminal
    under = mdp._under(policy)
    visits = np.zeros(mdp.states)
    visits[live] = _solve(discount * under.T, mdp.initial[live])
    pairs = visits[:, None] * np.where(live[:, None], policy, 0.0)
    return Evaluation(
        value=float((pairs * mdp.rewards).sum()),
        costs={name: float((pairs * cost).sum()) for name, cost in mdp.costs.items()},
        length=float(pairs.sum()),
        ood=float(pairs[~mdp.supported].sum()),
        visits=pairs,
    )


# Planning ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """A best deterministic policy: ``policy`` ``[S]`` int64, ``values`` ``[S]``, ``q`` ``[S, A]``.

    ``q`` is minus infinity at pairs that were not allowed.
    """

    policy: np.ndarray
    values: np.ndarray
    q: np.ndarray


def plan(
    mdp: TabularMDP,
    rewards: np.ndarray | None = None,
    allowed: np.ndarray | None = None,
    discount: float = 1.0,
    start: np.ndarray | None = None,
) -> Plan:
    """Policy iteration with exact evaluation.

    Args:
        rewards: ``[S, A]`` to maximise instead of the mdp's own (minus a cost finds its least).
        allowed: ``[S, A]`` bool, pairs that the policy may use (a hard guard); None: all. Each
            state needs at least one.
        discount: γ per step.
        start: ``[S]``, the policy to begin with; what is not allowed in it is replaced.

    Raises:
        SaferlError: a wrong shape, a state without any allowed action, γ = 1 with a policy whose
            episodes do not end.
    """
    shape = (mdp.states, mdp.actions)
    rewards = mdp.rewards if rewards is None else _shaped("rewards", rewards, shape)
    allowed = np.ones(shape, bool) if allowed is None else _shaped("allowed", allowed, shape, bool)
    live = ~mdp.terminal
    empty = live & ~allowed.any(1)
    if empty.any():
        raise SaferlError(
            f"{int(empty.sum())} states have no allowed action (state {int(empty.argmax())} is the "
            "first): allow at least the best supported one in each"
        )
    each = np.arange(mdp.states)
    policy = allowed.argmax(1)
    if start is not None:
        start = _shaped("start", start, (mdp.states,), np.int64)
        policy = np.where(allowed[each, start], start, policy)
    values = np.zeros(mdp.states)
    for _ in range(ITERATIONS):
        under = mdp._under(mdp.policy(policy))
        values[live] = _solve(discount * under, rewards[each, policy][live])
        q = np.where(allowed, rewards + discount * mdp.following(values), -np.inf)
        better = live & (q.max(1) > q[each, policy] + TIE)
        if not better.any():
            break
        policy = np.where(better, q.argmax(1), policy)
    first = (q >= q.max(1, keepdims=True) - TIE).argmax(1)
    return Plan(np.where(live, first, 0).astype(np.int64), values, q)


@dataclass(frozen=True)
class ConstrainedPlan:
    """The best policy within budgets.

    Attributes:
        policy: ``[S, A]`` probabilities; it visits each pair as often as the mixture does.
        evaluation: its exact `Evaluation` (on the mdp that was planned in).
        multipliers: name → price of a unit of cost, in units of return.
        mixture: (weight, ``[S]`` deterministic policy), drawn once per episode.
    """

    policy: np.ndarray
    evaluation: Evaluation
    multipliers: dict[str, float]
    mixture: tuple[tuple[float, np.ndarray], ...]


def plan_constrained(
    mdp: TabularMDP,
    budgets: Mapping[str, float],
    allowed: np.ndarray | None = None,
    discount: float = 1.0,
    tolerance: float = 1e-6,
) -> ConstrainedPlan:
    """Maximise the return subject to expected costs per episode of at most ``budgets``.

    Lagrangian policy iteration by cutting planes: for given multipliers λ ≥ 0 the policy that is
    best for r - Σ λⱼ cⱼ is deterministic and found by `plan`; its return and costs bound the dual
    from below, and a linear program over all policies found so far gives the next λ and the weights
    of their best mixture (Dantzig and Wolfe's decomposition). The mixture meets a binding budget
    with equality; its visits make one stochastic policy with the same return and costs (Altman,
    Constrained Markov Decision Processes, 1999).

    Args:
        budgets: name of a cost → limit in user units, the expected sum over an episode (discounted
            where ``discount`` is below 1).
        allowed, discount: as in `plan`.
        tolerance: the result's return is within this of the optimum.

    Raises:
        SaferlError: an unknown cost, or budgets that no policy keeps (naming the lowest reachable
            cost).
    """
    names = list(budgets)
    limits = np.array([float(budgets[name]) for name in names])
    prices = [mdp.cost(name) for name in names]
    columns: list[tuple[np.ndarray, Evaluation]] = []

    def add(reward_weight: float, multipliers: np.ndarray) -> float:
        """Another column, the best for these prices; returns its Lagrangian."""
        rewards = reward_weight * mdp.rewards
        for price, weight in zip(prices, multipliers):
            rewards = rewards - weight * price
        start = columns[-1][0] if columns else None
        policy = plan(mdp, rewards, allowed, discount, start).policy
        found = exact_evaluate(mdp, policy, discount)
        columns.append((policy, found))
        spent = np.array([found.costs[name] for name in names])
        return reward_weight * found.value - float(multipliers @ spent)

    def tables() -> tuple[np.ndarray, np.ndarray]:
        values = np.array([found.value for _, found in columns])
        spent = np.array([[found.costs[name] for _, found in columns] for name in names])
        return values, spent.reshape(len(names), len(columns))

    add(1.0, np.zeros(len(names)))
    scale = np.maximum(np.abs(limits), 1.0)
    while True:  # first a mixture within all budgets: the least excess over the columns
        _, spent = tables()
        result = linprog(
            np.append(np.zeros(len(columns)), 1.0),
            A_ub=np.hstack([spent, -scale[:, None]]),
            b_ub=limits,
            A_eq=np.append(np.ones(len(columns)), 0.0)[None],
            b_eq=[1.0],
            bounds=[(0, None)] * len(columns) + [(0, None)],
        )
        if not names or result.x[-1] <= SLACK:
            break
        multipliers = -result.ineqlin.marginals
        bound = -add(0.0, multipliers) - multipliers @ limits  # no policy has less excess
        if bound > SLACK or len(columns) > ITERATIONS:
            raise _infeasible(mdp, names, limits, allowed, discount)
    multipliers = np.zeros(len(names))
    while True:
        values, spent = tables()
        result = linprog(
            -values,
            A_ub=spent if names else None,
            b_ub=limits + SLACK * scale if names else None,
            A_eq=np.ones((1, len(columns))),
            b_eq=[1.0],
        )
        if names:
            multipliers = np.maximum(-result.ineqlin.marginals, 0.0)
        dual = add(1.0, multipliers) + float(multipliers @ limits)  # no policy has more
        if dual + result.fun <= tolerance or len(columns) > ITERATIONS:
            columns.pop()
            break
    kept = [(float(w), *column) for w, column in zip(result.x, columns) if w > 1e-12]
    total = sum(weight for weight, _, _ in kept)
    visits = sum(weight / total * found.visits for weight, _, found in kept)
    visited = visits.sum(1, keepdims=True)
    policy = mdp.policy(kept[0][1])
    policy = np.where(visited > 0, visits / np.where(visited > 0, visited, 1.0), policy)
    return ConstrainedPlan(
        policy=policy,
        evaluation=exact_evaluate(mdp, policy, discount),
        multipliers=dict(zip(names, multipliers.tolist())),
        mixture=tuple((weight / total, found) for weight, found, _ in kept),
    )


def _infeasible(mdp, names, limits, allowed, discount) -> SaferlError:
    lowest = []
    for name in names:
        policy = plan(mdp, -mdp.costs[name], allowed, discount).policy
        lowest.append(exact_evaluate(mdp, policy, discount).costs[name])
    wanted = ", ".join(f"{name} ≤ {limit:g}" for name, limit in zip(names, limits))
    reachable = ", ".join(f"{name} {low:.4g}" for name, low in zip(names, lowest))
    alone = " (each on its own)" if len(names) > 1 else ""
    return SaferlError(
        f"no policy keeps {wanted}: the lowest reachable cost is {reachable}{alone}; raise the "
        "budget"
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
        following = move(state * mdp.actions + action, random)
        ended = mdp.terminal[following]
        cut = ~ended & (t == horizon - 1)
        steps.append((running, state, action, following, ended, cut))
        running, state = running[~ended], following[~ended]
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
