"""Wrappers that fit an environment to the library.

Costs belong in ``info["cost"]``, one float per step: `CostWrapper` gives any gymnasium environment
a cost computed from its transitions; `adapt_cost` turns the six-value steps of Safety-Gymnasium and
its relatives into gymnasium's five. `FlattenActions` makes one integer of several.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from gymnasium.utils import RecordConstructorArgs

from saferl.errors import SaferlError
from saferl.spec import action_levels

CostFunction = Callable[[Any, Any, Any, dict[str, Any]], float]
"""``cost(observation, action, next_observation, info)``: user units, 0 or more, for one step."""


class _CostReporter(gymnasium.Wrapper, RecordConstructorArgs):
    """What both wrappers share: the checks on the environment and on each cost."""

    def __init__(self, env: gymnasium.Env, **arguments: Any):
        if not isinstance(env, gymnasium.Env):
            raise SaferlError(
                f"{type(self).__name__} needs one gymnasium.Env, got {type(env).__name__}: "
                "wrap each environment before they are put into a vector, and port older gym "
                "environments to gymnasium"
            )
        # Recorded arguments let gymnasium.make(env.spec) build the wrapped environment again.
        RecordConstructorArgs.__init__(self, _disable_deepcopy=True, **arguments)
        gymnasium.Wrapper.__init__(self, env)

    def _checked(self, cost: Any) -> float:
        try:
            value = float(cost)
        except (TypeError, ValueError) as error:
            raise SaferlError(
                f"the cost of a step of {self.env} must be one number, got {cost!r}"
            ) from error
        if not (math.isfinite(value) and value >= 0.0):
            raise SaferlError(
                f"the cost of a step of {self.env} must be finite and 0 or more, got {value}: "
                "costs are harms that add up; put a benefit into the reward"
            )
        return value


class CostWrapper(_CostReporter):
    """Any environment with a cost of your own.

    >>> def too_far(observation, action, next_observation, info):
    ...     return abs(next_observation[0]) > 1.5
    >>> env = CostWrapper(gymnasium.make("CartPole-v1"), too_far)  # doctest: +SKIP

    ``cost`` is called after every step with the observation the action was chosen in, the action,
    the observation that followed and the step's info; what it returns goes to ``info["cost"]``, in
    place of a cost the environment may have reported there (which the function can read).

    Raises `SaferlError` when ``env`` is not a gymnasium environment, ``cost`` cannot be called, a
    cost is not a finite number of 0 or more, or ``step`` comes before ``reset``.
    """

    def __init__(self, env: gymnasium.Env, cost: CostFunction):
        if not callable(cost):
            raise SaferlError(
                "CostWrapper needs a function cost(observation, action, next_observation, info), "
                f"got {type(cost).__name__}"
            )
        super().__init__(env, cost=cost)
        self._cost = cost
        self._observation: Any = None

    def reset(self, **kwargs):
        observation, info = self.env.reset(**kwargs)
        # A copy, because some environments write each observation into the same array.
        self._observation = copy.deepcopy(observation)
        return observation, info

    def step(self, action):
        if self._observation is None:
            raise SaferlError(f"call reset() before the first step() of {self.env}")
        next_observation, reward, terminated, truncated, info = self.env.step(action)
        cost = self._cost(self._observation, action, next_observation, info)
        info = {**info, "cost": self._checked(cost)}
        self._observation = copy.deepcopy(next_observation)
        return next_observation, reward, terminated, truncated, info


class SixValueAdapter(_CostReporter):
    """Steps of ``(observation, reward, cost, terminated, truncated, info)`` as gymnasium's five.

    The cost moves into ``info["cost"]``. Steps that have five values already pass through, so it is
    safe around any environment. Gymnasium's own wrappers expect five values: put this one inside
    them. Raises `SaferlError` for another number of values and for a cost that is not a finite
    number of 0 or more.
    """

    def __init__(self, env: gymnasium.Env):
        super().__init__(env)

    def step(self, action):
        values = self.env.step(action)
        if len(values) == 5:
            return values
        if len(values) != 6:
            raise SaferlError(
                f"a step of {self.env} returned {len(values)} values: expected 5 (gymnasium) or 6 "
                "(observation, reward, cost, terminated, truncated, info)"
            )
        observation, reward, cost, terminated, truncated, info = values
        info = {**info, "cost": self._checked(cost)}
        return observation, reward, terminated, truncated, info


def adapt_cost(env: gymnasium.Env) -> gymnasium.Env:
    """``env`` with five-value steps and its cost in ``info["cost"]``; see `SixValueAdapter`."""
    return env if isinstance(env, SixValueAdapter) else SixValueAdapter(env)


class FlattenActions(gymnasium.ActionWrapper, RecordConstructorArgs):
    """``MultiDiscrete`` or ``MultiBinary`` actions as one integer, the first number slowest.

    >>> env = FlattenActions(env)  # MultiDiscrete([3, 4]) to Discrete(12)  # doctest: +SKIP

    The same integers as those of a dataset that is loaded with ``action_levels=env.levels``, and as
    a guardian's with ``levels``. `number` is the way back, for actions that were logged elsewhere.

    Raises `SaferlError` when the environment's actions are neither.
    """

    def __init__(self, env: gymnasium.Env):
        levels = action_levels(env.action_space)
        if levels is None:
            raise SaferlError(
                f"FlattenActions is for MultiDiscrete and MultiBinary actions, got "
                f"{env.action_space}: leave it out"
            )
        RecordConstructorArgs.__init__(self)
        gymnasium.ActionWrapper.__init__(self, env)
        self.levels = levels
        self.action_space = gymnasium.spaces.Discrete(math.prod(levels))

    def action(self, action: Any) -> np.ndarray:
        """The numbers that the environment takes, from one integer."""
        space = self.env.action_space
        numbers = np.array(np.unravel_index(int(action), self.levels)).reshape(space.shape)
        return (numbers + getattr(space, "start", 0)).astype(space.dtype)

    def number(self, action: Any) -> int:
        """One integer from the numbers that the environment takes."""
        digits = np.ravel(np.asarray(action) - getattr(self.env.action_space, "start", 0))
        return int(np.ravel_multi_index(tuple(digits.astype(int)), self.levels))
