"""Exact values of policies where an environment is a table, and the best values possible there.

An environment that can be counted says so by a method ``tabular() -> TabularTask``; then the return
and cost of a policy, and the best return within each budget of cost, follow without sampling.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from saferl.models.mdp import TabularMDP, exact_evaluate
from saferl.models.planning import plan, plan_constrained
from saferl.registry import make_env
from saferl.rollout import Env, policy_function

FRONTIER_POINTS = 13


@dataclass(frozen=True)
class TabularTask:
    """What an environment is as a table.

    Attributes:
        mdp: its `TabularMDP`. Steps after which the environment cuts an episode are not in it.
        observations: ``[S, O]``, what a policy sees in each state.
        cost: the one of ``mdp.costs`` that ``info["cost"]`` is.
        to_action: continuous actions ``[S, A]``, clipped where they are outside of the bounds, to
            numbers of actions ``[S]``; None where actions are discrete.
    """

    mdp: TabularMDP
    observations: np.ndarray
    cost: str
    to_action: Callable[[np.ndarray], np.ndarray] | None = None


def tabular_task(env: Env) -> TabularTask | None:
    """The table of an environment (id or factory), None where it has none."""
    made = make_env(env)
    try:
        describe = getattr(made.unwrapped, "tabular", None)
        return None if describe is None else describe()
    finally:
        made.close()


def exact_values(task: TabularTask, policy: Any) -> dict[str, list[float]]:
    """``return``, ``cost`` and ``ood_rate`` (of the true support) of each member's policy.

    ``policy`` is as `Evaluator.run` takes it, and its action in a state must be a function of the
    observation alone.
    """
    members = int(getattr(policy, "members", 1))
    seen = np.repeat(task.observations[None].astype(np.float32), members, 0)
    chosen = policy_function(policy)(seen)
    chosen = chosen.detach().cpu().numpy() if hasattr(chosen, "detach") else np.asarray(chosen)
    found: dict[str, list[float]] = {"return": [], "cost": [], "ood_rate": []}
    for actions in chosen:
        numbers = actions if task.to_action is None else task.to_action(actions)
        values = exact_evaluate(task.mdp, numbers.astype(np.int64))
        found["return"].append(values.value)
        found["cost"].append(values.costs[task.cost])
        found["ood_rate"].append(values.ood_rate)
    return found


def exact_frontier(task: TabularTask, points: int = FRONTIER_POINTS) -> list[list[float]]:
    """``[cost, best return]`` at budgets from the least cost of any policy to that of the best.

    Between two points the best return lies on or above their connection, since it is concave.
    """
    mdp = task.mdp
    cheapest = exact_evaluate(mdp, plan(mdp, -mdp.cost(task.cost)).policy).costs[task.cost]
    best = exact_evaluate(mdp, plan(mdp).policy)
    dearest, found = best.costs[task.cost], []
    for budget in np.linspace(cheapest, dearest, points)[:-1]:
        budget += 1e-6 * (dearest - cheapest)  # the least cost itself is met by rounding alone
        within = plan_constrained(mdp, {task.cost: budget}, tolerance=1e-4).evaluation
        found.append([within.costs[task.cost], within.value])
    return [*found, [dearest, best.value]]
