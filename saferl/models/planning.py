"""Planning on finite Markov decision processes: the best policy, also of those within budgets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import linprog

from saferl.errors import SaferlError
from saferl.models.mdp import Evaluation, TabularMDP, exact_evaluate, shaped, solve

TIE = 1e-9
"""Actions whose values differ by less are equally good; the one with the lower number is taken."""
ITERATIONS = 1000
"""Policy iteration and cutting planes end long before; this bounds them where rounding cycles."""
SLACK = 1e-7
"""Budgets are kept to this, relative to the larger of the budget and one."""


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
    rewards = mdp.rewards if rewards is None else shaped("rewards", rewards, shape)
    allowed = np.ones(shape, bool) if allowed is None else shaped("allowed", allowed, shape, bool)
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
        start = shaped("start", start, (mdp.states,), np.int64)
        policy = np.where(allowed[each, start], start, policy)
    values = np.zeros(mdp.states)
    for _ in range(ITERATIONS):
        under = mdp.under(mdp.policy(policy))
        values[live] = solve(discount * under, rewards[each, policy][live])
        q = np.where(allowed, rewards + discount * mdp.expected_next(values), -np.inf)
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
    visits: Any = sum(weight / total * found.visits for weight, _, found in kept)
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
