"""What a recording of operations cannot see is an error, never another result."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from saferl.errors import SaferlError
from saferl.registry import agent_class
from saferl.training import compiled
from saferl.training.engine import Engine
from tests.conformance.test_agents import Setup

BC = agent_class("bc")


@pytest.fixture(autouse=True)
def as_recorded(monkeypatch):
    """Nothing is compiled here."""
    monkeypatch.setattr(compiled, "inductor", lambda module, inputs: module)


def agent_that(change):
    """Behaviour cloning on rows whose observations ``change(agent, observations)`` has moved."""

    class Changed(BC):
        def learn(self, batch):
            self.calls = getattr(self, "calls", 0) + 1
            moved = change(self, batch.observations)
            return super().learn(batch._replace(observations=moved))

    return Changed


def updated(cls, kind: str, updates: int = 8) -> tuple[dict, dict]:
    setup = Setup(cls)
    engine = Engine(setup.agent, setup.buffer, kind)
    engine.run(updates)
    return setup.agent.state_dict(), engine.read()


def assert_is_eager(cls) -> None:
    (state, metrics), (expected, wanted) = updated(cls, "compile"), updated(cls, "eager")
    assert all(torch.equal(tensor, expected[key]) for key, tensor in state.items())
    assert all((metrics[key] == value).all() for key, value in wanted.items())


def line_of(change) -> str:
    return re.escape(f"{__file__}:{change.__code__.co_firstlineno}")


READS = {
    "numpy": lambda agent, x: x + torch.from_numpy(x.numpy().mean(keepdims=True)),
    "asarray": lambda agent, x: x + torch.from_numpy(np.asarray(x).mean(keepdims=True)),
    "cpu": lambda agent, x: x.cpu() * 2,
    "item": lambda agent, x: x + x.mean().item(),
    "tolist": lambda agent, x: x + torch.tensor(x.tolist()).mean(),
    "float": lambda agent, x: x + float(x.mean()),
    "bool": lambda agent, x: x + 1 if x.mean() > 0 else x,
    "equal": lambda agent, x: x + 1 if torch.equal(x, -x) else x,
}


@pytest.mark.parametrize("name", READS)
def test_a_read_on_the_host_is_an_error_that_names_its_line(name):
    where = rf"{line_of(READS[name])} reads a tensor on the host.*use eager"
    with pytest.raises(SaferlError, match=where):
        updated(agent_that(READS[name]), "compile")
    updated(agent_that(READS[name]), "eager")


@pytest.mark.parametrize(
    "change",
    [lambda agent, x: x + x[x > 0].mean(), lambda agent, x: x + len(x.nonzero())],
    ids=["mask", "nonzero"],
)
def test_a_shape_that_depends_on_values_is_an_error_that_names_its_line(change):
    with pytest.raises(SaferlError, match=rf"{line_of(change)} .*shape depends on values"):
        updated(agent_that(change), "compile")


def anew(agent, x):
    agent.total = getattr(agent, "total", torch.zeros(())) + x.mean()
    return x + agent.total


CHANGING = {
    "from_numpy": lambda agent, x: x + torch.from_numpy(np.float32([agent.calls])),
    "tensor": lambda agent, x: x + torch.tensor(float(agent.calls)),
    "number": lambda agent, x: x * (1 + 0.1 * agent.calls),
    "operations": lambda agent, x: x.sin() if agent.calls % 2 else x.cos(),
    "more_operations": lambda agent, x: x + 1 if agent.calls % 2 else x,
}


@pytest.mark.parametrize("name", CHANGING)
def test_what_changes_outside_torch_is_an_error_that_names_its_line(name):
    change = CHANGING[name]
    with pytest.raises(SaferlError, match=r"cannot record this update: .*\.py:\d+ .*use eager"):
        updated(agent_that(change), "compile")
    if name != "more_operations":  # there it is the line after it that differs
        with pytest.raises(SaferlError, match=line_of(change)):
            updated(agent_that(change), "compile")


def test_a_tensor_of_the_agent_that_is_set_anew_is_an_error():
    """The program would go on from the one that it was recorded with."""
    with pytest.raises(SaferlError, match="test_compiled.py:.* in place"):
        updated(agent_that(anew), "compile")


def test_memory_that_changes_outside_torch_is_an_error():
    table = torch.zeros(())
    view = table.numpy()

    def change(agent, x):
        view[...] = agent.calls
        return x + table

    with pytest.raises(SaferlError, match="gives? something else than the update itself"):
        updated(agent_that(change), "compile")


def in_place(agent, x):
    if not hasattr(agent, "total"):
        agent.total = torch.zeros(())
    agent.total += x.mean()
    return x.mul_(2).add_(agent.total)


@pytest.mark.parametrize(
    "change",
    [
        lambda agent, x: x + torch.tensor([0.5, float("nan"), 2.0]).nan_to_num(),
        lambda agent, x: x * torch.from_numpy(np.float32([1, 2, 3])),
        in_place,
    ],
    ids=["tensor", "from_numpy", "in place"],
)
def test_constants_and_what_is_changed_in_place_are_recorded(change):
    assert_is_eager(agent_that(change))


def test_a_program_is_compared_on_a_batch_that_it_was_not_compiled_with(monkeypatch):
    """A compiler that takes the numbers it is shown for constants."""

    def frozen(module, inputs):
        found = [tensor.clone() for tensor in module(*[t.clone() for t in inputs])]
        return lambda *given: found

    monkeypatch.setattr(compiled, "inductor", frozen)
    with pytest.warns(RuntimeWarning, match="operations come out otherwise"):
        assert_is_eager(agent_class("td3_bc"))


def test_an_expanded_tensor_may_be_used_after_an_optimisers_step():
    class Weighted(BC):
        def learn(self, batch):
            weight = batch.rewards.mean(1, keepdim=True).expand_as(batch.rewards)
            metrics = super().learn(batch)
            return metrics | {"weighted": (weight * batch.terminals).mean(1)}

    assert_is_eager(Weighted)
