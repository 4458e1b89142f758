"""Tables, verdicts and plot of the study `speed`, from its results."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.report import pyplot, table
from benchmarks.speed import acting, online

# Times are of the update alone on a CPU, of sampling and update on a GPU.
PEER_TARGETS = {"td3_bc": 1.5, "iql": 1.5, "cql": 1.2}  # d3rlpy's sample + update / ours, at least
PLAIN_TARGETS = {  # our update / the plain one's, at most (CPU)
    ("a2pr", "saferl"): 0.85,
    ("a2pr", "saferl compile"): 0.85,
    ("a2pr", "saferl bf16"): 0.5,
    ("a2pr", "saferl bf16 compile"): 0.5,
    ("cql", "saferl bf16"): 0.45,
    ("cql", "saferl bf16 compile"): 0.45,
}
NEEDS_AMX = {("a2pr", "saferl bf16"), ("a2pr", "saferl bf16 compile")}
FLOOR_TARGETS = {"a2pr": 1.8, "cql": 1.8}  # update / floor in fp32, at most (CPU)
SAMPLING_TARGET = 0.03  # of an update, at most; in long runs with logging, of the loop
MINUTES = {("a2pr", 1): 4, ("a2pr", 16): 15, ("td3_bc", 1): 2, ("cql", 1): 8}  # GPU, a million
MEMORY_TARGET = 0.1  # deviation from the estimate, at most

HEADS = {
    "beside": ["agent", "side", "ms", "update ms", "sampling", "time / ours", "80 % of rounds",
               "floor ms", "update / floor"],
    "matrix": ["agent", "precision", "members", "floor ms", "eager ms", "/ floor", "compile ms",
               "/ floor", "cuda_graph ms", "/ floor", "best ms per member"],
    "long": ["agent", "side", "members", "engine", "min per million", "/ floor", "logging",
             "sampling", "memory", "estimate", "resident", "launches", "products", "other",
             "waiting", "bound by"],
    "acting": acting.HEADS,
    "online": online.HEADS,
}  # fmt: skip
TITLES = {
    "beside": "Ours beside d3rlpy and plain implementations",
    "matrix": "Engines, precisions and members",
    "long": "Long runs, extrapolated to a million updates",
    "acting": "Compiled updates while acting",
    "online": "What acting costs the loop, and the meta step MOORL",
}


def number(value: Any, form: str = ".3g") -> str:
    return "–" if value is None else format(value, form)


def percent(value: Any) -> str:
    return f"{100 * value:.1f} %" if isinstance(value, float) else "–"


# Tables --------------------------------------------------------------------------------------


def beside_rows(rows: list[dict[str, Any]]) -> Iterable[list[str]]:
    for row in rows:
        for name, side in row.get("sides", {}).items():
            yield [
                row["agent"], name, number(side["ms"]), number(side.get("update_ms")),
                percent(side.get("sampling_share")), number(side["over_ours"]),
                "{:.2f} – {:.2f}".format(*side["over_ours_spread"]), number(side["floor_ms"]),
                number(side["over_floor"]),
            ]  # fmt: skip


def counts(cell: dict[str, Any]) -> bool:
    """Whether a combination was measured, and the measurement stands."""
    return "ms" in cell and "withdrawn" not in cell


def matrix_rows(rows: list[dict[str, Any]]) -> Iterable[list[str]]:
    for row in rows:
        cells = {(c["precision"], c["members"], c["kind"]): c for c in row.get("rows", [])}
        for precision, members in dict.fromkeys(key[:2] for key in cells):
            own = [cells.get((precision, members, kind), {}) for kind in LINES]
            measured = [cell for cell in own if counts(cell)]
            if measured:
                pairs = [
                    "withdrawn" if "withdrawn" in c else number(c.get(key))
                    for c in own
                    for key in ("ms", "over_floor")
                ]
                best = min(cell["ms_per_member"] for cell in measured)
                floor = statistics.median(cell["floor_ms"] for cell in measured)
                yield [row["agent"], precision, str(members), number(floor), *pairs,
                       number(best)]  # fmt: skip


def long_rows(rows: list[dict[str, Any]]) -> Iterable[list[str]]:
    for row in rows:
        for run in row.get("rows", []):
            if "minutes_per_million" not in run:
                continue
            profile = run.get("profile", {})
            share = profile.get("share", {})
            memory = [run.get(k) for k in ("memory_bytes", "estimated_bytes", "resident_bytes")]
            yield [
                row["agent"], " ".join(filter(None, (run["side"], run.get("precision")))),
                str(run["members"]), run.get("engine", "–"), number(run["minutes_per_million"]),
                number(run.get("over_floor")), percent(run.get("logging_share")),
                percent(run.get("sampling_share")),
                *("–" if size is None else f"{size / 2**20:.0f} MiB" for size in memory),
                number(profile.get("launches")),
                *(percent(share.get(k)) for k in ("products", "others", "idle")),
                profile.get("bound_by", profile.get("missing", "–")),
            ]  # fmt: skip


ROWS = {"beside": beside_rows, "matrix": matrix_rows, "long": long_rows, "acting": acting.rows,
        "online": online.rows}  # fmt: skip


def absent(part: str, rows: list[dict[str, Any]]) -> list[str]:
    """One line per reason, with what it concerns."""
    reasons: dict[str, list[str]] = {}

    def add(reason: str, what: str) -> None:
        reasons.setdefault(reason, []).append(what)

    for row in rows:
        if "failed" in row:
            add(f"failed: {row['failed']}", row["agent"])
        if part == "beside":
            for name, reason in row.get("missing", {}).items():
                add(reason, f"{row['agent']} {name}")
            continue
        for cell in row.get("rows", []):
            names = ("side", "kind", "precision", "members")
            what = " ".join(str(cell[name]) for name in names if name in cell)
            what = what if part == "matrix" else f"{row['agent']} {what}"
            if "withdrawn" in cell:
                add(cell["withdrawn"], f"{row['agent']} {what}")
            if "missing" in cell:
                add(cell["missing"], what)
            for key in ("sampling_share", "profile", "estimate"):
                if isinstance(cell.get(key), dict) and "missing" in cell[key]:
                    add(f"{key}: {cell[key]['missing']}", what)
    return [f"{reason}: {', '.join(dict.fromkeys(what))}" for reason, what in reasons.items()]


def report(document: dict[str, Any]) -> str:
    """All parts as Markdown."""
    machine = document["machine"]
    where = machine.get("gpu") or f"one thread of {machine['cpu']}"
    parts = []
    if document["quick"]:
        parts.append("**`--quick`: tiny networks, to see that everything runs. No number counts.**")
    for name, part in document["parts"].items():
        done = [row for row in part["rows"] if "failed" not in row]
        text = [f"## {TITLES[name]}", table(HEADS[name], list(ROWS[name](done)))]
        if missing := absent(name, part["rows"]):
            text.append(
                "Not on this machine, or left out:\n\n" + "\n".join(f"- {line}" for line in missing)
            )
        source = f"`{part['command']}`, {part['date']}, {part['clock']} clock, {where}."
        rates = [row["gflops"] for row in part["rows"] if "gflops" in row]
        for precision in sorted({p for rate in rates for p in rate}):
            rate = statistics.median(r[precision] for r in rates if precision in r)
            source += f" Large {precision} product: {rate:.4g} GFLOP/s."
        parts.append("\n\n".join([*text, source]))
    if document.get("verdicts"):
        lines = "\n".join(f"- {line}" for line in document["verdicts"])
        parts.append(f"## Targets\n\n{lines}")
    return "\n\n".join(parts) + "\n"


# Verdicts ------------------------------------------------------------------------------------


def verdict(what: str, value: float, target: float, least: bool = False) -> str:
    met = value >= target if least else value <= target
    sign = "≥" if least else "≤"
    return f"{'met' if met else 'MISSED'}: {what} {value:.3g} (target {sign} {target:g})"


def verdicts(document: dict[str, Any]) -> list[str]:
    """One line per target that this machine can be held to, and per one that it cannot."""
    if document["quick"]:
        return []
    lines, parts = [], document["parts"]
    cpu = document["machine"].get("gpu") is None
    for row in parts.get("beside", {}).get("rows", []):
        if cpu:
            lines += beside_verdicts(row, document["machine"].get("amx", False))
    for row in parts.get("long", {}).get("rows", []):
        lines += long_verdicts(row, cpu)
    return lines


def beside_verdicts(row: dict[str, Any], amx: bool) -> list[str]:
    agent, sides, lines = row["agent"], row.get("sides", {}), []
    ours = sides.get("saferl")
    if ours is None:
        return [f"MISSED: {agent} was not measured"]
    if agent in PEER_TARGETS and "d3rlpy" in sides:
        what = f"{agent}: d3rlpy's sample + update / ours"
        lines.append(verdict(what, sides["d3rlpy"]["over_ours"], PEER_TARGETS[agent], True))
    for (name, side), target in PLAIN_TARGETS.items():
        if name != agent:
            continue
        what = f"{agent}: update of {side} / of the plain implementation"
        if (name, side) in NEEDS_AMX and not amx:
            lines.append(f"not on this machine: {what} (target ≤ {target:g} where there is AMX)")
        elif side in sides and "plain" in sides:
            ratio = sides[side]["update_over_ours"] / sides["plain"]["update_over_ours"]
            lines.append(verdict(what, ratio, target))
    lines.append(verdict(f"{agent}: sampling / update", ours["sampling_share"], SAMPLING_TARGET))
    if agent in FLOOR_TARGETS:
        lines.append(verdict(f"{agent}: update / floor", ours["over_floor"], FLOOR_TARGETS[agent]))
    return lines


def long_verdicts(row: dict[str, Any], cpu: bool) -> list[str]:
    """Of the float32 run; the reference card for minutes is one H200."""
    lines = []
    for run in row.get("rows", []):
        if run.get("precision") != "fp32" or "minutes_per_million" not in run:
            continue
        what = f"{row['agent']}, {run['members']} members"
        if not cpu:
            target = MINUTES[row["agent"], run["members"]]
            minutes = run["minutes_per_million"]
            lines.append(verdict(f"{what}: minutes per million updates", minutes, target))
        if isinstance(run["sampling_share"], float):
            both = run["sampling_share"] + run["logging_share"]
            lines.append(verdict(f"{what}: sampling and logging / loop", both, SAMPLING_TARGET))
        if run["estimated_bytes"] and run["members"] == 16:  # of few, libraries are a large part
            off = abs(run["memory_bytes"] / run["estimated_bytes"] - 1)
            lines.append(verdict(f"{what}: memory off its estimate by", off, MEMORY_TARGET))
    return lines


# Plot ----------------------------------------------------------------------------------------

COLOURS = {"plain": "#9aa5b1", "d3rlpy": "#6b7785", "d3rlpy compile": "#3d4753",
           "saferl": "#1f6fb2", "saferl compile": "#17507f", "saferl bf16": "#7fb8e6",
           "saferl bf16 compile": "#b9d9f2", "floor": "#e0a030"}  # fmt: skip
LINES = {"eager": "-", "compile": "--", "cuda_graph": ":"}


def plot(document: dict[str, Any], path: Path) -> None:
    """Bars of the sides, and for each agent time per member-update against members."""
    plt = pyplot()
    parts = document["parts"]
    beside = [r for r in parts.get("beside", {}).get("rows", []) if r.get("sides")]
    matrix = [r for r in parts.get("matrix", {}).get("rows", [])
              if any(counts(cell) for cell in r.get("rows", []))]  # fmt: skip
    columns = 4
    lines = math.ceil(len(matrix) / columns)
    if not beside and not matrix:
        return
    heights = [3.4] * bool(beside) + [2.4] * lines
    figure = plt.figure(figsize=(11, sum(heights) + 0.5), layout="constrained")
    grid = figure.add_gridspec(len(heights), columns, height_ratios=heights)
    if beside:
        bars(figure.add_subplot(grid[0, :]), beside)
    for index, row in enumerate(matrix):
        line, column = divmod(index, columns)
        curves(figure.add_subplot(grid[line + bool(beside), column]), row)
    shown: dict[str, Any] = {}  # not every panel has every line
    for panel in figure.axes[bool(beside) :]:
        shown |= {label: line for line, label in zip(*panel.get_legend_handles_labels())}
    figure.legend(shown.values(), shown, loc="outside lower center", ncols=8, fontsize=7,
                  frameon=False)  # fmt: skip
    machine = document["machine"]
    where = machine.get("gpu") or f"one thread of {machine['cpu']}"
    date = max(part["date"] for part in parts.values())
    quick = "QUICK, numbers mean nothing; " if document["quick"] else ""
    title = f"{quick}batch 256, HalfCheetah's shapes; {where}, {date}"
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def bars(axes: Any, rows: list[dict[str, Any]]) -> None:
    names = [n for n in COLOURS if n == "floor" or any(n in row["sides"] for row in rows)]
    width = 0.85 / len(names)
    for offset, name in enumerate(names):
        points = [
            (place, row["sides"]["saferl"]["floor_ms"] if name == "floor" else side["ms"])
            for place, row in enumerate(rows)
            if (side := row["sides"].get("saferl" if name == "floor" else name))
        ]
        where = [place + (offset - (len(names) - 1) / 2) * width for place, _ in points]
        drawn = axes.bar(where, [ms for _, ms in points], width, color=COLOURS[name], label=name)
        axes.bar_label(drawn, [f"{ms:.3g}" for _, ms in points], fontsize=6, padding=1)
    axes.set(yscale="log", ylabel="ms per sample + update", xticks=range(len(rows)))
    axes.set_xticklabels([row["agent"] for row in rows])
    axes.set_ylim(top=axes.get_ylim()[1] * 4)
    axes.legend(fontsize=7, frameon=False, loc="upper left", ncols=3)
    axes.spines[["top", "right"]].set_visible(False)


def curves(axes: Any, row: dict[str, Any]) -> None:
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    cells = [cell for cell in row["rows"] if counts(cell)]
    for kind, precision in dict.fromkeys((c["kind"], c["precision"]) for c in cells):
        own = [c for c in cells if (c["kind"], c["precision"]) == (kind, precision)]
        colour = COLOURS["saferl" if precision == "fp32" else "saferl bf16"]
        axes.plot([c["members"] for c in own], [c["ms_per_member"] for c in own], LINES[kind],
                  marker="o", markersize=3, color=colour, label=f"{kind} {precision}")  # fmt: skip
        if kind == "eager":
            axes.plot([c["members"] for c in own], [c["floor_ms"] / c["members"] for c in own],
                      color=COLOURS["floor"], linewidth=0.8,
                      label="floor")  # fmt: skip
    ticks = sorted({cell["members"] for cell in cells})
    axes.set(xscale="log", yscale="log", title=row["agent"], xticks=ticks, xticklabels=ticks)
    axes.title.set_fontsize(8)
    axes.tick_params(labelsize=7, which="both")
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.set_xlabel("members", fontsize=7)
    axes.set_ylabel("ms per member-update", fontsize=7)
    axes.spines[["top", "right"]].set_visible(False)
