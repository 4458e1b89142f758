"""Rows of `Evaluation.table` as text: numbers for people, aligned columns, how to read them."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from saferl.evaluation.statistics import CONFIDENCE, CVAR_LEVEL, FEWEST_EPISODES


def tables(rows: Sequence[dict[str, Any]], note: str | None = None) -> str:
    """For a terminal: all members per limit, each member per limit, how to read it.

    ``note`` is printed under each table, for example where the reference returns come from.
    """
    together = [row for row in rows if row["member"] is None]
    alone = [row for row in rows if row["member"] is not None]
    blocks = [columns(*part) for part in parts(together)]
    blocks[0] += f"\n  {note}" if note else ""
    if len(alone) > len(together):
        first, *others = [columns(*part) for part in parts(alone)]
        first = f"Each member (intervals over its episodes only)\n{first}"
        blocks += [first + (f"\n  {note}" if note else ""), *others]
    lines = (textwrap.fill(line, 100, subsequent_indent="  ") for line in explanation(rows))
    return "\n\n".join([*blocks, "\n".join(lines)])


def parts(rows: Sequence[dict[str, Any]]) -> list[tuple[list[str], list[list[str]]]]:
    """`cells` of what the episodes say of each limit, and of what else is known of each policy."""
    once = {(row["group"], row["member"]): row for row in rows}
    known = cells(list(once.values()), KNOWN)
    return [cells(rows, MEASURED), *([known] if set(known[0]) - {"group", "member"} else [])]


NAMES: dict[str, Callable[[dict[str, Any]], str | None]] = {
    "group": lambda r: r["group"] or None,
    "member": lambda r: None if r["member"] is None else str(r["member"]),
}
MEASURED = NAMES | {
    "limit": lambda r: number(r["limit"]),
    "verdict": lambda r: r["verdict"],
    "mean cost": lambda r: interval(r["cost_mean"], r["cost_low"], r["cost_high"]),
    "cost/limit": lambda r: None if r["cost_ratio"] is None else f"{r['cost_ratio']:.2f}",
    "members within": lambda r: _of(r),
    "episodes within": lambda r: _within(r["share_over"], r["episodes"]),
    f"CVaR {CVAR_LEVEL:g}": lambda r: number(r["cvar"]),
    "return (IQM)": lambda r: interval(r["return_iqm"], r["return_low"], r["return_high"]),
    "score": lambda r: None if r["score"] is None else f"{r['score']:.1f}",
    "OOD rate": lambda r: _percent(r["ood_rate"]),
    "interventions": lambda r: _percent(r["replaced_rate"]),
    "episodes": lambda r: str(r["episodes"]) if r["limit"] is None else None,
}
KNOWN = NAMES | {
    "mean return": lambda r: number(r["return_mean"]) if _has(r, "return") else None,
    "predicted − measured return": lambda r: _gap(r, "return"),
    "exact return": lambda r: number(r.get("exact_return")),
    "predicted − measured cost": lambda r: _gap(r, "cost"),
    "exact cost": lambda r: number(r.get("exact_cost")),
    "exact OOD rate": lambda r: _percent(r.get("exact_ood_rate")),
}
"""Columns, and their cell of a row of `Evaluation.table`: of the episodes, and of what is known
besides of the same policies."""


def cells(
    rows: Sequence[dict[str, Any]],
    heads: Mapping[str, Callable[[dict[str, Any]], str | None]] = MEASURED | KNOWN,
) -> tuple[list[str], list[list[str]]]:
    """Headings and formatted cells of rows of `Evaluation.table`, without empty columns."""
    filled = {head: [render(row) for row in rows] for head, render in heads.items()}
    kept = {head: column for head, column in filled.items() if any(c is not None for c in column)}
    return list(kept), [[c or "–" for c in line] for line in zip(*kept.values())]


def _has(row: dict[str, Any], what: str) -> bool:
    return any(row.get(f"{kind}_{what}") is not None for kind in ("predicted", "exact"))


def _gap(row: dict[str, Any], what: str) -> str | None:
    predicted, measured = row.get(f"predicted_{what}"), row[f"{what}_mean"]
    if predicted is None or measured is None:
        return None
    gap = predicted - measured
    return f"{'+' if gap >= 0 else '−'}{number(abs(gap))}"


def _of(row: dict[str, Any]) -> str | None:
    if row["members_within"] is None or row["member"] is not None:
        return None
    return f"{row['members_within']} of {row['members']}"


def _within(share_over: float | None, count: int) -> str | None:
    return None if share_over is None else f"{100 * (1 - share_over):.0f} % of {count}"


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{100 * share:.1f} %"


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
    if value is None or low is None or high is None or not math.isfinite(low):
        return number(value)
    largest = max(abs(value), abs(low), abs(high))
    if not 0.01 <= largest < 1e7:
        return f"{value:.3g} [{low:.3g}, {high:.3g}]"
    decimals = max(0, 2 - math.floor(math.log10(largest)))
    return f"{value:.{decimals}f} [{low:.{decimals}f}, {high:.{decimals}f}]"


def columns(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain aligned columns: words to the left, the rest to the right.

    A heading of several words that is wider than its cells takes two lines.
    """
    upper, lower = [], []
    for i, head in enumerate(heads):
        first, _, last = head.rpartition(" ")
        narrow = max((len(row[i]) for row in rows), default=0) >= len(head)
        upper.append("" if narrow else first)
        lower.append(head if narrow else last)
    lines = [*([upper] if any(upper) else []), lower, *map(list, rows)]
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
    if any(row["ood_rate"] is not None for row in rows):
        lines.append(
            "OOD rate: share of steps whose action, in the state it was taken in, a guardian calls "
            "unsupported by the data."
        )
    if any(row["replaced_rate"] is not None for row in rows):
        lines.append("Interventions: share of steps at which the guard took another action.")
    if any(row.get("predicted_return") is not None for row in rows):
        lines.append(
            "Predicted − measured: of whole episodes of the same policy in the agent's own model, "
            "less those of the environment. Above 0 for the return or below 0 for the cost, the "
            "model promises too much."
        )
    if any(row.get("exact_return") is not None for row in rows):
        lines.append(
            "Exact: from the environment's own table by linear algebra, without sampling; its OOD "
            "rate is that of the true support."
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
