"""Whole episodes of M members at once, and what each earned and cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from saferl.errors import SaferlError
from saferl.rollout.vector_env import Env, VectorEnv, check_sizes, policy_function, progress_bar

SLOTS = 128
"""Most environments an `Evaluator` keeps alive; further episodes queue for one."""


@dataclass(frozen=True)
class Episodes:
    """Sums over whole episodes, each array ``[members, episodes]``.

    ``costs`` is None if none was seen. ``ood``: steps whose action a guardian called unsupported,
    None without one; ``replaced``: steps at which a shield took another action than the policy's,
    None for other policies.
    """

    returns: np.ndarray
    costs: np.ndarray | None
    lengths: np.ndarray
    env: str
    seed: int
    ood: np.ndarray | None = None
    replaced: np.ndarray | None = None


class Evaluator:
    """Environments kept for repeated evaluation: ``Evaluator(env, members, episodes).run(policy)``.

    - ``env``: gymnasium id, or a function without arguments that makes an environment;
    - ``members``: leading axis of the policies it will run; ``episodes``: per member and run;
    - ``horizon``: steps after which an episode is cut; when None, what the environment's gymnasium
      spec says, or 10 000, so that an environment that never ends does not run for ever.

    Close it, or use it in a ``with`` statement.
    """

    def __init__(self, env: Env, members: int = 1, episodes: int = 10, horizon: int | None = None):
        if members < 1 or episodes < 1:
            raise SaferlError(f"needs 1 or more members and episodes, got {members}, {episodes}")
        if horizon is not None and horizon < 1:
            raise SaferlError(f"the horizon must be 1 step or more, got {horizon}")
        self.members, self.episodes = members, episodes
        self.per_member = min(episodes, max(1, SLOTS // members))
        self._vector_env = VectorEnv(env, members * self.per_member, horizon)

    def check(self, spec: Any) -> None:
        """`check_spaces` with the environments at hand."""
        check_sizes(self._vector_env.name, self._vector_env.spaces, spec)

    def run(
        self, policy: Any, seed: int = 0, progress: bool = False, guardian: Any = None
    ) -> Episodes:
        """Play ``episodes`` whole episodes per member with the deterministic policy.

        ``policy(observations [M, B, O]) -> actions [M, B, A]`` (``[M, B]`` when discrete) with
        M = ``policy.members``, or 1 without that attribute. Episode k of every member is reset with
        ``seed + k``: all members meet the same initial states. Actions are clipped to the Box. A
        step without a cost counts as 0 if any other step had one. ``guardian``: a calibrated one,
        asked of every executed action and the observation that it was taken on.

        Raises:
            EnvironmentFailed: its ``index // per_member`` is the member that played.
            SaferlError: the policy does not fit, or an action of it is not finite.
        """
        members = int(getattr(policy, "members", 1))
        if members != self.members:
            raise SaferlError(
                f"the evaluator was made for {self.members} members, the policy has {members}"
            )
        if getattr(policy, "spec", None) is not None:
            self.check(policy.spec)
        vector_env, per_member = self._vector_env, self.per_member
        choose, guard = policy_function(policy), getattr(policy, "observe", None)  # a Shield's
        guarded = hasattr(policy, "replaced")
        returns, costs = np.zeros((members, self.episodes)), np.zeros((members, self.episodes))
        lengths, ood, replaced = (np.zeros((members, self.episodes), np.int64) for _ in range(3))
        owner = np.repeat(np.arange(members), per_member)
        vector_env.begin(seed)
        for index in range(len(owner)):
            vector_env.start(index, index % per_member)
        if guard:
            policy.reset(np.ones(len(owner), bool))
        with progress_bar(members * self.episodes, "evaluating", "episode", progress) as bar:
            while vector_env.running.any():
                ran = vector_env.running.copy()
                actions, at = vector_env.act(choose, members), (owner[ran], vector_env.episode[ran])
                if guardian is not None:
                    ood[at] += guardian.is_ood(vector_env.observations[ran], actions[ran])
                if guarded:
                    replaced[at] += policy.replaced[ran]
                ended = vector_env.step(actions)
                if guard:
                    guard(vector_env.costs, ~vector_env.running)
                returns[at] += vector_env.rewards[ran]
                costs[at] += vector_env.costs[ran]
                lengths[at] += 1
                for index in ended:
                    bar.update(1)
                    episode = int(vector_env.episode[index]) + per_member
                    if episode < self.episodes:
                        vector_env.start(index, episode)
                if guard:
                    policy.reset(np.isin(np.arange(len(owner)), ended) & vector_env.running)
        if guard and policy.cost_limit is not None and not vector_env.has_costs:
            raise SaferlError(
                "the shield has a cost limit but the environment reports no cost: wrap it in "
                "saferl.envs.CostWrapper"
            )
        return Episodes(
            returns,
            costs if vector_env.has_costs else None,
            lengths,
            vector_env.name,
            seed,
            None if guardian is None else ood,
            replaced if guarded else None,
        )

    def close(self) -> None:
        self._vector_env.close()

    def __enter__(self) -> Evaluator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def rollout(
    policy: Any,
    env: Env,
    episodes: int = 10,
    seed: int = 0,
    horizon: int | None = None,
    progress: bool = False,
    guardian: Any = None,
) -> Episodes:
    """Play ``episodes`` episodes per member once; see `Evaluator` and `Evaluator.run`."""
    members = int(getattr(policy, "members", 1))
    with Evaluator(env, members, episodes, horizon) as evaluator:
        return evaluator.run(policy, seed, progress, guardian)
