"""Recording transitions: what a policy, or chance, does in an environment, as arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from saferl.errors import SaferlError
from saferl.rollout.vector_env import Env, VectorEnv, check_sizes, policy_function, progress_bar


def collect_transitions(
    policy: Any,
    env: Env,
    steps: int,
    seed: int = 0,
    *,
    stochastic: bool = False,
    random: Any = None,
    envs: int = 16,
    horizon: int | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Record at least ``steps`` transitions in whole episodes.

    ``policy``: a policy of one member, or None for uniformly random actions. ``stochastic`` draws
    from ``policy.sample(observations, random)``, ``random`` being a `MemberRandom` of one seed
    (``MemberRandom([seed])`` when None). Episode k is reset with ``seed + k``.

    Returns ``observations`` [N, O], ``actions`` [N, A] (or [N] int64), ``rewards`` [N], ``costs``
    [N] or None, ``next_observations`` [N, O], ``terminals`` and ``timeouts`` [N] bool; the rest
    float32. Actions are those executed, inside the Box. Episodes lie in the order in which they
    were started, and those beyond the first that reach ``steps`` rows are dropped; so short
    episodes are not preferred, and the result depends on the arguments only.
    """
    if steps < 1 or envs < 1:
        raise SaferlError(f"steps and envs must be 1 or more, got {steps} and {envs}")
    if policy is not None and int(getattr(policy, "members", 1)) != 1:
        raise SaferlError(f"collecting needs a policy of one member, got {policy.members}")
    vector_env = VectorEnv(env, envs, horizon)
    try:
        if policy is None:
            choose = _uniform(vector_env, seed)
        else:
            if getattr(policy, "spec", None) is not None:
                check_sizes(vector_env.name, vector_env.spaces, policy.spec)
            if stochastic:
                if not hasattr(policy, "sample"):
                    raise SaferlError("stochastic collection needs a policy with a sample method")
                if random is None:
                    from saferl.rng import MemberRandom

                    random = MemberRandom([seed])
            choose = policy_function(policy, random if stochastic else None)
        return _collect(vector_env, choose, steps, seed, progress)
    finally:
        vector_env.close()


def _collect(vector_env, choose, steps: int, seed: int, progress: bool) -> dict[str, Any]:
    count, started, done = len(vector_env.envs), 0, 0
    parts: list[list[tuple]] = [[] for _ in range(count)]  # the running episode of each index
    finished: dict[int, list[tuple]] = {}
    vector_env.begin(seed)
    with progress_bar(steps, "collecting", "step", progress) as bar:
        while True:
            # Start no more episodes than are expected to be needed, by the mean length so far.
            usual = done / len(finished) if finished else 0.0
            coming = np.maximum(vector_env.elapsed, usual)[vector_env.running].sum()
            for index in np.flatnonzero(~vector_env.running):
                if done + coming >= steps:
                    break
                vector_env.start(index, started)
                parts[index], started, coming = [], started + 1, coming + usual
            if not vector_env.running.any():
                break
            before, ran = vector_env.observations.copy(), np.flatnonzero(vector_env.running)
            actions = vector_env.act(choose, 1)
            ended = vector_env.step(actions)
            after = vector_env.observations.copy()
            for i in ran:
                outcome = (
                    vector_env.rewards[i],
                    vector_env.costs[i],
                    after[i],
                    vector_env.terminals[i],
                    vector_env.timeouts[i],
                )
                parts[i].append((before[i], actions[i], *outcome))
            for index in ended:
                finished[int(vector_env.episode[index])] = parts[index]
                done += len(parts[index])
                bar.update(len(parts[index]))
    transitions: list[tuple] = []
    for episode in range(started):
        if len(transitions) < steps:
            transitions += finished[episode]
    columns = list(zip(*transitions))
    real, whole = np.float32, np.int64 if vector_env.spaces.discrete else np.float32
    return {
        "observations": np.stack(columns[0]),
        "actions": np.asarray(columns[1], whole),
        "rewards": np.asarray(columns[2], real),
        "costs": np.asarray(columns[3], real) if vector_env.has_costs else None,
        "next_observations": np.stack(columns[4]),
        "terminals": np.asarray(columns[5], bool),
        "timeouts": np.asarray(columns[6], bool),
    }


def _uniform(vector_env: VectorEnv, seed: int) -> Callable[[np.ndarray], np.ndarray]:
    random, spaces, count = np.random.default_rng(seed), vector_env.spaces, len(vector_env.envs)
    if spaces.discrete:
        return lambda _: random.integers(spaces.action_dim, size=(1, count))
    if not (np.isfinite(spaces.low).all() and np.isfinite(spaces.high).all()):
        raise SaferlError(
            f"{vector_env.name} has unbounded actions, so none can be drawn uniformly"
        )
    return lambda _: random.uniform(spaces.low, spaces.high, (1, count, spaces.action_dim))
