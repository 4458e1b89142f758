"""What every agent must do, checked on a small random task: ``saferl check NAME`` runs it.

A check is a function of the agent class that raises an error where it fails. `AGENT_CHECKS` lists
them; a test suite can run each by itself:

    @pytest.mark.parametrize("check", AGENT_CHECKS, ids=lambda check: check.__name__)
    def test_mine(check):
        check(Mine)
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import gymnasium
import numpy as np
import torch
from torch import Tensor

from saferl.data.dataset import Dataset
from saferl.errors import SaferlError
from saferl.replay import make_buffer
from saferl.rng import MemberRandom
from saferl.spec import Spec
from saferl.training import compiled
from saferl.training.engine import Engine

ROWS, OBSERVATIONS, ACTIONS, CHOICES = 64, 3, 2, 4
IMAGE = (3, 9, 10)
# Settings that make any agent small; those that it has not are left out.
SMALL: dict[str, Any] = {
    key: [8, 8] for key in ("hidden", "critic_hidden", "value_hidden", "vae_hidden")
}
SMALL |= {"samples": 2, "batch_size": 16, "inner_steps": 2, "random_steps": 1, "start_steps": 0}
SMALL |= {"channels": [4, 4], "strides": [2, 1], "features": 6}
SMALL |= {"episodes": 8, "horizon": 6, "critic_updates": 2, "cg_iterations": 3, "clone_updates": 2}
# Per-member fields that no update sees.
OF_THE_RUN = {"exploration_budget", "offline_share"}
# Settings without which a field has no effect.
NEEDS: dict[str, dict[str, Any]] = {
    "target_gap": {"lagrange": True},
    "cost_discount": {"cost_limit": 0.2},
    "multiplier_lr": {"cost_limit": 0.2},
    "ood_value": {"guardian": "knn", "alpha": 0.5, "huber": 100.0},
}


class Room(gymnasium.Env):
    """An environment that the rows of `task_for` might come from; episodes of 8 steps, cost 1."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (OBSERVATIONS,), np.float32)
    action_space = gymnasium.spaces.Box(
        np.array([-2, 0], np.float32), np.array([2, 10], np.float32)
    )

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.t = 0
        return self.np_random.normal(2, 3, OBSERVATIONS).astype(np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        self.t += 1
        observation = self.np_random.normal(2, 3, OBSERVATIONS).astype(np.float32)
        return observation, float(action[0]), False, self.t >= 8, {"cost": 1.0}


def observations(cls: Any, rng: np.random.Generator, *rows: int) -> np.ndarray:
    """Raw observations of the kind that an agent class learns from."""
    if cls.pixels:
        return rng.integers(256, size=(*rows, *IMAGE), dtype=np.uint8)
    return rng.normal(2, 3, (*rows, OBSERVATIONS))


def flat(cls: Any, *rows: int) -> Tensor:
    """Raw observations as a policy gets them."""
    raw = observations(cls, np.random.default_rng(1), *rows).astype(np.float32)
    return torch.from_numpy(raw).flatten(len(rows))


def task_for(cls: Any, rows: int = ROWS) -> Dataset:
    """Random transitions of the agent's kind of actions, with costs; episodes of 8 steps."""
    rng = np.random.default_rng(0)
    ends = np.arange(rows) % 8 == 7
    first = observations(cls, rng, rows)
    actions: np.ndarray
    bounds: dict[str, Any]
    if cls.discrete:
        actions, bounds = rng.integers(CHOICES, size=rows), {"n_actions": CHOICES}
    else:
        actions = rng.uniform([-2, 0], [2, 10], (rows, ACTIONS))
        bounds = {"action_low": (-2, 0), "action_high": (2, 10)}
    return Dataset.from_arrays(
        first,
        actions,
        rng.normal(size=rows),
        ends & (rng.random(rows) < 0.5),
        ends,
        observations(cls, rng, rows),
        costs=rng.random(rows),
        id="conformance",
        **bounds,
    )


def small_config(cls: Any, **settings: Any) -> Any:
    """A small configuration of an agent class, and ``settings``."""
    known = {field.name for field in dataclasses.fields(cls.Config)}
    return cls.make_config({k: v for k, v in SMALL.items() if k in known} | settings)


class Trial:
    """An agent with its buffer, as a run makes them."""

    def __init__(
        self,
        cls: Any,
        members: tuple[int, ...] = (5, 6, 7),
        device: str = "cpu",
        precision: str = "fp32",
        dataset: Dataset | None = None,
        **settings: Any,
    ):
        config = small_config(cls, **settings)
        data = cls.prepare(task_for(cls) if dataset is None else dataset, config)
        self.spec = data.spec(config)
        self.agent = cls(self.spec, config, members, device, precision)
        self.agent.fit(data, lambda line: None)
        extras = cls.batch_extras(config)
        self.buffer = make_buffer(data, self.spec, self.agent.seeds, device, extras)
        self.buffer.restrict(self.agent.rows(data))

    def train(self, updates: int) -> dict[str, Tensor]:
        """So many updates; every metric as it was last given."""
        metrics: dict[str, Tensor] = {}
        for _ in range(updates):
            metrics |= self.agent.update(self.buffer.sample(self.agent.batch_rows))
        return metrics

    def state(self) -> dict[str, Tensor]:
        """A copy of the agent's state."""
        return {key: tensor.clone() for key, tensor in self.agent.state_dict().items()}


def learned(state: dict[str, Tensor], cls: Any) -> dict[str, Tensor]:
    """What has a member axis: all but counters, generators and tables that members share."""
    apart = ("random.", *cls.shared)
    return {k: v for k, v in state.items() if v.dim() and not k.startswith(apart)}


@contextmanager
def refused(match: str) -> Iterator[None]:
    """The block must raise a `SaferlError` whose message matches."""
    try:
        yield
    except SaferlError as error:
        if not re.search(match, str(error)):
            raise AssertionError(f"expected an error like {match!r}, got {error}") from error
        return
    raise AssertionError(f"expected an error like {match!r}, and none came")


def equal(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal keys, and tensors to the bit."""
    assert state.keys() == expected.keys(), sorted(state.keys() ^ expected.keys())
    for key, tensor in state.items():
        assert torch.equal(tensor, expected[key]), f"{key} differs"


# Checks -------------------------------------------------------------------------------------------


def metrics_are_finite_and_one_per_member(cls: Any) -> None:
    """Metrics are finite, ``[M]``, without gradient; every member learns."""
    trial = Trial(cls)
    before = trial.state()
    metrics = trial.train(4)
    assert metrics, "learn returned no metrics"
    for name, value in metrics.items():
        assert value.shape == (3,), f"{name} has shape {list(value.shape)}, expected [members]"
        assert torch.isfinite(value).all(), f"{name} is not finite"
        assert not value.requires_grad, f"{name} carries a gradient: detach it"
        assert name not in ("step", "member"), f"{name} is a column of metrics.csv"
    after = trial.state()
    assert trial.agent.updates == 4
    assert all(torch.isfinite(tensor).all() for tensor in learned(after, cls).values())
    for m in range(3):
        moved = any(not torch.equal(before[k][m], after[k][m]) for k in learned(before, cls))
        assert moved, f"member {m} did not learn"


def seeds_decide_everything(cls: Any) -> None:
    """Equal seeds give equal states to the bit, other seeds give others."""
    one, two, other = Trial(cls), Trial(cls), Trial(cls, (8, 9, 10))
    for trial in (one, two, other):
        trial.train(5)
    equal(two.state(), one.state())
    for key, tensor in learned(one.state(), cls).items():
        if tensor.numel() > 3:
            assert not torch.equal(tensor, other.state()[key]), f"{key} ignores the seed"


def a_member_among_others_is_that_member_alone(cls: Any) -> None:
    """Member i of M equals that member alone, to rounding: losses are sums over members."""
    three, alone = Trial(cls), Trial(cls, (6,))
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


def resumed_is_uninterrupted_to_the_bit(cls: Any) -> None:
    """A state that is saved and loaded goes on as if nothing had happened."""
    whole, first, second = Trial(cls), Trial(cls), Trial(cls)
    whole.train(10)
    first.train(5)
    second.agent.load_state_dict(first.agent.state_dict())
    second.buffer.load_state_dict(first.buffer.state_dict())
    second.train(5)
    equal(second.state(), whole.state())
    first.train(5)  # loading copied, so the first agent has gone on from its own state
    equal(first.state(), whole.state())


def a_value_per_member_is_a_run_of_its_own(cls: Any, fields: list[str] | None = None) -> None:
    """Every per-member field acts on its member alone, and it acts."""
    for field in sorted(cls.per_member - OF_THE_RUN) if fields is None else fields:
        default = float(getattr(small_config(cls), field))
        # No default is 0.4; one that is infinite, which is off, gives way to two that are on.
        values = [default, 0.5 * default + 0.2] if math.isfinite(default) else [0.2, 2.0]
        extra = NEEDS.get(field, {})
        settings: dict[str, Any] = {field: values}
        both = Trial(cls, (5, 5), **settings, **extra)
        both.train(10)
        states = []
        for m, value in enumerate(values):
            settings = {field: value}
            single = Trial(cls, (5,), **settings, **extra)
            single.train(10)
            states.append(learned(single.state(), cls))
            for key, tensor in learned(both.state(), cls).items():
                torch.testing.assert_close(
                    tensor[m], states[m][key][0], rtol=1e-4, atol=1e-5,
                    msg=f"{key} of member {m} under {field}={value}",
                )  # fmt: skip
        moved = any(not torch.allclose(states[0][k], states[1][k], atol=1e-4) for k in states[0])
        assert moved, f"{field} has no effect"


def configuration_errors_say_what_to_do(cls: Any) -> None:
    """Unknown keys, wrong types and values out of range are one line each."""
    with refused("unknown config key 'dicsount': did you mean 'discount'"):
        cls.make_config({"dicsount": 0.9})
    with refused("batch_size = 'many' is not a whole number"):
        cls.make_config({"batch_size": "many"})
    with refused("discount = True is not a number"):
        cls.make_config({"discount": True})
    with refused("normalize_rewards = 1 is not true or false"):
        cls.make_config({"normalize_rewards": 1})
    for name, values in (("reward_scale", [1.0, 2.0]), ("batch_size", [64, 128])):
        with refused(f"{name} cannot differ between members; these can"):
            cls.make_config({name: values})
    spec = Trial(cls).spec
    for field in cls.per_member:
        with refused(f"{field} has 2 values for 3 members"):
            cls(spec, small_config(cls, **{field: [0.5, 0.6]}), 3)


def another_kind_of_task_is_an_error(cls: Any) -> None:
    """The other kind of actions, or of observations, is refused in one line."""
    wrong = Spec(OBSERVATIONS, 2, discrete=not cls.discrete, action_low=(-1, -1),
                 action_high=(1, 1))  # fmt: skip
    with refused(r"is for .* actions but the task's are"):
        cls(wrong, small_config(cls), 1)
    if cls.pixels is not None:
        spec = dataclasses.replace(Trial(cls).spec, image=() if cls.pixels else IMAGE)
        with refused("learns from .* but the task's observations are"):
            cls(spec, small_config(cls), 1)


def the_config_is_frozen_and_documented(cls: Any) -> None:
    """The config is a frozen dataclass with a docstring; per-member names are fields of it."""
    config = small_config(cls)
    try:
        config.discount = 0.5
    except dataclasses.FrozenInstanceError:
        pass
    else:
        raise AssertionError(f"{cls.Config.__name__} is not frozen")
    fields = {field.name for field in dataclasses.fields(cls.Config)}
    assert cls.per_member <= fields, f"no fields: {sorted(cls.per_member - fields)}"
    text = cls.Config.__doc__ or ""
    assert text and not text.startswith(cls.Config.__name__ + "("), "the config has no docstring"


def the_policy_maps_raw_observations_to_raw_actions(cls: Any) -> None:
    """The policy takes raw observations and gives raw actions within the bounds."""
    trial = Trial(cls, normalize_observations=not cls.pixels)
    trial.train(3)
    policy = trial.agent.policy()
    raw = flat(cls, 3, 40)
    for actions in (policy(raw), policy.sample(raw, MemberRandom((5, 6, 7)))):
        if cls.discrete:
            assert actions.shape == (3, 40), f"actions have shape {list(actions.shape)}"
            assert actions.dtype == torch.int64
            assert 0 <= actions.min() <= actions.max() < CHOICES
        else:
            assert actions.shape == (3, 40, ACTIONS), f"actions have shape {list(actions.shape)}"
            for component, (low, high) in enumerate([(-2, 2), (0, 10)]):
                assert low - 1e-5 <= actions[..., component].min()
                assert actions[..., component].max() <= high + 1e-5
    assert torch.equal(policy(raw), policy(raw))
    # The same weights on observations that were normalised before.
    unscaled = dataclasses.replace(trial.spec, observation_mean=(), observation_std=())
    inner = type(policy)(trial.agent.actor, unscaled, 3)
    normalised = np.stack([trial.spec.observations(rows.numpy()) for rows in raw])
    again = inner(torch.from_numpy(normalised))
    torch.testing.assert_close(policy(raw), again, rtol=1e-4, atol=1e-4)


def the_policy_follows_training(cls: Any) -> None:
    """The policy shares the agent's weights, so the last update is in it."""
    trial = Trial(cls)
    policy = trial.agent.policy()
    before = {key: tensor.clone() for key, tensor in policy.state_dict().items()}
    trial.train(4)
    moved = any(not torch.equal(before[k], v) for k, v in policy.state_dict().items())
    assert moved, "the policy does not move with the agent"


def recorded_updates_are_eager_ones(cls: Any) -> None:
    """What engine compile records is the update, to the bit: `learn` stays within torch."""
    eager, recorded = Trial(cls), Trial(cls)
    Engine(eager.agent, eager.buffer).run(9)
    # The recorded operations stand in for what a compiler would make of them.
    with mock.patch.object(compiled, "inductor", lambda module, inputs: module):
        Engine(recorded.agent, recorded.buffer, "compile").run(9)
    equal(recorded.agent.state_dict(), eager.agent.state_dict())


AGENT_CHECKS: tuple[Callable[[Any], None], ...] = (
    metrics_are_finite_and_one_per_member,
    seeds_decide_everything,
    a_member_among_others_is_that_member_alone,
    resumed_is_uninterrupted_to_the_bit,
    a_value_per_member_is_a_run_of_its_own,
    configuration_errors_say_what_to_do,
    another_kind_of_task_is_an_error,
    the_config_is_frozen_and_documented,
    the_policy_maps_raw_observations_to_raw_actions,
    the_policy_follows_training,
    recorded_updates_are_eager_ones,
)
