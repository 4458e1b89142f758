"""Playing environments: the vector environment, whole episodes, recorded transitions.

result = rollout(policy, "saferl/HopperVelocity-v0", episodes=20)    # returns, costs [M, 20]
"""

from saferl.rollout.collect import collect_transitions
from saferl.rollout.episodes import Episodes, Evaluator, rollout
from saferl.rollout.vector_env import (
    Env,
    EnvironmentFailed,
    VectorEnv,
    check_sizes,
    check_spaces,
    policy_function,
)

__all__ = [
    "Env",
    "EnvironmentFailed",
    "Episodes",
    "Evaluator",
    "VectorEnv",
    "check_sizes",
    "check_spaces",
    "collect_transitions",
    "policy_function",
    "rollout",
]
