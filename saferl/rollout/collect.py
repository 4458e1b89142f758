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
    slots: int = 16,
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
    if steps < 1 or slots < 1:
        raise SaferlError(f"steps and slots must be 1 or more, got {steps} and {slots}")
    if policy is not None and int(getattr(policy, "members", 1)) != 1:
        raise SaferlError(f"collecting needs a policy of one member, got {policy.members}")
    row = VectorEnv(env, slots, horizon)
    try:
        if policy is None:
            choose = _uniform(row, seed)
        else:
            if getattr(policy, "spec", None) is not None:
                check_sizes(row.name, row.spaces, policy.spec)
            if stochastic:
                if not hasattr(policy, "sample"):
                    raise SaferlError("stochastic collection needs a policy with a sample method")
                if random is None:
                    from saferl.rng import MemberRandom

                    random = MemberRandom([seed])
            choose = policy_function(policy, random if stochastic else None)
        return _collect(row, choose, steps, seed, progress)
    finally:
        row.close()


def _collect(row, choose, steps: int, seed: int, progress: bool) -> dict[str, Any]:
    count, started, done = len(row.envs), 0, 0
    parts: list[list[tuple]] = [[] for _ in range(count)]  # the running episode of each slot
    finished: dict[int, list[tuple]] = {}
    row.begin(seed)
    with progress_bar(steps, "collecting", "step", progress) as bar:
        while True:
            # Start no more episodes than are expected to be needed, by the mean length so far.
            usual = done / len(finished) if finished else 0.0
            coming = np.maximum(row.elapsed, usual)[row.running].sum()
            for slot in np.flatnonzero(~row.running):
                if done + coming >= steps:
                    break
                row.start(slot, started)
                parts[slot], started, coming = [], started + 1, coming + usual
            if not row.running.any():
                break
            before, ran = row.observations.copy(), np.flatnonzero(row.running)
            actions = row.act(choose, 1)
            ended = row.step(actions)
            after = row.observations.copy()
            for i in ran:
                outcome = row.rewards[i], row.costs[i], after[i], row.terminals[i], row.timeouts[i]
                parts[i].append((before[i], actions[i], *outcome))
            for slot in ended:
                finished[int(row.episode[slot])] = parts[slot]
                done += len(parts[slot])
                bar.update(len(parts[slot]))
    transitions: list[tuple] = []
    for episode in range(started):
        if len(transitions) < steps:
            transitions += finished[episode]
    columns = list(zip(*transitions))
    real, whole = np.float32, np.int64 if row.spaces.discrete else np.float32
    return {
        "observations": np.stack(columns[0]),
        "actions": np.asarray(columns[1], whole),
        "rewards": np.asarray(columns[2], real),
        "costs": np.asarray(columns[3], real) if row.has_costs else None,
        "next_observations": np.stack(columns[4]),
        "terminals": np.asarray(columns[5], bool),
        "timeouts": np.asarray(columns[6], bool),
    }


def _uniform(row: VectorEnv, seed: int) -> Callable[[np.ndarray], np.ndarray]:
    random, spaces, count = np.random.default_rng(seed), row.spaces, len(row.envs)
    if spaces.discrete:
        return lambda _: random.integers(spaces.action_dim, size=(1, count))
    if not (np.isfinite(spaces.low).all() and np.isfinite(spaces.high).all()):
        raise SaferlError(f"{row.name} has unbounded actions, so none can be drawn uniformly")
    return lambda _: random.uniform(spaces.low, spaces.high, (1, count, spaces.action_dim))
