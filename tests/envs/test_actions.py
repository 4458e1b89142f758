"""Actions of environments that count from another number, or have several numbers."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete

from saferl.data import Dataset
from saferl.envs import FlattenActions
from saferl.errors import SaferlError
from saferl.rollout import VectorEnv
from saferl.spec import Spec

SPACES = [
    MultiDiscrete([3, 4, 2], start=[1, 0, 5]),
    MultiDiscrete([[2, 3], [2, 2]]),
    MultiBinary(3),
]


class Told(gymnasium.Env):
    """Keeps the actions that it is given."""

    observation_space = Box(-1.0, 1.0, (2,))

    def __init__(self, space):
        self.action_space, self.actions = space, []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.actions.append(action)
        return np.zeros(2, np.float32), 0.0, False, False, {}


def played(env, count: int) -> list:
    """What the environment is told when actions 0 … count - 1 are executed."""
    vector_env = VectorEnv(lambda: env, 1, 100)
    vector_env.begin(0)
    vector_env.start(0, 0)
    for action in range(count):
        vector_env.step(np.array([action]))
    return env.unwrapped.actions


def test_an_environments_own_numbers_are_told():
    assert played(Told(Discrete(3, start=1)), 3) == [1, 2, 3]
    assert Spec.from_spaces(Told.observation_space, Discrete(3, start=1)).action_dim == 3


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_one_integer_is_the_combination_that_the_data_give_it(space):
    env = FlattenActions(Told(space))
    total = int(np.prod(env.levels))
    told = np.array(played(env, total))
    digits = told.reshape(total, -1) - np.ravel(getattr(space, "start", 0))
    n = np.arange(total)
    dataset = Dataset.from_arrays(
        np.zeros((total, 2)), digits, n, n == n[-1], action_levels=env.levels
    )
    assert dataset.actions.tolist() == n.tolist()
    assert dataset.action_dim == env.action_space.n == total
    assert [env.number(action) for action in told] == n.tolist()
    assert len({action.tobytes() for action in told}) == total


def test_several_numbers_without_the_wrapper_are_an_error_that_says_how():
    for make in (
        lambda space: VectorEnv(lambda: Told(space), 1, 100),
        lambda space: Spec.from_spaces(Told.observation_space, space),
    ):
        with pytest.raises(SaferlError, match=r"saferl.envs.FlattenActions.*levels=\(3, 4, 2\)"):
            make(SPACES[0])
        with pytest.raises(SaferlError, match="neither Box nor Discrete: wrap"):
            make(Dict({"a": Discrete(2)}))
    with pytest.raises(SaferlError, match="FlattenActions is for MultiDiscrete and MultiBinary"):
        FlattenActions(Told(Discrete(3)))


def test_data_that_count_from_one_are_told_how_to_be_loaded():
    vector_env = VectorEnv(lambda: Told(Discrete(4, start=1)), 1, 100)
    with pytest.raises(SaferlError, match="one of 4 .*one of 5 .*load them with action_start=1"):
        vector_env.check(Spec(2, 5, discrete=True))
    vector_env.check(Spec(2, 4, discrete=True))
