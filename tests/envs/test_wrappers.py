"""Costs of one's own on any environment, and six-value steps."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest

from saferl.envs.wrappers import CostWrapper, SixValueAdapter, adapt_cost
from saferl.errors import SaferlError


class Counter(gymnasium.Env):
    """The observation counts steps; it is the same array every time, as in some simulators."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float64)
    action_space = gymnasium.spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = np.zeros(1)
        return self.count, {"cost": 100.0}

    def step(self, action):
        self.count += 1
        return self.count, 1.0, False, self.count[0] >= 3, {"cost": 100.0, "blood pressure": 7.0}


class SixValues(Counter):
    cost = 2

    def step(self, action):
        observation, reward, terminated, truncated, _ = super().step(action)
        return observation, reward, self.cost, terminated, truncated, {"goal": True}


def test_cost_function_sees_the_transition():
    seen = []

    def cost(observation, action, next_observation, info):
        seen.append((observation.item(), action, next_observation.item(), info["blood pressure"]))
        return info["cost"] + action

    env = CostWrapper(Counter(), cost)
    env.reset(seed=0)
    infos = [env.step(action)[4] for action in (0, 2, 1)]
    assert seen == [(0.0, 0, 1.0, 7.0), (1.0, 2, 2.0, 7.0), (2.0, 1, 3.0, 7.0)]
    assert infos == [{"cost": 100.0 + a, "blood pressure": 7.0} for a in (0, 2, 1)]
    env.reset()
    env.step(0)
    assert seen[3][0] == 0.0  # a new episode starts from the reset observation


def test_cost_of_a_registered_environment():
    env = CostWrapper(gymnasium.make("CartPole-v1"), lambda o, a, n, i: np.bool_(n[1] > 0))
    env.reset(seed=0)
    steps = [env.step(action) for action in (0, 0, 1, 1, 1, 1, 0)]
    assert [step[4]["cost"] for step in steps] == [float(step[0][1] > 0) for step in steps]
    assert {step[4]["cost"] for step in steps} == {0.0, 1.0}
    again = gymnasium.make(env.spec)  # the wrapper is part of the recipe
    again.reset(seed=0)
    assert again.step(0)[4]["cost"] in (0.0, 1.0)


@pytest.mark.parametrize("wrong", [-0.5, float("nan"), float("inf"), None, "a", np.ones(2)])
def test_a_cost_that_is_none_is_an_error(wrong):
    env = CostWrapper(Counter(), lambda *transition: wrong)
    env.reset()
    with pytest.raises(SaferlError, match=r"cost of a step .* must be"):
        env.step(0)
    six = SixValues()
    six.cost = wrong
    six.reset()
    with pytest.raises(SaferlError, match=r"cost of a step .* must be"):
        adapt_cost(six).step(0)


def test_errors_say_what_to_do():
    with pytest.raises(SaferlError, match=r"needs one gymnasium\.Env, got object"):
        CostWrapper(object(), lambda *transition: 0.0)
    with pytest.raises(SaferlError, match=r"needs one gymnasium\.Env"):
        adapt_cost(gymnasium.make_vec("CartPole-v1", num_envs=1, vectorization_mode="sync"))
    with pytest.raises(SaferlError, match="needs a function"):
        CostWrapper(Counter(), 1.0)
    with pytest.raises(SaferlError, match=r"call reset\(\) before"):
        CostWrapper(Counter(), lambda *transition: 0.0).step(0)


def test_six_values_become_five():
    env = adapt_cost(SixValues())
    env.reset()
    observation, reward, terminated, truncated, info = env.step(0)
    assert (observation.item(), reward, terminated, truncated) == (1.0, 1.0, False, False)
    assert info == {"cost": 2.0, "goal": True} and type(info["cost"]) is float
    assert adapt_cost(env) is env
    # Gymnasium's wrappers and a cost function fit around it.
    limited = gymnasium.wrappers.TimeLimit(adapt_cost(SixValues()), 2)
    doubled = CostWrapper(limited, lambda o, a, n, info: 2 * info["cost"])
    doubled.reset()
    assert [doubled.step(0)[3:] for _ in range(2)] == [
        (False, {"cost": 4.0, "goal": True}),
        (True, {"cost": 4.0, "goal": True}),
    ]


def test_five_values_pass_through_and_others_do_not():
    env = SixValueAdapter(Counter())
    env.reset()
    assert env.step(0)[4] == {"cost": 100.0, "blood pressure": 7.0}

    class Old(Counter):
        def step(self, action):
            return self.count, 0.0, False, {}

    env = SixValueAdapter(Old())
    env.reset()
    with pytest.raises(SaferlError, match="returned 4 values: expected 5"):
        env.step(0)


def test_d4rl_ant_is_ant_v4_with_zeros():
    import numpy as np

    from saferl.registry import make_env

    ant, padded = make_env("Ant-v4"), make_env("saferl/D4RLAnt-v0")
    assert padded.observation_space.shape == (111,) and padded.spec.max_episode_steps == 1000
    first, _ = ant.reset(seed=3)
    other, _ = padded.reset(seed=3)
    action = np.full(8, 0.3, np.float32)
    for a, b in ((first, other), (ant.step(action)[0], padded.step(action)[0])):
        np.testing.assert_array_equal(b, np.concatenate([a, np.zeros(84)]))
