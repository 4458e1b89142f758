"""What a run folder says of its policies: configuration, dataset card, evaluations, metrics.

Only files are read, so it can be done at any time, also while a run goes on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from saferl.data import Card
from saferl.errors import SaferlError
from saferl.evaluation.evaluate import Evaluation
from saferl.evaluation.text import number, tables
from saferl.io import write_text
from saferl.runs.config import Group, RunConfig, groups_of
from saferl.runs.folder import RunFolder
from saferl.runs.metrics import read_metrics
from saferl.safety.limits import check_limit

Values = dict[str, list[float]]
"""Name → a value of each member: ``predicted_return``, ``exact_cost`` …"""


@dataclass(frozen=True)
class Guard:
    """An evaluation of the policies under a guard.

    - ``name``: in words; ``file``: its rows, in the run folder;
    - ``limit``: the budget that it kept, None without one; each member its own where they have one.
    """

    name: str
    file: str
    limit: float | None = None
    values: Values = field(default_factory=dict)


@dataclass(frozen=True)
class Known:
    """``evaluation.json``: what goes with the last training step of ``evaluation.csv``.

    - ``guardian``: which one counted unsupported steps, in words;
    - ``frontier``: ``[cost, best possible return]`` of the environment, empty where unknown.
    """

    step: int
    limits: list[float] | None = None
    guardian: str | None = None
    values: Values = field(default_factory=dict)
    frontier: list[list[float]] = field(default_factory=list)
    guards: list[Guard] = field(default_factory=list)

    FILE = "evaluation.json"

    def write(self, folder: Path) -> None:
        write_text(folder / self.FILE, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Known | None:
        """None where there is no such file."""
        file = folder / cls.FILE
        if not file.is_file():
            return None
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            guards = [Guard(**guard) for guard in values.pop("guards")]
            return cls(**values, guards=guards)
        except (ValueError, TypeError, KeyError) as error:
            raise SaferlError(
                f"{file} cannot be read ({error}): delete it and evaluate the run again"
            ) from error


@dataclass
class RunResults:
    """What a run folder holds; ``evaluation`` and ``metrics`` are None where there is none yet.

    ``known`` is None where nothing is known of the last training step but its episodes; ``guarded``
    has the evaluation of each of its guards.
    """

    name: str
    config: RunConfig
    card: Card | None
    fingerprint: str | None
    evaluation: Evaluation | None
    metrics: dict[str, np.ndarray] | None
    limits: list[float]
    known: Known | None = None
    guarded: list[Evaluation] = field(default_factory=list)

    @classmethod
    def read(cls, path: str | Path, limits: Sequence[float] | None = None) -> RunResults:
        """Read a folder.

        ``limits`` replace those that it was evaluated with, and these those of its configuration.
        """
        path = Path(path)
        config = RunFolder(path).config()
        card, fingerprint = _card(path / "dataset.json")
        evaluated, logged = path / "evaluation.csv", path / "metrics.csv"
        evaluation = Evaluation.read(evaluated) if evaluated.is_file() else None
        known = Known.read(path)
        if known and (evaluation is None or known.step != evaluation.at().steps[0]):
            known = None  # it was trained since
        asked: Sequence[float] = config.cost_limits
        if known and known.limits is not None:
            asked = known.limits
        asked = asked if limits is None else limits
        return cls(
            path.resolve().name,
            config,
            card,
            fingerprint,
            evaluation,
            read_metrics(logged) if logged.is_file() else None,
            list(dict.fromkeys(check_limit(limit) for limit in asked)),
            known,
            [Evaluation.read(path / guard.file) for guard in known.guards] if known else [],
        )

    @property
    def reference_returns(self) -> tuple[float, float] | None:
        return self.card.reference_returns if self.card else None

    @property
    def groups(self) -> list[Group] | None:
        """The group of each member where a setting differs between them, else None."""
        members = self.config.who
        if self.evaluation is None or len(members) <= self.evaluation.members.max():
            return None
        return groups_of(members)

    @property
    def note(self) -> str:
        """Where data and reference returns come from: printed under every table with scores."""
        parts = []
        if self.reference_returns:
            worst, best = map(number, self.reference_returns)
            parts.append(f"score 0: return {worst}, score 100: return {best}")
        if self.card and self.card.score_note:
            parts.append(self.card.score_note)
        return "; ".join(parts)

    @property
    def frontier(self) -> list[list[float]]:
        return self.known.frontier if self.known else []

    def split(self) -> dict[str, Evaluation]:
        """The evaluations of the policies as they are, by group."""
        assert self.evaluation is not None
        if not self.groups:
            return {"": self.evaluation}
        return self.evaluation.split([group.label for group in self.groups])

    @cached_property
    def table(self) -> list[dict[str, Any]]:
        """`Evaluation.table` of the policies as they are, then under each guard."""
        assert self.evaluation is not None
        limits = self.limits if self.evaluation.costs is not None else ()
        of_all = self.reference_returns, self.groups
        values = self.known.values if self.known else None
        rows = self.evaluation.table(limits, *of_all, beside=values)
        if not self.guarded:
            return rows
        rows = [row | {"group": row["group"] or "bare"} for row in rows]
        assert self.known is not None
        for guard, evaluation in zip(self.known.guards, self.guarded):
            kept = limits if guard.limit is None else [guard.limit]
            for row in evaluation.table(kept, *of_all, beside=guard.values):
                label = ", ".join(filter(None, [row["group"], guard.name]))
                family = ", ".join(filter(None, [row["family"], "guarded"]))
                rows.append(row | {"group": label, "family": family})
        return rows

    def text(self) -> str:
        """The table for a terminal, and what its numbers mean."""
        notes = [self.note] if self.note else []
        if self.known and self.known.guardian:
            notes.append(f"guardian: {self.known.guardian}")
        return tables(self.table, "\n  ".join(notes))


def _card(file: Path) -> tuple[Card | None, str | None]:
    if not file.is_file():
        return None, None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if not values:  # trained online
            return None, None
        return Card.from_dict(values["card"]), values.get("fingerprint")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise SaferlError(f"{file} is not a dataset card: {error}") from error
