"""What every registered agent must do (`saferl.testing`), a third party's included."""

from __future__ import annotations

import dataclasses

import pytest

from saferl.agents import Agent
from saferl.errors import SaferlError
from saferl.registry import agent_class, names
from saferl.testing import AGENT_CHECKS
from saferl.testing.agents import (
    IMAGE,
    NEEDS,
    OF_THE_RUN,
    SMALL,
    Room,
    Trial,
    a_value_per_member_is_a_run_of_its_own,
    flat,
    learned,
    small_config,
    task_for,
)

AGENTS = names("agents")
OBS, ACT = 3, 2
Setup, make_config, dataset_for = Trial, small_config, task_for
__all__ = ["ACT", "AGENTS", "IMAGE", "NEEDS", "OBS", "SMALL", "Room", "Setup", "dataset_for",
           "flat", "learned", "make_config"]  # fmt: skip


@pytest.fixture(params=AGENTS)
def cls(request) -> type[Agent]:
    return agent_class(request.param)


def run_options(cls) -> dict:
    """What `saferl.train` needs besides a dataset."""
    return {"env": Room} if cls.online else {}


# Per-member fields have a test for each, below; recorded updates are in test_engines.py.
ELSEWHERE = ("a_value_per_member_is_a_run_of_its_own", "recorded_updates_are_eager_ones")


@pytest.mark.parametrize(
    "check",
    [check for check in AGENT_CHECKS if check.__name__ not in ELSEWHERE],
    ids=lambda check: check.__name__,
)
def test_agents(check, cls):
    check(cls)


@pytest.mark.parametrize(
    "name,field",
    [(name, key) for name in AGENTS for key in sorted(agent_class(name).per_member - OF_THE_RUN)],
)
def test_a_value_per_member_is_a_run_of_its_own(name, field):
    a_value_per_member_is_a_run_of_its_own(agent_class(name), [field])


def test_values_out_of_range_are_one_line(cls):
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
