"""The result of evaluating policies: a row per member and episode, and what follows for a limit.

    result = evaluate(policy, "saferl/HopperVelocity-v0", episodes=20)
    print(result.text(limits=[25.0]))

Limits and costs are in user units: expected undiscounted cost per episode.
"""

from __future__ import annotations

import csv
import io
import math
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from saferl.errors import SaferlError
from saferl.evaluation.rollout import Env, Episodes, rollout
from saferl.evaluation.statistics import (
    CONFIDENCE,
    RESAMPLES,
    bootstrap_interval,
    cvar,
    interquartile_mean,
    share_over,
)
from saferl.io import write_text
from saferl.safety.limits import check_limit

COLUMNS = ("step", "member", "episode", "return", "cost", "length")
CVAR_LEVEL = 0.9
FEWEST_EPISODES = 5
"""With fewer episodes in all, a verdict is always "cannot tell"."""


def evaluate(
    policy: Any,
    env: Env,
    episodes: int = 10,
    seed: int = 0,
    step: int = 0,
    horizon: int | None = None,
    progress: bool = False,
) -> Evaluation:
    """Play ``episodes`` episodes per member (see `rollout`) and return them as an `Evaluation`.

    ``step``: the training step the policy comes from, kept in the rows.
    """
    return Evaluation.from_episodes(rollout(policy, env, episodes, seed, horizon, progress), step)


@dataclass(frozen=True)
class Evaluation:
    """One row per training step, member and episode; all arrays have one entry per row.

    ``returns`` and ``costs`` are undiscounted sums over the episode; ``costs`` is None where the
    environment reports no cost. Statistics use the last step; `at` picks another one.
    """

    steps: np.ndarray
    members: np.ndarray
    episodes: np.ndarray
    returns: np.ndarray
    costs: np.ndarray | None
    lengths: np.ndarray

    @classmethod
    def from_episodes(cls, played: Episodes, step: int = 0) -> Evaluation:
        member, episode = np.indices(played.returns.shape)
        return cls(
            np.full(played.returns.size, step),
            member.ravel(),
            episode.ravel(),
            played.returns.ravel(),
            None if played.costs is None else played.costs.ravel(),
            played.lengths.ravel(),
        )

    @classmethod
    def concatenate(cls, parts: Iterable[Evaluation]) -> Evaluation:
        """All rows of several evaluations of one run at several steps.

        Where some have costs, those without count as cost 0, as steps without a cost do.
        """
        parts = list(parts)
        if not parts:
            raise SaferlError("there is no evaluation to concatenate")
        if any(part.costs is not None for part in parts):
            parts = [
                part if part.costs is not None else replace(part, costs=np.zeros(len(part)))
                for part in parts
            ]
        arrays = zip(*([getattr(part, name) for name in cls._names()] for part in parts))
        return cls(*(None if a[0] is None else np.concatenate(a) for a in arrays))

    @staticmethod
    def _names() -> tuple[str, ...]:
        return "steps", "members", "episodes", "returns", "costs", "lengths"

    def __len__(self) -> int:
        return len(self.steps)

    def _pick(self, rows: np.ndarray) -> Evaluation:
        arrays = (getattr(self, name) for name in self._names())
        return Evaluation(*(None if array is None else array[rows] for array in arrays))

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
        """One evaluation per group of members; ``groups`` names the group of member 0, 1, …"""
        if len(self) and len(groups) <= self.members.max():
            raise SaferlError(f"{len(groups)} group names for {self.members.max() + 1} members")
        of_row = np.asarray(groups, object)[self.members]
        return {name: self._pick(of_row == name) for name in dict.fromkeys(groups)}

    def matrix(self, name: str = "returns") -> np.ndarray:
        """``returns``, ``costs`` or ``lengths`` of the last step, ``[members, episodes]``."""
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
        costs = [""] * len(self) if self.costs is None else [repr(float(c)) for c in self.costs]
        columns = self.steps, self.members, self.episodes, self.returns, self.lengths
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        for cost, (step, member, episode, value, length) in zip(costs, zip(*columns)):
            writer.writerow([step, member, episode, repr(float(value)), cost, length])
        write_text(Path(path), text.getvalue())

    @classmethod
    def read(cls, path: str | Path) -> Evaluation:
        """The inverse of `write`; raises `SaferlError` for a file that is not such a CSV."""
        try:
            with open(path, newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
            columns = {name: [row[name] for row in rows] for name in COLUMNS}
            without = [cost == "" for cost in columns["cost"]]
            if not rows or (any(without) and not all(without)):
                raise ValueError("no rows, or a cost in some rows only")
            whole = [np.array(columns[n], np.int64) for n in ("step", "member", "episode")]
            costs = None if all(without) else np.array(columns["cost"], np.float64)
            returns = np.array(columns["return"], np.float64)
            return cls(*whole, returns, costs, np.array(columns["length"], np.int64))
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
        groups: Sequence[str] | None = None,
        resamples: int = RESAMPLES,
    ) -> list[dict[str, Any]]:
        """Statistics at the last step: per group of members and per member, one dict per limit.

        ``groups``: a name per member (variants of a hyper-parameter); all members are one group
        when None; one that was trained for a ``cost_limit`` is judged by it and not by ``limits``.
        ``reference_returns``: returns of score 0 (random) and 100 (expert). Without
        limits there is one dict per group and member, its ``limit`` None.

        Keys: ``group``; ``member`` (None for the group as a whole); ``members``, ``episodes``
        (counts); ``limit``; ``return_mean``; ``return_iqm`` with its interval ``return_low``,
        ``return_high``; ``score`` of the mean return, as D4RL defines it; ``cost_mean`` (estimate
        of the expected cost) with ``cost_low``, ``cost_high``; ``cost_ratio`` = mean / limit;
        ``share_over`` the limit; ``cvar`` of the cost; ``members_within`` the limit by their own
        mean; ``length`` (mean); ``cost_per_step`` = total cost / total steps; ``verdict``. What
        does not apply is None.
        """
        limits = [check_limit(limit) for limit in limits]
        if limits and self.costs is None:
            raise SaferlError(NO_COST)
        last = self.at()
        named = groups or [""] * (int(last.members.max()) + 1)
        rows = []
        for name, part in last.split(named).items():
            if not len(part):
                continue
            own = [] if self.costs is None else _own_limit(name)
            picked = [(None, part)]
            picked += [(int(m), part._pick(part.members == m)) for m in np.unique(part.members)]
            for member, rows_of in picked:
                summary = rows_of._summary(reference_returns, resamples)
                head = {"group": name, "member": member}
                for limit in own or limits or [None]:
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
        groups: Sequence[str] | None = None,
        note: str | None = None,
    ) -> str:
        """The tables for a terminal: all members per limit, each member per limit, how to read it.

        ``note`` is printed under each table, for example where the reference returns come from.
        """
        rows = self.table(limits, reference_returns, groups)
        together = [row for row in rows if row["member"] is None]
        alone = [row for row in rows if row["member"] is not None]
        note_lines = [f"  {note}"] if note else []
        parts = [columns(*cells(together)), *note_lines]
        if len(alone) > len(together):
            parts += ["", "Each member (intervals over its episodes only)"]
            parts += [columns(*cells(alone)), *note_lines]
        lines = (textwrap.fill(line, 100, subsequent_indent="  ") for line in explanation(rows))
        return "\n".join([*parts, "", *lines])


NO_COST = (
    "the environment reports no cost, so no cost limit can be judged: wrap it in "
    "saferl.envs.CostWrapper (and give the data the same cost with Dataset.with_costs)"
)


def group_names(names: Sequence[str]) -> list[str] | None:
    """Groups of members named like ``"alpha=1 seed=0"``: what is left without the seed.

    None where nothing is left, that is, where the members differ by their seeds only.
    """
    groups = [re.sub(r"\s*\bseed=\S+", "", name).strip() for name in names]
    return groups if len(set(groups)) > 1 else None


def _own_limit(group: str) -> list[float]:
    """The cost limit in a group's name, ``"alpha=1 cost_limit=20"``."""
    found = re.search(r"\bcost_limit=(\S+)", group)
    return [float(found[1])] if found and math.isfinite(float(found[1])) else []


def cells(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headings and formatted cells of rows of `Evaluation.table`, without empty columns."""
    heads: dict[str, Any] = {
        "group": lambda r: r["group"] or None,
        "member": lambda r: None if r["member"] is None else str(r["member"]),
        "limit": lambda r: number(r["limit"]),
        "verdict": lambda r: r["verdict"],
        "mean cost": lambda r: interval(r["cost_mean"], r["cost_low"], r["cost_high"]),
        "cost/limit": lambda r: None if r["cost_ratio"] is None else f"{r['cost_ratio']:.2f}",
        "episodes over": lambda r: _percent(r["share_over"], r["episodes"]),
        f"CVaR {CVAR_LEVEL:g}": lambda r: number(r["cvar"]),
        "members within": lambda r: _of(r),
        "return (IQM)": lambda r: interval(r["return_iqm"], r["return_low"], r["return_high"]),
        "score": lambda r: None if r["score"] is None else f"{r['score']:.1f}",
        "episodes": lambda r: str(r["episodes"]) if r["limit"] is None else None,
    }
    filled = {head: [render(row) for row in rows] for head, render in heads.items()}
    kept = {head: column for head, column in filled.items() if any(c is not None for c in column)}
    return list(kept), [[c or "–" for c in line] for line in zip(*kept.values())]


def _of(row: dict[str, Any]) -> str | None:
    if row["members_within"] is None or row["member"] is not None:
        return None
    return f"{row['members_within']} of {row['members']}"


def _percent(share: float | None, count: int) -> str | None:
    return None if share is None else f"{100 * share:.0f} % of {count}"


def number(value: float | None) -> str | None:
    """Four significant digits without an exponent where that is readable; None stays None."""
    if value is None:
        return None
    if not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    if abs(value) >= 1e7 or abs(value) < 1e-3:
        return f"{value:.3g}"
    decimals = max(0, 3 - math.floor(math.log10(abs(value))))
    text = f"{value:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def interval(value: float | None, low: float | None, high: float | None) -> str | None:
    """``"21.3 [18.2, 24.4]"``, or the value alone where there is no interval."""
    if value is None or low is None or not math.isfinite(low):
        return number(value)
    largest = max(abs(value), abs(low), abs(high))
    if not 0.01 <= largest < 1e7:
        return f"{value:.3g} [{low:.3g}, {high:.3g}]"
    decimals = max(0, 2 - math.floor(math.log10(largest)))
    return f"{value:.{decimals}f} [{low:.{decimals}f}, {high:.{decimals}f}]"


def columns(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain aligned columns: words to the left, the rest to the right."""
    lines = [list(heads), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    left = {"group", "verdict"}
    return "\n".join(
        "  ".join(
            cell.ljust(width) if head in left else cell.rjust(width)
            for head, cell, width in zip(heads, line, widths)
        ).rstrip()
        for line in lines
    )


def explanation(rows: Sequence[dict[str, Any]]) -> list[str]:
    """How the numbers of `Evaluation.table` are computed and what they do not say."""
    members = max(row["members"] for row in rows)
    percent = f"{100 * CONFIDENCE:g} %"
    over = (
        f"over {members} members and their episodes"
        if members > 1
        else "over the episodes of the one member, so it says nothing about other seeds"
    )
    lines = [f"[low, high]: {percent} bootstrap interval {over}. IQM: mean of the middle half."]
    if any(row["score"] is not None for row in rows):
        lines.append("Score: of the mean return, 0 = random and 100 = expert reference return.")
    if any(row["cvar"] is not None for row in rows):
        lines.append(
            f"CVaR {CVAR_LEVEL:g}: mean cost of the costliest {100 * (1 - CVAR_LEVEL):.0f} % of "
            "episodes. Costs are undiscounted sums per episode."
        )
    if any(row["limit"] is not None for row in rows):
        lines.append(
            f"Verdict on the expected cost: met if its {percent} interval ends at or below the "
            "limit, not met if it begins above, else cannot tell"
            f" (always with fewer than {FEWEST_EPISODES} episodes): more episodes narrow it."
        )
        if same := [row["episodes"] for row in rows if row["cost_low"] == row["cost_high"]]:
            lines.append(
                f"Where all costs are equal (here of {min(same)} episodes) the interval has no "
                f"width: harm that strikes up to {min(100, 300 // min(same))} % of the episodes "
                "may not have been seen (3 / number of episodes, at 95 %)."
            )
        lines.append(
            "The episodes are those of the simulator: the verdict holds for a real system only as "
            "far as the simulator does."
        )
    return lines
