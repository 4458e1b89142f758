"""What an environment must do to be trained and evaluated in: ``saferl check ID`` runs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from saferl.registry import make_env
from saferl.rollout import Env, VectorEnv
from saferl.spec import Spec

STEPS = 50


def it_is_a_gymnasium_environment(env: Env) -> None:
    """It passes gymnasium's own checker: spaces, seeding, the five values of a step."""
    from gymnasium.utils.env_checker import check_env

    made = make_env(env)
    try:
        check_env(made.unwrapped, skip_render_check=True)
    finally:
        made.close()


def its_spaces_have_a_spec(env: Env) -> None:
    """Observations can be flattened, actions are a bounded Box or Discrete."""
    made = make_env(env)
    try:
        spec = Spec.from_spaces(made.observation_space, made.action_space)
        assert spec.observation_dim > 0, "observations have no numbers"
    finally:
        made.close()


def a_seed_and_actions_decide_an_episode(env: Env) -> None:
    """Two environments with the same seed and actions go the same way, so that runs resume."""
    first, second = _play(env, 7), _play(env, 7)
    for name, a, b in zip(("observation", "reward", "cost", "end"), first, second):
        assert np.array_equal(a, b), f"the {name} is not decided by seed and actions"


def other_seeds_begin_elsewhere_or_it_is_said(env: Env) -> None:
    """A seed is heeded: episodes of different seeds differ, unless nothing in them is random."""
    starts = [_play(env, seed)[0][0] for seed in range(5)]
    ends = [_play(env, seed)[0][-1] for seed in range(5)]
    same = all(np.array_equal(starts[0], s) for s in starts[1:])
    fixed = all(np.array_equal(ends[0], e) for e in ends[1:])
    if same and not fixed:
        raise AssertionError("the seed does not reach the first observation: use self.np_random")


def it_reports_a_cost(env: Env) -> None:
    """``info["cost"]`` is a number of 0 or more at every step: what cost limits are judged by."""
    costs = _play(env, 3)[2]
    assert costs is not None, (
        'info has no "cost": add it in step, or wrap the environment in saferl.envs.CostWrapper'
    )
    assert (costs >= 0).all() and np.isfinite(costs).all(), "a cost is negative or not finite"


def its_episodes_end(env: Env) -> None:
    """It has a time limit, or ends by itself."""
    made = VectorEnv(env, 1, None)
    try:
        assert made.known_horizon, (
            "nothing limits an episode: register it with max_episode_steps=, or wrap it in "
            "gymnasium.wrappers.TimeLimit"
        )
    finally:
        made.close()


def _play(env: Env, seed: int) -> tuple[Any, Any, Any, Any]:
    """Observations, rewards, costs (None where there are none) and ends of up to 50 steps."""
    made = VectorEnv(env, 1, None)
    try:
        spaces, random = made.spaces, np.random.default_rng(0)
        made.begin(seed)
        made.start(0, 0)
        columns: tuple[list[Any], ...] = ([made.observations[0].copy()], [], [], [])
        seen, rewards, costs, ends = columns
        while made.running[0] and len(rewards) < STEPS:
            if spaces.discrete:
                action = random.integers(spaces.action_dim, size=1)
            else:
                low, high = np.maximum(spaces.low, -1e3), np.minimum(spaces.high, 1e3)
                action = random.uniform(low, high)[None].astype(np.float32)
            made.step(action)
            seen.append(made.observations[0].copy())
            rewards.append(made.rewards[0])
            costs.append(made.costs[0])
            ends.append(made.terminals[0])
        known = np.array(costs) if made.has_costs else None
        return np.array(seen), np.array(rewards), known, np.array(ends)
    finally:
        made.close()


ENVIRONMENT_CHECKS: tuple[Callable[[Env], None], ...] = (
    it_is_a_gymnasium_environment,
    its_spaces_have_a_spec,
    a_seed_and_actions_decide_an_episode,
    other_seeds_begin_elsewhere_or_it_is_said,
    it_reports_a_cost,
    its_episodes_end,
)
