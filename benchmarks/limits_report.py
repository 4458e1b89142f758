"""What `limits.py` makes of its results: a table per task and limit, who keeps what, and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
from evidence_report import pyplot, span, verdict
from scores_report import compare

from saferl.evaluation.statistics import bootstrap_interval

BASE = "bc_safe"
# Rows, and whether they are held to the limit.
NAMES: dict[str, tuple[str, bool]] = {
    "bc": ("BC", False),
    "td3_bc": ("TD3+BC", False),
    "a2pr": ("A2PR", False),
    "bc_safe": ("BC-Safe", True),
    "bc_safe_best": ("BC-Safe, best tenth", True),
    "bc_safe_best_shield": ("the same, shielded", True),
    "caps": ("CAPS", True),
    "caps_tracked": ("CAPS, budget tracked", True),
    "a2pr_limited": ("A2PR under the limit", True),
    "coptidice": ("COptiDICE", True),
    "cpq": ("CPQ", True),
    "bcq_lag": ("BCQ-Lag", True),
    "ogsrl": ("OGSRL", True),
}
MARKS = "osD^v<>Pphd*X"
SHARE = 0.8  # of the seeds that must keep the limit


def summary(
    dataset: str, row: str, limit: float, part: dict[str, Any], base: dict[str, Any] | None
) -> dict[str, Any]:
    """Return, cost and verdicts of one row at one limit; intervals at 95 %.

    ``part`` and ``base`` (BC-Safe's at that limit) have arrays ``[seeds, episodes]``.
    """
    returns, costs = np.array(part["returns"]), np.array(part["costs"])
    low, high = bootstrap_interval(costs)
    low = max(low, 0.0)
    within = int((costs.mean(1) <= limit).sum())
    found = {
        "dataset": dataset,
        "row": row,
        "limit": limit,
        "seeds": len(returns),
        "episodes": returns.shape[1],
        "return": float(returns.mean()),
        "return_interval": list(bootstrap_interval(returns)),
        "cost": float(costs.mean()),
        "cost_interval": [low, high],
        "cost_ratio": float(costs.mean() / limit),
        "within": within,
        "limit_verdict": "met" if high <= limit else "not met" if low > limit else "cannot tell",
        "length": float(np.mean(part["lengths"])),
        "against": None,
        "passes": False,
    }
    if base is not None and row != BASE:
        difference, least, most = compare(returns, np.array(base["returns"]))
        found["against"] = {
            "difference": difference,
            "interval": [least, most],
            "verdict": verdict(least, most),
        }
        found["passes"] = within >= SHARE * len(returns) and difference > 0
    return found


def summaries(entries: Sequence[dict[str, Any]], limits: Sequence[float]) -> list[dict[str, Any]]:
    """A summary per dataset, limit and row, in the order of `NAMES`."""
    played: dict[tuple[str, str], dict[str, Any]] = {}
    for entry in entries:
        for row, parts in (entry["run"]["played"] if entry["run"] else {}).items():
            played[entry["dataset"], row] = parts
    found = []
    for dataset in dict.fromkeys(entry["dataset"] for entry in entries):
        for limit in limits:
            base = played.get((dataset, BASE), {}).get(f"{limit:g}")
            for row in NAMES:
                parts = played.get((dataset, row))
                if parts:
                    part = parts.get("any") or parts[f"{limit:g}"]
                    found.append(summary(dataset, row, limit, part, base))
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown for one task and limit."""
    lines = []
    for row in rows:
        name, limited = NAMES[row["row"]]
        against = row["against"]
        lines.append(
            [
                f"**{name}**" if row["passes"] and limited else name if limited else f"*{name}*",
                span(row["return"], row["return_interval"], 0),
                span(row["cost"], row["cost_interval"]),
                f"{row['cost_ratio']:.2f}",
                f"{row['within']} of {row['seeds']}",
                row["limit_verdict"],
                f"{row['length']:.0f}",
                f"{against['difference']:+.0f}, {against['verdict']}" if against else "–",
            ]
        )
    heads = ["agent", "return", "cost", "cost / limit", "seeds within", "limit", "length",
             "return against BC-Safe"]  # fmt: skip
    return common.table(heads, lines)


def keepers(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: how often each constrained row passes, and where it does not and why."""
    lines = []
    for row in NAMES:
        own = [r for r in rows if r["row"] == row]
        if not own or row == BASE or not NAMES[row][1]:
            continue
        failed = []
        for r in own:
            robot = r["dataset"].split("/")[-1].split("-")[0]
            reasons = []
            if r["within"] < SHARE * r["seeds"]:
                reasons.append(f"cost {r['cost']:.0f}, {r['within']} of {r['seeds']} within")
            if r["against"] and r["against"]["difference"] <= 0:
                reasons.append(f"{r['against']['difference']:.0f} against BC-Safe")
            if reasons:
                failed.append(f"{robot} at {r['limit']:g} ({'; '.join(reasons)})")
        text = f"- {NAMES[row][0]}: {len(own) - len(failed)} of {len(own)}"
        lines.append(f"{text}. Not: {', '.join(failed)}." if failed else f"{text}.")
    return "\n".join(lines)


def report(rows: Sequence[dict[str, Any]], datasets: dict[str, Any], missing: Sequence[str]) -> str:
    """Markdown of everything."""
    names = list(dict.fromkeys(row["dataset"] for row in rows))
    limits = list(dict.fromkeys(row["limit"] for row in rows))
    facts = [
        [
            name,
            f"{datasets[name]['mean_return']:.0f}",
            f"{datasets[name]['mean_cost']:.0f}",
            *(f"{100 * datasets[name]['within'][f'{limit:g}']:.0f} %" for limit in limits),
        ]
        for name in names
    ]
    heads = ["data", "return", "cost", *(f"episodes within {limit:g}" for limit in limits)]
    parts = [
        "**The data are generated by saferl; none of these numbers compare with DSRL's.** Costs "
        "are undiscounted sums per episode, 1 for each of at most 1000 steps that is too fast.\n",
        common.table(heads, facts) + "\n",
        "## Who keeps the limits\n\nOf the tasks and limits below, how many an agent passes: at "
        f"least {SHARE:.0%} of its seeds cost no more than the limit, each by the mean of its "
        "episodes, and its mean return is above BC-Safe's.\n",
        keepers(rows) + "\n",
        "## Tables\n\nMean over seeds and episodes of the last policy, with a 95 % interval over "
        "both. *In italics*: not held to any limit. **In bold**: passes. Limit: *met* if the "
        "interval of the cost ends at or below it, *not met* if it begins above. Last column: "
        "difference of mean returns; *above* or *below* if its 95 % interval excludes 0.\n",
    ]
    for name in names:
        for limit in limits:
            own = [r for r in rows if r["dataset"] == name and r["limit"] == limit]
            parts.append(f"### {name}, limit {limit:g}\n\n{table(own)}\n")
    if missing:
        parts.append(f"## Not trained: {len(missing)}\n")
        parts += [f"- {name}" for name in missing]
        parts.append("")
    return "\n".join(parts)


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Return against cost: a panel per task and limit, the limit drawn."""
    plt = pyplot()
    names = list(dict.fromkeys(row["dataset"] for row in rows))
    limits = list(dict.fromkeys(row["limit"] for row in rows))
    figure, axes = plt.subplots(
        len(names), len(limits), figsize=(4.2 * len(limits), 3 * len(names)),
        layout="constrained", squeeze=False, sharex=True, sharey="row",
    )  # fmt: skip
    colours = plt.get_cmap("tab20").colors
    shown: dict[str, Any] = {}
    for line, name in zip(axes, names):
        for panel, limit in zip(line, limits):
            panel.axvspan(0, limit, color="#2e8b57", alpha=0.08, lw=0)
            panel.axvline(limit, color="#2e8b57", lw=1.2)
            for row in (r for r in rows if r["dataset"] == name and r["limit"] == limit):
                number = list(NAMES).index(row["row"])
                label, limited = NAMES[row["row"]]
                bars = (
                    np.abs(np.array(row[f"{what}_interval"])[:, None] - row[what])
                    for what in ("cost", "return")
                )
                shown[label] = panel.errorbar(
                    row["cost"], row["return"], *reversed([*bars]), fmt=MARKS[number], ms=6,
                    lw=0.8, color=colours[number], mfc=colours[number] if limited else "white",
                )  # fmt: skip
            panel.set_xscale("symlog", linthresh=10)
            panel.set_xlim(-1, 1100)
            panel.set_xticks([0, 10, 100, 1000], ["0", "10", "100", "1000"])
            panel.spines[["top", "right"]].set_visible(False)
            panel.set_title(f"{name.split('/')[-1].split('-')[0]}, limit {limit:g}", fontsize=9)
            panel.tick_params(labelsize=8)
    order = [label for label, _ in NAMES.values() if label in shown]
    figure.legend([shown[label] for label in order], order, loc="outside right upper", fontsize=8,
                  frameon=False)  # fmt: skip
    figure.supxlabel("cost per episode (linear below 10); hollow: not held to a limit", fontsize=9)
    figure.supylabel("return per episode", fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def scale(runs: Sequence[dict[str, Any]]) -> str:
    """A line per training on what was trained, from the entries themselves."""
    lines = []
    for training in dict.fromkeys(run["training"] for run in runs):
        own = [run for run in runs if run["training"] == training]
        run, seconds = own[0], [sum(r["seconds"].values()) for r in own]
        layers = ", ".join(
            f"{k} {'-'.join(map(str, v))}"
            for k, v in run["config"].items()
            if k.endswith("hidden") and isinstance(v, list)
        )
        config = run["config"]
        each = f"{config['batch_size']} transitions"
        if "episodes" in config:
            each = f"{config['episodes']} episodes of {config['horizon']} steps in a model"
        lines.append(
            f"- {training}: {len(run['names'])} members, {run['updates']} updates of {each}, "
            f"{layers}; {min(seconds):.0f} to {max(seconds):.0f} s"
        )
    return "\n".join(lines)


def write(
    book: Any, entries: Sequence[dict[str, Any]], limits: Sequence[float], folder: Path
) -> str:
    """Write the report and its plot, put the summary into the book; returns the report."""
    finished = [entry["run"] for entry in entries if entry["run"]]
    if not finished:
        return "Nothing has been trained at this scale.\n"
    rows = summaries(entries, limits)
    missing = [f"{e['dataset']}: {e['training']}" for e in entries if not e["run"]]
    book.content |= {"rows": rows, "missing": missing, "date": common.now()}
    plot(rows, folder / "limits.png")
    text = (
        "# Do agents keep a cost limit?\n\n![return against cost](limits.png)\n\n"
        + report(rows, book.content["datasets"], missing)
        + f"\n## Scale\n\n{scale(finished)}\n\nSeconds are of the wall on a machine that was busy "
        + f"with other work.\n\n{book.source()}.\n"
    )
    (folder / "limits.md").write_text(text)
    return text
