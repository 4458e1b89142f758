"""Evaluation: rollouts of all members at once, statistics per cost limit, plots and the report.

from saferl.evaluation import evaluate
print(evaluate(policy, "saferl/HopperVelocity-v0", episodes=20).text(limits=[25.0]))
"""

from saferl.evaluation.evaluate import Evaluation, evaluate
from saferl.evaluation.report import write_report
from saferl.evaluation.statistics import bootstrap_interval, cvar, interquartile_mean, share_over
from saferl.rollout import (
    Episodes,
    Evaluator,
    check_spaces,
    rollout,
)
from saferl.rollout.collect import collect_transitions
from saferl.safety.limits import check_limit

__all__ = [
    "Episodes",
    "Evaluation",
    "Evaluator",
    "bootstrap_interval",
    "check_limit",
    "check_spaces",
    "collect_transitions",
    "cvar",
    "evaluate",
    "interquartile_mean",
    "rollout",
    "share_over",
    "write_report",
]
