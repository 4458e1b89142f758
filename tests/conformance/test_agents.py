"""What every registered agent must do, a third party's included."""

from __future__ import annotations

import dataclasses
import math

import gymnasium
import numpy as np
import pytest
import torch

from saferl.agents.shared.agent import Agent
from saferl.data import Dataset
from saferl.errors import SaferlError
from saferl.registry import agent_class, names
from saferl.replay import make_buffer
from saferl.rng import MemberRandom
from saferl.spec import Spec

AGENTS = names("agents")
LAYERS = ("hidden", "critic_hidden", "value_hidden", "vae_hidden")
SMALL = {key: [8, 8] for key in LAYERS} | {"samples": 2, "batch_size": 16}
SMALL |= {"inner_steps": 2, "random_steps": 1, "start_steps": 0}
SMALL |= {"channels": [4, 4], "strides": [2, 1], "features": 6}
ROWS, OBS, ACT = 64, 3, 2
IMAGE = (3, 9, 10)
# Settings without which a field has no effect.
NEEDS = {
    "target_gap": {"lagrange": True},
    "cost_discount": {"cost_limit": 0.2},
    "multiplier_lr": {"cost_limit": 0.2},
    "ood_value": {"guardian": "knn", "alpha": 0.5, "huber": 100.0},
}
OF_THE_RUN = {"exploration_budget", "offline_share"}  # fields that no update sees


@pytest.fixture(params=AGENTS)
def cls(request) -> type[Agent]:
    return agent_class(request.param)


def observations(cls, rng: np.random.Generator, *rows: int) -> np.ndarray:
    if cls.pixels:
        return rng.integers(256, size=(*rows, *IMAGE), dtype=np.uint8)
    return rng.normal(2, 3, (*rows, OBS))


def flat(cls, *rows: int) -> torch.Tensor:
    """Raw observations as a policy gets them."""
    raw = observations(cls, np.random.default_rng(1), *rows).astype(np.float32)
    return torch.from_numpy(raw).flatten(len(rows))


def dataset_for(cls) -> Dataset:
    rng = np.random.default_rng(0)
    ends = np.arange(ROWS) % 8 == 7
    return Dataset.from_arrays(
        observations(cls, rng, ROWS),
        rng.integers(4, size=ROWS) if cls.discrete else rng.uniform([-2, 0], [2, 10], (ROWS, ACT)),
        rng.normal(size=ROWS),
        ends & (rng.random(ROWS) < 0.5),
        ends,
        observations(cls, rng, ROWS),
        costs=rng.random(ROWS),
        id="conformance",
        **({"n_actions": 4} if cls.discrete else {"action_low": (-2, 0), "action_high": (2, 10)}),
    )


class Room(gymnasium.Env):
    """An environment that the rows of `dataset_for` might come from; episodes of 8 steps."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (OBS,), np.float32)
    action_space = gymnasium.spaces.Box(np.float32([-2, 0]), np.float32([2, 10]))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.np_random.normal(2, 3, OBS).astype(np.float32), {}

    def step(self, action):
        self.t += 1
        observation = self.np_random.normal(2, 3, OBS).astype(np.float32)
        return observation, float(action[0]), False, self.t >= 8, {"cost": 1.0}


def run_options(cls) -> dict:
    """What `saferl.train` needs besides a dataset."""
    return {"env": Room} if cls.online else {}


def make_config(cls, **settings):
    known = {field.name for field in dataclasses.fields(cls.Config)}
    return cls.make_config({k: v for k, v in SMALL.items() if k in known} | settings)


class Setup:
    """An agent with its buffer, as a run makes them."""

    def __init__(self, cls, members=(5, 6, 7), device="cpu", precision="fp32", **settings):
        config = make_config(cls, **settings)
        dataset = cls.prepare(dataset_for(cls), config)
        self.spec = dataset.spec(config)
        self.agent = cls(self.spec, config, members, device, precision)
        self.agent.fit(dataset, lambda line: None)
        extras = cls.batch_extras(config)
        self.buffer = make_buffer(dataset, self.spec, self.agent.seeds, device, extras)
        self.buffer.restrict(self.agent.rows(dataset))

    def train(self, updates: int) -> dict[str, torch.Tensor]:
        metrics = {}
        for _ in range(updates):
            metrics |= self.agent.update(self.buffer.sample(self.agent.batch_rows))
        return metrics

    def state(self) -> dict[str, torch.Tensor]:
        return {key: tensor.clone() for key, tensor in self.agent.state_dict().items()}


def learned(state: dict[str, torch.Tensor], cls: type[Agent]) -> dict[str, torch.Tensor]:
    """What has a member axis: all but counters, generators and tables that members share."""
    apart = ("random.", *cls.shared)
    return {k: v for k, v in state.items() if v.dim() and not k.startswith(apart)}


def test_metrics_are_finite_and_one_per_member(cls):
    setup = Setup(cls)
    before = setup.state()
    metrics = setup.train(4)
    assert metrics
    for name, value in metrics.items():
        assert value.shape == (3,), name
        assert torch.isfinite(value).all(), name
        assert not value.requires_grad, name
        assert name not in ("step", "member"), "columns of metrics.csv"
    after = setup.state()
    assert setup.agent.updates == 4
    assert all(torch.isfinite(tensor).all() for tensor in learned(after, cls).values())
    for m in range(3):  # every member learns
        assert any(not torch.equal(before[k][m], after[k][m]) for k in learned(before, cls))


def test_seeds_decide_everything(cls):
    one, two, other = Setup(cls), Setup(cls), Setup(cls, (8, 9, 10))
    for setup in (one, two, other):
        setup.train(5)
    assert all(torch.equal(one.state()[key], tensor) for key, tensor in two.state().items())
    for key, tensor in learned(one.state(), cls).items():
        if tensor.numel() > 3:
            assert not torch.equal(tensor, other.state()[key]), key


def test_a_member_among_others_is_that_member_alone(cls):
    """To rounding: products of three matrices at once may sum in another order than one's."""
    three, alone = Setup(cls), Setup(cls, (6,))
    three.train(20)
    alone.train(20)
    mine = learned(alone.state(), cls)
    for key, tensor in learned(three.state(), cls).items():
        torch.testing.assert_close(tensor[1], mine[key][0], rtol=1e-4, atol=1e-5, msg=key)
    if cls.discrete:
        return
    rows = flat(cls, 1, 50)
    together = three.agent.policy()(rows.expand(3, -1, -1))
    torch.testing.assert_close(together[1], alone.agent.policy()(rows)[0], rtol=1e-4, atol=1e-4)


def test_resumed_is_uninterrupted_to_the_bit(cls):
    whole, first, second = Setup(cls), Setup(cls), Setup(cls)
    whole.train(10)
    first.train(5)
    second.agent.load_state_dict(first.agent.state_dict())
    second.buffer.load_state_dict(first.buffer.state_dict())
    second.train(5)
    expected = whole.state()
    assert expected.keys() == second.state().keys()
    for key, tensor in second.state().items():
        assert torch.equal(tensor, expected[key]), key
    first.train(5)  # loading copied, so the first agent has gone on from its own state
    for key, tensor in first.state().items():
        assert torch.equal(tensor, expected[key]), key


@pytest.mark.parametrize(
    "name,field",
    [
        (name, field)
        for name in AGENTS
        for field in sorted(agent_class(name).per_member - OF_THE_RUN)
    ],
)
def test_a_value_per_member_is_a_run_of_its_own(name, field):
    cls = agent_class(name)
    default = float(getattr(make_config(cls), field))
    # No default is 0.4; one that is infinite, which is off, gives way to two that are on.
    values = [default, 0.5 * default + 0.2] if math.isfinite(default) else [0.2, 2.0]
    extra = NEEDS.get(field, {})
    both = Setup(cls, (5, 5), **{field: values}, **extra)
    both.train(10)
    states = []
    for m, value in enumerate(values):
        single = Setup(cls, (5,), **{field: value}, **extra)
        single.train(10)
        states.append(learned(single.state(), cls))
        for key, tensor in learned(both.state(), cls).items():
            torch.testing.assert_close(
                tensor[m], states[m][key][0], rtol=1e-4, atol=1e-5, msg=f"{key} of member {m}"
            )
    assert any(not torch.allclose(states[0][k], states[1][k], atol=1e-4) for k in states[0])


def test_configuration_errors_say_what_to_do(cls):
    with pytest.raises(SaferlError, match="unknown config key 'dicsount': did you mean 'discount'"):
        cls.make_config({"dicsount": 0.9})
    with pytest.raises(SaferlError, match="batch_size = 'many' is not a whole number"):
        cls.make_config({"batch_size": "many"})
    with pytest.raises(SaferlError, match="discount = True is not a number"):
        cls.make_config({"discount": True})
    with pytest.raises(SaferlError, match="normalize_rewards = 1 is not true or false"):
        cls.make_config({"normalize_rewards": 1})
    for name, values in (("reward_scale", [1.0, 2.0]), ("batch_size", [64, 128])):
        with pytest.raises(SaferlError, match=f"{name} cannot differ between members; these can"):
            cls.make_config({name: values})
    for field in dataclasses.fields(cls.Config):
        wrong = None
        if isinstance(field.default, tuple):
            wrong = [8, 0], f"{field.name} takes numbers of 1 or more, got .8, 0."
        elif field.name.endswith("lr"):
            wrong = -1, f"{field.name} must be 0 or more, got -1"
        elif field.name == "tau":
            wrong = 7, "tau must be 0 or more and at most 1, got 7"
        elif field.name in ("batch_size", "policy_interval"):
            wrong = 0, f"{field.name} must be 1 or more, got 0"
        if wrong is not None:
            with pytest.raises(SaferlError, match=wrong[1]):
                cls.make_config({field.name: wrong[0]})
    spec = Setup(cls).spec
    for field in cls.per_member:
        with pytest.raises(SaferlError, match=f"{field} has 2 values for 3 members"):
            cls(spec, make_config(cls, **{field: [0.5, 0.6]}), 3)


def test_the_other_kind_of_action_space_is_an_error(cls):
    wrong = Spec(OBS, 2, discrete=not cls.discrete, action_low=(-1, -1), action_high=(1, 1))
    with pytest.raises(SaferlError, match=r"is for .* actions but the task's are"):
        cls(wrong, make_config(cls), 1)


def test_the_other_kind_of_observations_is_an_error(cls):
    if cls.pixels is None:
        pytest.skip("learns from both")
    spec = dataclasses.replace(Setup(cls).spec, image=() if cls.pixels else IMAGE)
    with pytest.raises(SaferlError, match="learns from .* but the task's observations are"):
        cls(spec, make_config(cls), 1)


def test_every_field_is_documented_and_frozen(cls):
    config = make_config(cls)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.discount = 0.5
    fields = {field.name for field in dataclasses.fields(cls.Config)}
    assert cls.per_member <= fields
    assert cls.Config.__doc__ and not cls.Config.__doc__.startswith(cls.Config.__name__ + "(")


def test_policy_maps_raw_observations_to_raw_actions(cls):
    setup = Setup(cls, normalize_observations=not cls.pixels)
    setup.train(3)
    policy = setup.agent.policy()
    raw = flat(cls, 3, 40)
    for actions in (policy(raw), policy.sample(raw, MemberRandom((5, 6, 7)))):
        if cls.discrete:
            assert actions.shape == (3, 40)
            assert actions.dtype == torch.int64
            assert 0 <= actions.min() <= actions.max() < 4
        else:
            assert actions.shape == (3, 40, ACT)
            for component, (low, high) in enumerate([(-2, 2), (0, 10)]):
                assert low - 1e-5 <= actions[..., component].min()
                assert actions[..., component].max() <= high + 1e-5
    assert torch.equal(policy(raw), policy(raw))
    # The same weights on observations that were normalised before.
    plain = dataclasses.replace(setup.spec, observation_mean=(), observation_std=())
    inner = type(policy)(setup.agent.actor, plain, 3)
    normalised = np.stack([setup.spec.observations(rows.numpy()) for rows in raw])
    again = inner(torch.from_numpy(normalised))
    torch.testing.assert_close(policy(raw), again, rtol=1e-4, atol=1e-4)


def test_policy_follows_training(cls):
    """The policy shares the agent's weights, so the last update is in it."""
    setup = Setup(cls)
    policy = setup.agent.policy()
    before = {key: tensor.clone() for key, tensor in policy.state_dict().items()}
    setup.train(4)
    assert any(not torch.equal(before[k], v) for k, v in policy.state_dict().items())
