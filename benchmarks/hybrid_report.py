"""What `hybrid.py` makes of its results: a table per task, comparisons with intervals, curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
from evidence_report import pyplot, span, verdict
from hybrid_tasks import LIMIT, METHODS, TASKS, title_of
from scores_report import compare

from saferl.evaluation.statistics import bootstrap_interval

Row = dict[str, Any]
COLUMNS = 3  # of panels
LEVEL = 0.1  # share of its mean that a level return may differ by
SAME = {"cartpole, random data": "cartpole"}  # where SAC alone is trained
UNLIMITED = ("limits", "cost_limit=inf")
# What is set against what, on each task that has both; of final return and area.
PAIRS = (
    (("mixed_norm", ""), ("online", "")),
    (UNLIMITED, ("online", "")),
    (("mixed_meta", "eta=1"), ("online", "")),
    (("meta", "eta=1"), ("online", "")),
    (("mixed", ""), ("online", "")),
    (("one_buffer", ""), ("online", "")),
    (("blocks", ""), ("online", "")),
    (("meta_fast", ""), ("online", "")),
    (("meta", "eta=0.5"), ("online", "")),
    (("moorl", ""), ("online", "")),
    (("moorl_norm", ""), ("online", "")),
    (("iql", ""), ("online", "")),
    (("rlpd", ""), ("online", "")),
    (("cal_ql", ""), ("online", "")),
    (("wsrl", ""), ("online", "")),
    (("rlpd_20", ""), ("rlpd", "")),
    (("blocks", ""), ("mixed", "")),
    (("moorl", ""), ("blocks", "")),
    (("mixed_norm", ""), ("mixed", "")),
    (UNLIMITED, ("mixed", "")),
    (("meta_fast", ""), ("meta", "eta=1")),
    (("meta", "eta=0.5"), ("meta", "eta=1")),
    (("meta_norm", "eta=0.9"), ("meta_norm", "eta=1")),
    (("meta_20", "eta=0.5"), ("meta_20", "eta=1")),
    (("meta", "eta=1"), ("mixed_meta", "eta=1")),
    (("mixed_meta", "eta=0.5"), ("mixed_meta", "eta=1")),
    (("meta", "eta=0.5"), ("mixed_meta", "eta=0.5")),
    (("mixed_norm", ""), ("mixed_meta", "eta=1")),
    (("moorl_norm", ""), ("moorl", "")),
    (("moorl_norm", ""), ("mixed_norm", "")),
    (("moorl_norm", ""), UNLIMITED),
)


def rows_of(entry: Row) -> list[Row]:
    """A row per group of seeds of a finished training, with arrays of its seeds first."""
    run = entry["run"]
    variants = [" ".join(n.split(" ")[:-1]) for n in run["names"]]
    every = run["played"]["bare"]
    rows = []
    for variant in dict.fromkeys(variants):
        own = [m for m, name in enumerate(variants) if name == variant]

        def of(values: Any, own: list[int] = own) -> np.ndarray:
            return np.array(values, np.float64)[own]

        steps = np.array(run["curve"]["steps"])
        curve = of(np.array(run["curve"]["returns"]).T)  # [seeds, evaluations]
        probe = {name: of(np.array(run["probe"][name]).T) for name in ("mean", "largest")}
        metrics = run["metrics"]
        row = {
            "task": entry["task"],
            "of": (entry["method"], variant),
            "title": title_of(entry["method"], variant),
            "seeds": len(own),
            "returns": of(every["returns"]),
            "costs": None if every["costs"] is None else of(every["costs"]),
            "steps": steps,
            "curve": curve,
            "area": curve[:, steps > 0].mean(1),
            "probe": probe["mean"][:, steps > 0],
            "probe_largest": probe["largest"][:, steps > 0],
            "q_largest": of(metrics["q_largest"]) if "q_largest" in metrics else None,
            "updates": run["updates"]["critic"],
            "passes": run["passes"],
            "seconds": run["seconds"]["cpu"] / len(run["names"]),
            "explored": of(metrics["exploration_cost"]) if "exploration_cost" in metrics else None,
            "multiplier": of(metrics["multiplier"]) if "multiplier" in metrics else None,
            "guarded": None,
        }
        if "guarded" in run["played"]:
            part = run["played"]["guarded"]
            row["guarded"] = {name: of(part[name]) for name in ("returns", "costs")}
            row["changed"] = of(metrics["guard_changed"])
        rows.append(row)
    return rows


def interval(values: np.ndarray) -> tuple[float, float]:
    """95 %, over seeds (and episodes, if there is a second axis)."""
    return bootstrap_interval(values if values.ndim == 2 else values[:, None])


def shown(values: np.ndarray | None, digits: int = 0, least: float = -np.inf) -> str:
    if values is None:
        return "–"
    low, high = interval(values)
    return span(float(values.mean()), (max(low, least), high), digits)


def table(rows: Sequence[Row]) -> str:
    """Markdown of one task."""
    costs = any(row["costs"] is not None for row in rows)
    lines = [
        [
            row["title"],
            shown(row["returns"]),
            shown(row["area"]),
            *([shown(row["costs"], 0, 0.0)] if costs else []),
            shown(row["probe"][:, -1], 1),
            f"{row['probe_largest'].max():.1f}",
            "–" if row["q_largest"] is None else f"{row['q_largest'].max():.1f}",
            f"{row['updates'] / 1000:.1f}",
            f"{row['passes'] / 1000:.0f}",
            f"{row['seconds']:.0f}",
        ]
        for row in rows
    ]
    heads = ["method", "final", "area", *(["final cost"] if costs else []), "Q on probes",
             "largest on probes", "largest of a batch", "critic steps / 1000", "passes / 1000",
             "CPU s per seed"]  # fmt: skip
    return common.table(heads, lines)


def explored(rows: Sequence[Row]) -> str:
    """Markdown of what exploring cost under a guard and a limit; empty where nothing did."""
    base = next((row for row in rows if row["of"] == UNLIMITED), None)
    if base is None:
        return ""
    lines = []
    for row in rows:
        if row["explored"] is None:
            continue
        played = row["guarded"] or {"returns": row["returns"], "costs": row["costs"]}
        difference = "–"
        if row is not base:
            value, low, high = compare(played["returns"], base["returns"])
            difference = f"{span(value, (low, high), 0)}, {verdict(low, high)}"
        lines.append(
            [
                row["title"],
                shown(row["explored"], 0, 0.0),
                f"{row['explored'].mean() / base['explored'].mean():.2f}",
                shown(played["returns"]),
                shown(played["costs"], 0, 0.0),
                f"{int((played['costs'].mean(1) <= LIMIT).sum())} of {row['seeds']}",
                difference,
                "–" if row["guarded"] is None else f"{100 * row['changed'].mean():.0f} %",
                "–" if row["multiplier"] is None else f"{row['multiplier'].mean():.1f}",
            ]
        )
    heads = ["method", "cost of exploring", "share", "return as run", "cost as run",
             f"within {LIMIT:g}", "return against no limit", "guard changed", "ρ"]  # fmt: skip
    return common.table(heads, lines)


def level_from(means: np.ndarray) -> int | None:
    """The first evaluation from which none is further than `LEVEL` from the mean of all of those.

    Four evaluations or more; None where there are no such.
    """
    for start in range(len(means) - 3):
        rest = means[start:]
        if rest.mean() > 0 and (abs(rest - rest.mean()) <= LEVEL * rest.mean()).all():
            return start
    return None


def settled(rows: Sequence[Row]) -> str:
    """Markdown: what Q at the probes does once the return is level; empty where none is."""
    lines = []
    for row in rows:
        acting = row["steps"] > 0
        steps, means = row["steps"][acting], row["curve"][:, acting].mean(0)
        start = level_from(means)
        if start is None:
            continue
        first, last = row["probe"][:, start], row["probe"][:, -1]
        low, high = interval(last - first)
        change = span((last - first).mean(), (low, high), 1)
        trend = verdict(low, high, ("rising", "falling", "level"))
        lines.append(
            [row["task"], row["title"], f"{steps[start]} to {steps[-1]}",
             f"{means[start:].mean():.0f}", f"{first.mean():.1f}", f"{last.mean():.1f}",
             f"{change}, {trend}"]
        )  # fmt: skip
    heads = ["task", "method", "steps", "return", "Q at first", "at last", "change"]
    return common.table(heads, lines) if lines else ""


def comparisons(rows: Sequence[Row]) -> str:
    """Markdown: differences of final return and of area, with 95 % intervals."""
    found = {(row["task"], row["of"]): row for row in rows}
    lines = []
    for task in dict.fromkeys(row["task"] for row in rows):
        for one, other in PAIRS:
            a = found.get((task, one))
            where = SAME.get(task, task) if other == ("online", "") else task
            b = found.get((where, other))
            if a is None or b is None:
                continue
            cells = []
            for name in ("returns", "area"):
                x, y = (v if v.ndim == 2 else v[:, None] for v in (a[name], b[name]))
                value, low, high = compare(x, y)
                cells.append(f"{span(value, (low, high), 0)}, {verdict(low, high)}")
            lines.append([task, a["title"], b["title"], *cells])
    return common.table(["task", "this", "against", "final", "area"], lines) if lines else ""


def report(rows: Sequence[Row], datasets: dict[str, Any], missing: Sequence[str]) -> str:
    """Markdown of everything."""
    parts = [
        "**Scores come from generated data**: cartpole's sets are made by the command, the others "
        "are saferl's own. None compares with a published score, and none is MOORL's.\n",
        "Mean over seeds and episodes of the last policy (*final*), mean of the evaluations while "
        "acting (*area*), each with a 95 % interval over seeds (and episodes). Q on probes: mean "
        "of Q(s, π(s)) over 512 fixed logged states at the end; its largest value at any of them "
        "and any evaluation and seed; and the largest mean Q of a batch of any seed. Critic steps "
        "and passes through one network (forward 1, with gradient 3) are a seed's, pre-training "
        "included.\n",
    ]
    for task in (name for name in TASKS if any(row["task"] == name for row in rows)):
        own, facts = [row for row in rows if row["task"] == task], TASKS[task]
        data = datasets[facts.data]
        cost = f" and a cost of {data['mean_cost']:.0f}" if "mean_cost" in data else ""
        parts.append(
            f"## {task}\n\n`{facts.env}`, {own[0]['steps'][-1]} environment steps, "
            f"{facts.utd} critic step(s) each, {own[0]['seeds']} seeds. Data: `{facts.data}`, "
            f"{data['transitions']} transitions, episodes with a mean return of "
            f"{data['mean_return']:.0f}{cost} ({data['origin']}).\n\n{table(own)}\n"
        )
        if text := explored(own):
            parts.append(
                f"What exploring cost, and what the last policy does as it was trained (under its "
                f"guard, if any); limit {LIMIT:g} per episode.\n\n{text}\n"
            )
    if text := comparisons(rows):
        parts.append(
            "## Comparisons\n\nDifferences, with 95 % intervals; *above* or *below* if the "
            f"interval excludes 0.\n\n{text}\n"
        )
    if text := settled(rows):
        parts.append(
            "## Q once the return is level\n\nFrom the first evaluation after which the mean "
            f"return of the seeds stays within {100 * LEVEL:.0f} % of its mean over the rest (four "
            "evaluations or more): mean Q on the probes there and at the end, and the change with "
            f"its 95 % interval over seeds.\n\n{text}\n"
        )
    if missing:
        parts.append(f"## Not trained: {len(missing)}\n")
        parts += [f"- {name}" for name in missing]
        parts.append("")
    return "\n".join(parts)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Return over environment steps; the band is the range of the seeds.

    A panel per task, and one more for what learns under a limit or acts under a guard.
    """
    plt = pyplot()
    panels: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: list(TASKS).index(row["task"])):
        bound = "limit" in row["title"] or "guard" in row["title"]
        name = f"{row['task']}, under a limit or a guard" if bound else row["task"]
        panels.setdefault(name, []).append(row)
    lines = math.ceil(len(panels) / COLUMNS)
    figure, axes = plt.subplots(
        lines, COLUMNS, figsize=(4.6 * COLUMNS, 4.6 * lines), layout="constrained", squeeze=False
    )
    for panel in axes.flat[len(panels) :]:
        panel.set_axis_off()
    titles = list(dict.fromkeys(row["title"] for row in rows))  # one colour in all panels
    colours = plt.get_cmap("tab20").colors
    for panel, (name, own) in zip(axes.flat, panels.items()):
        for row in own:
            number = titles.index(row["title"])
            colour, mark = colours[number % len(colours)], "os"[number // len(colours)]
            panel.plot(row["steps"], row["curve"].mean(0), f"{mark}-", ms=3, color=colour,
                       label=row["title"])  # fmt: skip
            low, high = row["curve"].min(0), row["curve"].max(0)
            panel.fill_between(row["steps"], low, high, color=colour, alpha=0.08, lw=0)
        panel.set_title(name, fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8)
        panel.legend(fontsize=6.5, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.1))
    figure.supylabel("return per episode", fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write(book: Any, entries: Sequence[Row], folder: Path) -> str:
    """Write the report and its plot; returns the report."""
    finished = [entry for entry in entries if entry["run"]]
    if not finished:
        return "Nothing has been trained at this scale.\n"
    finished.sort(key=lambda entry: list(METHODS).index(entry["method"]))
    rows = [row for entry in finished for row in rows_of(entry)]
    missing = [f"{e['task']}: {e['method']}" for e in entries if not e["run"]]
    plot(rows, folder / "hybrid.png")
    text = (
        "# Offline data and an environment together\n\n![return over steps](hybrid.png)\n\n"
        + report(rows, book.content["datasets"], missing)
        + f"\n{book.source()}, one thread of a machine that was busy with other work.\n"
    )
    (folder / "hybrid.md").write_text(text)
    return text
