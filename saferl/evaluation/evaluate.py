"""The result of evaluating policies: a row per member and episode, and what follows for a limit.

    result = evaluate(policy, "saferl/HopperVelocity-v0", episodes=20)
    print(result.text(limits=[25.0]))

Limits and costs are in user units: expected undiscounted cost per episode.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from saferl.errors import SaferlError
from saferl.evaluation.statistics import (
    CVAR_LEVEL,
    FEWEST_EPISODES,
    RESAMPLES,
    bootstrap_interval,
    cvar,
    interquartile_mean,
    share_over,
)
from saferl.evaluation.text import tables
from saferl.io import csv_lines, read_csv, write_text
from saferl.rollout import Env, Episodes, rollout
from saferl.runs.config import Group
from saferl.safety.limits import check_limit

COLUMNS = ("step", "member", "episode", "return", "cost", "length")
COUNTED = ("ood", "replaced")
"""Columns of steps that were counted; a file has those that have an entry."""


def evaluate(
    policy: Any,
    env: Env,
    episodes: int = 10,
    seed: int = 0,
    step: int = 0,
    horizon: int | None = None,
    progress: bool = False,
    guardian: Any = None,
) -> Evaluation:
    """Play ``episodes`` episodes per member (see `rollout`) and return them as an `Evaluation`.

    ``step``: the training step the policy comes from, kept in the rows. ``guardian``: a calibrated
    one; steps whose action it calls unsupported are counted.
    """
    found = rollout(policy, env, episodes, seed, horizon, progress, guardian)
    return Evaluation.from_episodes(found, step)


@dataclass(frozen=True)
class Evaluation:
    """One row per training step, member and episode; all arrays have one entry per row.

    ``returns`` and ``costs`` are undiscounted sums over the episode; ``costs`` is None where the
    environment reports no cost. ``ood`` and ``replaced`` count the steps that a guardian called
    unsupported and those at which a shield took another action, NaN in rows where nobody counted,
    None where nobody ever did. Statistics use the last step; `at` picks another one.
    """

    steps: np.ndarray
    members: np.ndarray
    episodes: np.ndarray
    returns: np.ndarray
    costs: np.ndarray | None
    lengths: np.ndarray
    ood: np.ndarray | None = None
    replaced: np.ndarray | None = None

    @classmethod
    def from_episodes(cls, found: Episodes, step: int = 0) -> Evaluation:
        member, episode = np.indices(found.returns.shape)
        sums: Any = (found.returns, found.costs, found.lengths, found.ood, found.replaced)
        arrays: Any = (None if array is None else array.ravel() for array in sums)
        return cls(
            np.full(found.returns.size, step),
            member.ravel(),
            episode.ravel(),
            *arrays,
        )

    @classmethod
    def concatenate(cls, parts: Iterable[Evaluation]) -> Evaluation:
        """All rows of several evaluations of one run at several steps.

        Where some have costs, those without count as cost 0, as steps without a cost do. What only
        some have counted is NaN in the others.
        """
        parts = list(parts)
        if not parts:
            raise SaferlError("there is no evaluation to concatenate")
        for name, value in (("costs", 0.0), *((name, np.nan) for name in COUNTED)):
            if any(getattr(part, name) is not None for part in parts):
                parts = [
                    replace(part, **{name: np.full(len(part), value)})
                    if getattr(part, name) is None
                    else part
                    for part in parts
                ]
        columns = zip(*([getattr(part, name) for name in cls._names()] for part in parts))
        arrays: Any = (None if c[0] is None else np.concatenate(c) for c in columns)
        return cls(*arrays)

    @staticmethod
    def _names() -> tuple[str, ...]:
        return "steps", "members", "episodes", "returns", "costs", "lengths", *COUNTED

    def __len__(self) -> int:
        return len(self.steps)

    def _pick(self, rows: np.ndarray) -> Evaluation:
        columns = (getattr(self, name) for name in self._names())
        arrays: Any = (None if column is None else column[rows] for column in columns)
        return Evaluation(*arrays)

    def at(self, step: int | None = None) -> Evaluation:
        """The rows of one training step, the last one when None."""
        known = np.unique(self.steps)
        if step is not None and step not in known:
            raise SaferlError(f"no evaluation at step {step}; there are {known.tolist()}")
        return self._pick(self.steps == (known[-1] if step is None else step))

    def until(self, step: int) -> Evaluation:
        """The rows up to a training step."""
        return self._pick(self.steps <= step)

    def split(self, groups: Sequence[str]) -> dict[str, Evaluation]:
        """One evaluation per group of members; ``groups`` labels that of member 0, 1, …"""
        if len(self) and len(groups) <= self.members.max():
            raise SaferlError(f"{len(groups)} group names for {self.members.max() + 1} members")
        of_row = np.asarray(groups, object)[self.members]
        return {name: self._pick(of_row == name) for name in dict.fromkeys(groups)}

    def matrix(self, name: str = "returns") -> np.ndarray:
        """A column of the last step, such as ``"costs"``, as ``[members, episodes]``."""
        rows = self.at()
        if getattr(rows, name) is None:
            raise SaferlError(NO_COST)
        order = np.lexsort((rows.episodes, rows.members))
        counts = np.unique(rows.members, return_counts=True)[1]
        if len(set(counts.tolist())) > 1:
            raise SaferlError(
                f"the members have different numbers of episodes at step {rows.steps[0]}: evaluate "
                "the run again"
            )
        return getattr(rows, name)[order].reshape(len(counts), -1).astype(np.float64)

    # Files

    def write(self, path: str | Path) -> None:
        """Write the CSV of all rows (``cost`` empty when there is none) under a temporary name."""
        counted = [name for name in COUNTED if getattr(self, name) is not None]
        returns = [repr(float(value)) for value in self.returns]
        costs = [""] * len(self) if self.costs is None else [repr(float(c)) for c in self.costs]
        counts = (
            ["" if np.isnan(count) else int(count) for count in getattr(self, name)]
            for name in counted
        )
        columns = [*COLUMNS, *counted]
        rows = zip(self.steps, self.members, self.episodes, returns, costs, self.lengths, *counts)
        lines = (dict(zip(columns, row)) for row in rows)
        write_text(Path(path), csv_lines(columns, lines, header=True))

    @classmethod
    def read(cls, path: str | Path) -> Evaluation:
        """The inverse of `write`; raises `SaferlError` for a file that is not such a CSV."""
        try:
            rows = read_csv(Path(path))[1]
            columns = {name: [row[name] for row in rows] for name in COLUMNS}
            without = [cost == "" for cost in columns["cost"]]
            if not rows or (any(without) and not all(without)):
                raise ValueError("no rows, or a cost in some rows only")
            whole: Any = [np.array(columns[n], np.int64) for n in ("step", "member", "episode")]
            costs = None if all(without) else np.array(columns["cost"], np.float64)
            returns = np.array(columns["return"], np.float64)
            counts: dict[str, Any] = {
                name: np.array([row[name] or "nan" for row in rows], np.float64)
                for name in COUNTED
                if name in rows[0]
            }
            steps, members, numbers = whole
            lengths = np.array(columns["length"], np.int64)
            return cls(steps, members, numbers, returns, costs, lengths, **counts)
        except OSError as error:
            raise SaferlError(f"cannot read {path}: {error.strerror or error}") from error
        except (KeyError, TypeError, ValueError) as error:
            raise SaferlError(
                f"{path} is not an evaluation with columns {','.join(COLUMNS)} ({error}): evaluate "
                "the run again"
            ) from error

    # Statistics

    def table(
        self,
        limits: Sequence[float] = (),
        reference_returns: tuple[float, float] | None = None,
        groups: Sequence[str | Group] | None = None,
        resamples: int = RESAMPLES,
        beside: Mapping[str, Sequence[float]] | None = None,
    ) -> list[dict[str, Any]]:
        """Statistics at the last step: per group of members and per member, one dict per limit.

        ``groups``: that of each member, a label or a `Group`; all members are one when None. A
        group that was trained for a cost limit is judged by it and not by ``limits``.
        ``reference_returns``: returns of score 0 (random) and 100 (expert). ``beside``: values
        known of each member from elsewhere, such as ``predicted_return`` or ``exact_cost``, whose
        means over the members become keys. Without limits there is one dict per group and member,
        its ``limit`` None.

        Keys: ``group``, ``family`` (see `Group`); ``member`` (None for the group as a whole);
        ``members``, ``episodes`` (counts); ``limit``; ``return_mean``; ``return_iqm`` with its
        interval ``return_low``, ``return_high``; ``score`` of the mean return, as D4RL defines it;
        ``cost_mean`` (estimate of the expected cost) with ``cost_low``, ``cost_high``;
        ``cost_ratio`` = mean / limit; ``share_over`` the limit; ``cvar`` of the cost;
        ``members_within`` the limit by their own mean; ``length`` (mean); ``cost_per_step`` = total
        cost / total steps; ``ood_rate`` and ``replaced_rate``, shares of all steps; ``verdict``.
        What does not apply is None.
        """
        limits = [check_limit(limit) for limit in limits]
        if limits and self.costs is None:
            raise SaferlError(NO_COST)
        last = self.at()
        listed = groups or [""] * (int(last.members.max()) + 1)
        known = {
            group.label: group
            for group in (g if isinstance(g, Group) else Group(g, family=g) for g in listed)
        }
        labels = [group.label if isinstance(group, Group) else group for group in listed]
        rows = []
        for label, part in last.split(labels).items():
            if not len(part):
                continue
            group = known[label]
            judged: list[float | None] = [*limits] or [None]
            if self.costs is not None and group.cost_limit is not None:
                judged = [group.cost_limit]
            picked: list[tuple[int | None, Evaluation]] = [(None, part)]
            picked += [(int(m), part._pick(part.members == m)) for m in np.unique(part.members)]
            for member, rows_of in picked:
                summary = rows_of._summary(reference_returns, resamples)
                who = np.unique(rows_of.members)
                for key, values in (beside or {}).items():
                    summary[key] = float(np.mean([values[m] for m in who]))
                head = {"group": label, "family": group.family, "member": member}
                for limit in judged:
                    rows.append(head | summary | rows_of._against(limit, summary))
        return rows

    def _summary(self, reference: tuple[float, float] | None, resamples: int) -> dict[str, Any]:
        returns, lengths = self.matrix(), self.matrix("lengths")
        low, high = bootstrap_interval(returns, interquartile_mean, resamples=resamples)
        summary: dict[str, Any] = {
            "members": len(returns),
            "episodes": returns.size,
            "return_mean": float(returns.mean()),
            "return_iqm": float(interquartile_mean(returns.ravel())),
            "return_low": low,
            "return_high": high,
            "score": None,
            "length": float(lengths.mean()),
        }
        for name in COUNTED:
            counts = None if getattr(self, name) is None else self.matrix(name)
            rate = None
            if counts is not None and not np.isnan(counts).any():
                rate = float(counts.sum() / lengths.sum())
            summary[f"{name}_rate"] = rate
        if reference is not None:
            worst, best = reference
            summary["score"] = 100 * (summary["return_mean"] - worst) / (best - worst)
        names = ("cost_mean", "cost_low", "cost_high", "cvar", "cost_per_step")
        if self.costs is None:
            return summary | dict.fromkeys(names)
        costs = self.matrix("costs")
        low, high = bootstrap_interval(costs, resamples=resamples)
        if costs.min() >= 0:
            low = max(low, 0.0) if not math.isnan(low) else low
        tail = float(cvar(costs.ravel(), CVAR_LEVEL))
        values = (float(costs.mean()), low, high, tail, float(costs.sum() / lengths.sum()))
        return summary | dict(zip(names, values))

    def _against(self, limit: float | None, summary: dict[str, Any]) -> dict[str, Any]:
        names = ("limit", "cost_ratio", "share_over", "members_within", "verdict")
        if limit is None:
            return dict.fromkeys(names)
        costs, mean_cost = self.matrix("costs"), summary["cost_mean"]
        verdict = "cannot tell"
        if costs.size >= FEWEST_EPISODES:
            if summary["cost_high"] <= limit:
                verdict = "met"
            elif summary["cost_low"] > limit:
                verdict = "not met"
        values = (
            limit,
            mean_cost / limit if limit else None,
            float(share_over(costs.ravel(), limit)),
            int((costs.mean(1) <= limit).sum()),
            verdict,
        )
        return dict(zip(names, values))

    def text(
        self,
        limits: Sequence[float] = (),
        reference_returns: tuple[float, float] | None = None,
        groups: Sequence[str | Group] | None = None,
        note: str | None = None,
    ) -> str:
        """The rows of `table` for a terminal; see `saferl.evaluation.text.tables`."""
        return tables(self.table(limits, reference_returns, groups), note)


NO_COST = (
    "the environment reports no cost, so no cost limit can be judged: wrap it in "
    "saferl.envs.CostWrapper (and give the data the same cost with Dataset.with_costs)"
)
