"""Checks for agents, environments, dataset sources and guardians of third parties.

``saferl check NAME`` runs those that fit the name; a test suite runs them one by one:

    from saferl.testing import AGENT_CHECKS, check

    @pytest.mark.parametrize("one", AGENT_CHECKS, ids=lambda one: one.__name__)
    def test_mine(one):
        one(MyAgent)

    assert all(result.passed for result in check("my_agent"))
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from saferl import registry
from saferl.errors import one_line, unknown
from saferl.testing.agents import AGENT_CHECKS, Trial
from saferl.testing.datasets import DATASET_CHECKS
from saferl.testing.environments import ENVIRONMENT_CHECKS
from saferl.testing.guardians import GUARDIAN_CHECKS

__all__ = [
    "AGENT_CHECKS",
    "DATASET_CHECKS",
    "ENVIRONMENT_CHECKS",
    "GUARDIAN_CHECKS",
    "Result",
    "Trial",
    "check",
    "run_checks",
]


@dataclass(frozen=True)
class Result:
    """What came of one check; ``error`` is None where it passed."""

    name: str  # in words
    error: str | None

    @property
    def passed(self) -> bool:
        return self.error is None


def run_checks(checks: Sequence[Callable[[Any], None]], of: Any) -> Iterator[Result]:
    """Run checks one after the other; whatever a check raises is its error, in one line."""
    for one in checks:
        error = None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                one(of)
        except Exception as raised:
            error = one_line(raised)
        yield Result(one.__name__.replace("_", " "), error)


def kind_of(name: str) -> tuple[str, Sequence[Callable[[Any], None]], Any]:
    """What a name is, its checks, and what they are given.

    Raises:
        SaferlError: no agent, guardian, dataset or environment has that name.
    """
    from saferl.safety.guardians import guardian_names

    if name in registry.names("agents"):
        return "agent", AGENT_CHECKS, registry.agent_class(name)
    if name in guardian_names():
        return "guardian", GUARDIAN_CHECKS, name
    environments = registry.environment_ids()
    if name in environments:
        return "environment", ENVIRONMENT_CHECKS, name
    if name.partition("/")[0] in registry.names("datasets"):
        return "dataset", DATASET_CHECKS, name
    known = [*registry.names("agents"), *guardian_names(), *environments]
    hint = "give an agent, a guardian, an environment id or a dataset id (`saferl list`)"
    raise unknown("name", name, known, hint=hint)


def check(name: str) -> list[Result]:
    """All checks of a registered agent, environment, dataset source or guardian.

    Raises:
        SaferlError: no such name.
    """
    _, checks, of = kind_of(name)
    return list(run_checks(checks, of))
