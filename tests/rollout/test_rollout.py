import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from saferl.errors import SaferlError
from saferl.evaluation import Evaluator, check_spaces, collect_transitions, rollout
from saferl.registry import make_env
from saferl.rng import MemberRandom
from saferl.rollout import episodes as episodes_module
from saferl.rollout import vector_env
from saferl.spec import Spec

# By its name, because the package exports a function that is called the same.


class Count(gymnasium.Env):
    """Observes (start, step); reward = the action executed; ends after 3 + start steps."""

    observation_space = spaces.Box(-100, 100, (2,), np.float64)
    action_space = spaces.Box(-1, 1, (1,), np.float32)
    cost: float | None = 0.25

    def __init__(self):
        self.closed = False

    def observe(self):
        return np.array([self.start, self.step_number], np.float64)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.start, self.step_number = int(self.np_random.integers(5)), 0
        return self.observe(), {}

    def step(self, action):
        self.step_number += 1
        ended = self.step_number == 3 + self.start
        info = {} if self.cost is None else {"cost": self.cost}
        return self.observe(), float(action.item()), ended, False, info

    def close(self):
        self.closed = True


def lengths_of(seeds):
    env = Count()
    return [3 + int(env.reset(seed=int(seed))[0][0]) for seed in seeds]


class Constant:
    """One fixed action per member."""

    def __init__(self, *actions):
        self.members = len(actions)
        self.actions = torch.tensor(actions)

    def __call__(self, observations):
        assert observations.dtype == torch.float32 and len(observations) == self.members
        return self.actions[:, None, None].expand(-1, observations.shape[1], 1)


def test_every_member_plays_the_same_episodes_with_its_own_actions():
    result = rollout(Constant(0.5, -1.0, 7.0), Count, episodes=6, seed=3)
    lengths = lengths_of(range(3, 9))
    assert len(set(lengths)) > 2
    np.testing.assert_array_equal(result.lengths, [lengths] * 3)
    np.testing.assert_allclose(result.costs, 0.25 * result.lengths)
    # 7 lies outside the Box and is executed as 1.
    np.testing.assert_allclose(result.returns, np.outer([0.5, -1, 1], lengths))


def test_unsupported_steps_are_counted_for_each_episode():
    class Guardian:
        """Calls positive actions on odd steps unsupported."""

        def is_ood(self, observations, actions):
            assert observations.shape[1:] == (2,) and actions.shape[1:] == (1,)
            return (observations[:, 1] % 2 == 1) & (actions[:, 0] > 0)

    policy = Constant(0.5, -1.0)
    result = rollout(policy, Count, episodes=7, seed=3, guardian=Guardian())
    lengths = np.array(lengths_of(range(3, 10)))  # steps 0 … length - 1, of which half are odd
    np.testing.assert_array_equal(result.ood, [lengths // 2, 0 * lengths])
    assert result.replaced is None and rollout(policy, Count, episodes=2).ood is None


def test_actions_may_depend_on_member_and_observation():
    class Start(torch.nn.Module):
        members = 2

        def forward(self, observations):
            return observations[..., :1] * torch.tensor([0.125, -0.125])[:, None, None]

    result = rollout(Start(), Count, episodes=5)
    lengths = np.array(lengths_of(range(5)))
    expected = 0.125 * (lengths - 3) * lengths
    np.testing.assert_allclose(result.returns, [expected, -expected])


def test_episodes_queue_for_slots(monkeypatch):
    whole = rollout(Constant(0.5, 1.0), Count, episodes=7, seed=1)
    monkeypatch.setattr(episodes_module, "SLOTS", 4)
    made = []
    queued = rollout(Constant(0.5, 1.0), lambda: made.append(Count()) or made[-1], 7, seed=1)
    assert len(made) == 4
    np.testing.assert_array_equal(whole.lengths, queued.lengths)
    np.testing.assert_array_equal(whole.returns, queued.returns)


def test_an_evaluator_reuses_its_environments_and_closes_them():
    made = []
    with Evaluator(lambda: made.append(Count()) or made[-1], members=2, episodes=3) as evaluator:
        first = evaluator.run(Constant(0.5, 1.0), seed=1)
        other = evaluator.run(Constant(0.5, 1.0), seed=7)
        again = evaluator.run(Constant(0.5, 1.0), seed=1)
        with pytest.raises(SaferlError, match="made for 2 members, the policy has 1"):
            evaluator.run(Constant(0.5))
    assert len(made) == 6 and all(env.closed for env in made)
    np.testing.assert_array_equal(first.lengths, again.lengths)
    assert (first.lengths != other.lengths).any()


def test_environments_are_closed_when_one_cannot_be_made():
    made = []

    def factory():
        if len(made) == 2:
            raise RuntimeError("no more")
        made.append(Count())
        return made[-1]

    with pytest.raises(RuntimeError, match="no more"):
        Evaluator(factory, episodes=3)
    assert [env.closed for env in made] == [True, True]


def test_costs_none_absent_sometimes_and_as_a_sixth_value():
    class Costless(Count):
        cost = None

    class Rarely(Costless):
        def step(self, action):
            *rest, info = super().step(action)
            return *rest, {"cost": np.float32(2)} if self.step_number == 2 else info

    class Six(Costless):
        def step(self, action):
            observation, reward, *ends, info = super().step(action)
            return observation, reward, 3.0, *ends, info

    assert rollout(Constant(1.0), Costless, 2).costs is None
    np.testing.assert_array_equal(rollout(Constant(1.0), Rarely, 3).costs, [[2, 2, 2]])
    six = rollout(Constant(1.0), Six, 3)
    np.testing.assert_array_equal(six.costs, 3.0 * six.lengths)


def test_an_environment_without_an_end_is_cut(monkeypatch):
    class Endless(Count):
        def step(self, action):
            observation, reward, _, _, info = super().step(action)
            return observation, reward, False, False, info

    assert rollout(Constant(1.0), Endless, 2, horizon=7).lengths.tolist() == [[7, 7]]
    monkeypatch.setattr(vector_env, "HORIZON", 11)
    assert rollout(Constant(1.0), Endless, 2).lengths.tolist() == [[11, 11]]
    # The environment may end an episode earlier.
    limited = rollout(Constant(1.0), lambda: gymnasium.wrappers.TimeLimit(Endless(), 9), 1)
    assert limited.lengths.tolist() == [[9]]
    with pytest.raises(SaferlError, match="horizon must be 1 step or more"):
        rollout(Constant(1.0), Endless, 1, horizon=0)


def test_discrete_actions_dict_observations_and_a_gymnasium_id():
    def left(observations):
        assert observations.shape[2] == 4
        return np.zeros(observations.shape[:2], np.int64)

    result = rollout(left, "CartPole-v1", 3)
    assert (result.returns == result.lengths).all() and (result.lengths < 12).all()
    assert result.costs is None and result.env == "CartPole-v1"

    class Parts(Count):
        observation_space = spaces.Dict(
            {"kind": spaces.Discrete(3), "position": spaces.Box(-9, 9, (2, 2))}
        )
        action_space = spaces.Discrete(2, start=5)

        def observe(self):
            return {"kind": 1, "position": np.arange(4.0).reshape(2, 2)}

    def one(observations):
        assert observations[0, 0].tolist() == [0, 1, 0, 0, 1, 2, 3]
        return torch.ones(observations.shape[:2], dtype=torch.int64)

    # Index 1 is the second action, 6, which this environment takes as a reward.
    Parts.step = lambda self, action: Count.step(self, np.array(action))
    result = rollout(one, Parts, 2)
    np.testing.assert_array_equal(result.returns, 6 * result.lengths)


def broken(**changes):
    """A Count whose second episode (seed 1) goes wrong in its third step."""

    class Broken(Count):
        def reset(self, *, seed=None, options=None):
            self.bad = seed == 1
            return super().reset(seed=seed)

        def step(self, action):
            observation, reward, *rest = super().step(action)
            if self.bad and self.step_number == 3:
                if "raises" in changes:
                    raise ZeroDivisionError("physics exploded")
                observation = changes.get("observation", observation)
                reward = changes.get("reward", reward)
                rest[-1] = {"cost": changes.get("cost", 0.0)}
            return observation, reward, *rest

    return Broken


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"raises": True}, "ZeroDivisionError: physics exploded"),
        ({"observation": np.array([np.nan, 0])}, "non-finite observation"),
        ({"reward": float("inf")}, "non-finite reward"),
        ({"cost": float("nan")}, "non-finite cost"),
        ({"cost": [1.0, 2.0]}, "ValueError"),
    ],
)
def test_a_failing_environment_is_named_with_episode_and_step(changes, message):
    with pytest.raises(SaferlError) as error:
        rollout(Constant(1.0), broken(**changes), 3)
    text = str(error.value)
    assert text.startswith("Broken, episode 1 (reset with seed 1), step 3: ")
    assert message in text and "\n" not in text


def test_a_failing_policy_is_named():
    with pytest.raises(SaferlError, match=r"Count, episode 0 .*, step 0: .*non-finite action"):
        rollout(Constant(float("nan")), Count, 1)
    with pytest.raises(SaferlError, match=r"actions of shape \(1, 2\), expected \(1, 2, 1\)"):
        rollout(lambda observations: observations[..., 0], Count, 2)


class Screen(gymnasium.Env):
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, shape, dtype):
        self.observation_space = gymnasium.spaces.Box(0, 255, shape, dtype)


def test_spaces_are_compared_with_what_the_policy_was_trained_on():
    check_spaces(Count, Spec(2, 1))
    check_spaces(Count(), Spec(2, 1))
    with pytest.raises(SaferlError, match="observations of 2 numbers, but 3 are expected"):
        check_spaces(Count, Spec(3, 1))
    with pytest.raises(SaferlError, match=r"takes 1 continuous .* one of 1 discrete actions are"):
        check_spaces(Count, Spec(2, 1, discrete=True))
    with pytest.raises(SaferlError, match="CartPole-v1 takes one of 2 .* one of 4 .* expected"):
        check_spaces("CartPole-v1", Spec(4, 4, discrete=True))
    frames = Spec(12, 1, image=(3, 2, 2))
    for shape, dtype in (((2, 2, 3), np.uint8), ((3, 2, 2), np.float32)):
        screen = Screen(shape, dtype)
        with pytest.raises(
            SaferlError, match=r"images \(3, 2, 2\) of uint8 are expected, channels"
        ):
            check_spaces(screen, frames)
    check_spaces(Screen((3, 2, 2), np.uint8), frames)
    policy = Constant(1.0)
    policy.spec = Spec(2, 2)
    with pytest.raises(SaferlError, match=r"takes 1 continuous .* but 2 continuous"):
        rollout(policy, Count, 1)
    with pytest.raises(SaferlError, match="unknown environment 'Nowhere-v0'"):
        make_env("Nowhere-v0")


def test_environments_of_plugins_are_found_without_an_import():
    env = make_env("saferl/HopperVelocity-v0")
    assert env.spec.max_episode_steps == 1000
    env.close()


class Sampled(Constant):
    """Deterministic 0; sampled uniformly."""

    def sample(self, observations, random):
        return random.uniform(*observations.shape[1:-1], 1)


def episodes_of(arrays):
    ends = np.flatnonzero(arrays["terminals"] | arrays["timeouts"]) + 1
    assert ends[-1] == len(arrays["rewards"])
    return np.diff([0, *ends])


def test_collected_transitions_are_the_first_whole_episodes():
    arrays = collect_transitions(Sampled(0.0), Count, steps=300, seed=5, stochastic=True)
    lengths = episodes_of(arrays)
    assert lengths.tolist() == lengths_of(range(5, 5 + len(lengths)))
    assert lengths.sum() >= 300 > lengths[:-1].sum()
    for name in ("observations", "actions", "rewards", "costs", "next_observations"):
        assert arrays[name].dtype == np.float32 and len(arrays[name]) == lengths.sum()
    # Each row leads to the next one, and the reward is the action that was executed.
    inside = ~arrays["terminals"]
    following = np.flatnonzero(inside) + 1
    np.testing.assert_array_equal(
        arrays["next_observations"][inside], arrays["observations"][following]
    )
    np.testing.assert_array_equal(arrays["observations"][:3, 1], [0, 1, 2])
    np.testing.assert_array_equal(arrays["rewards"], arrays["actions"][:, 0])
    assert len(np.unique(arrays["actions"])) > 250
    assert (arrays["costs"] == 0.25).all() and not arrays["timeouts"].any()


def test_collecting_is_deterministic_and_its_sampling_is_optional():
    def collect(**options):
        return collect_transitions(Sampled(0.0), Count, 100, 2, **options)

    first, second = collect(stochastic=True), collect(stochastic=True)
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])
    other = collect(stochastic=True, random=MemberRandom([9]))
    assert (other["actions"] != first["actions"]).any()
    assert (collect()["actions"] == 0).all()
    # How many episodes run side by side changes nothing that is recorded.
    for name, value in collect(envs=3).items():
        np.testing.assert_array_equal(value, collect(envs=40)[name])


def test_a_cut_episode_is_a_timeout_and_a_simultaneous_end_a_terminal():
    arrays = collect_transitions(Constant(1.0), Count, 60, envs=4, horizon=4)
    lengths = episodes_of(arrays)
    natural = np.array(lengths_of(range(len(lengths))))
    assert lengths.tolist() == np.minimum(natural, 4).tolist()
    ends = np.cumsum(lengths) - 1
    assert arrays["terminals"][ends].tolist() == (natural <= 4).tolist()
    assert arrays["timeouts"][ends].tolist() == (natural > 4).tolist()
    assert arrays["timeouts"].any() and arrays["terminals"].any()


def test_equal_episodes_give_exactly_the_steps_asked_for():
    class Five(Count):
        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.start = 2
            return self.observe(), {}

    started = []

    class Counted(Five):
        def reset(self, *, seed=None, options=None):
            started.append(seed)
            return super().reset(seed=seed)

    assert len(collect_transitions(Constant(1.0), Counted, 100, envs=6)["rewards"]) == 100
    assert started == list(range(20))  # no episode was started in vain


def test_random_actions_fill_the_box_or_the_discrete_set():
    arrays = collect_transitions(None, Count, 400, seed=1)
    assert arrays["actions"].min() < -0.95 and arrays["actions"].max() > 0.95
    arrays = collect_transitions(None, "CartPole-v1", 200)
    assert arrays["actions"].shape == arrays["rewards"].shape
    assert arrays["actions"].dtype == np.int64 and set(arrays["actions"]) == {0, 1}
    assert arrays["costs"] is None


def test_what_cannot_be_collected_is_told():
    class Unbounded(Count):
        action_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)

    with pytest.raises(SaferlError, match="unbounded actions"):
        collect_transitions(None, Unbounded, 10)
    with pytest.raises(SaferlError, match="a policy of one member"):
        collect_transitions(Constant(0.0, 1.0), Count, 10)
    with pytest.raises(SaferlError, match="needs a policy with a sample method"):
        collect_transitions(Constant(0.0), Count, 10, stochastic=True)
    with pytest.raises(SaferlError, match="1 or more"):
        collect_transitions(None, Count, 0)
