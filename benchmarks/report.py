"""What `evidence.py` makes of its results: tables, verdicts, sensitivity and plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
from scores_report import NOT_D4RL, compare

from saferl.evaluation.statistics import bootstrap_interval, interquartile_mean

SUBJECT, PEERS = "a2pr", ("td3_bc", "bc", "iql", "cql")
NAMES = {"a2pr": "A2PR", "td3_bc": "TD3+BC", "bc": "BC", "iql": "IQL", "cql": "CQL"}
COLOURS = {"a2pr": "#c0392b", "td3_bc": "#1f6fb2", "bc": "#7f8c8d", "iql": "#27864a",
           "cql": "#8e5bb5"}  # fmt: skip


def to_score(value: Any, reference: Sequence[float]) -> np.ndarray:
    """Returns as scores: 0 is the random and 100 the expert reference."""
    low, high = reference
    return 100 * (np.asarray(value, np.float64) - low) / (high - low)


def summary(entry: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """Mean return and scores of a training's last policies, with 95 % intervals."""
    returns, reference = np.array(entry["run"]["returns"]), facts["reference_returns"]
    interval = bootstrap_interval(returns)
    scores = to_score(returns, reference)
    return {
        "dataset": entry["dataset"],
        "agent": entry["agent"],
        "members": returns.shape[0],
        "episodes": returns.shape[1],
        "return": float(returns.mean()),
        "return_interval": list(interval),
        "score": float(scores.mean()),
        "score_interval": to_score(interval, reference).tolist(),
        "iqm_score": float(interquartile_mean(scores.reshape(-1))),
        "iqm_interval": list(bootstrap_interval(scores, interquartile_mean)),
    }


def verdict(
    low: float, high: float, words: Sequence[str] = ("above", "below", "cannot tell")
) -> str:
    """Of a difference, from its interval: the word for more, for less, and for neither."""
    return words[0] if low > 0 else words[1] if high < 0 else words[2]


def pooled(differences: Sequence[tuple[float, float, float]]) -> tuple[float, float, float]:
    """Mean of independent differences ``(estimate, low, high)``, with an interval.

    The distances to the ends add as roots of sums of squares (method of variance estimates
    recovery, as in `compare`).
    """
    d, low, high = np.array(differences, np.float64).T
    mean, n = d.mean(), len(d)
    down, up = np.sqrt(np.square(d - low).sum()) / n, np.sqrt(np.square(high - d).sum()) / n
    return float(mean), float(mean - down), float(mean + up)


def comparisons(
    entries: Sequence[dict[str, Any]],
    datasets: dict[str, Any],
    mixtures: dict[str, list[str]],
) -> list[dict[str, Any]]:
    """A2PR's score minus each other agent's: per dataset, and mean over a robot's mixtures."""
    scores = {
        (e["dataset"], e["agent"]): to_score(
            e["run"]["returns"], datasets[e["dataset"]]["reference_returns"]
        )
        for e in entries
        if e["run"] and e["varied"] is None
    }
    found = []
    for peer in PEERS:
        of = {
            name: compare(scores[name, SUBJECT], scores[name, peer])
            for name in dict.fromkeys(e["dataset"] for e in entries)
            if (name, SUBJECT) in scores and (name, peer) in scores
        }
        found += [row(name, peer, *values) for name, values in of.items()]
        for robot, names in mixtures.items():
            there = [of[name] for name in names if name in of]
            if len(there) > 1:
                what = f"mean of {len(there)} of {len(names)} mixtures of {robot}"
                found.append(row(what, peer, *pooled(there)))
    return found


def row(where: str, peer: str, difference: float, low: float, high: float) -> dict[str, Any]:
    return {"where": where, "peer": peer, "difference": difference, "interval": [low, high],
            "verdict": verdict(low, high)}  # fmt: skip


def sensitivity(
    entries: Sequence[dict[str, Any]], datasets: dict[str, Any]
) -> list[dict[str, Any]]:
    """A row per varied value: score over its own members, and whether it is the one in use."""
    plain = {(e["dataset"], e["agent"]): e["settings"] for e in entries if e["varied"] is None}
    rows = []
    for entry in entries:
        if not entry["run"] or not entry["varied"]:
            continue
        ((field, values),) = entry["varied"].items()
        returns = np.array(entry["run"]["returns"]).reshape(len(values), entry["members"], -1)
        reference = datasets[entry["dataset"]]["reference_returns"]
        in_use = plain.get((entry["dataset"], entry["agent"]), {})
        for value, block in zip(values, returns):
            rows.append(
                {
                    "dataset": entry["dataset"],
                    "field": field,
                    "value": value,
                    "in_use": value == in_use.get(field),
                    "score": float(to_score(block, reference).mean()),
                    "score_interval": to_score(bootstrap_interval(block), reference).tolist(),
                }
            )
    return rows


def span(value: float, interval: Sequence[float], digits: int = 1) -> str:
    low, high = interval
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def report(
    rows: Sequence[dict[str, Any]],
    differences: Sequence[dict[str, Any]],
    varied: Sequence[dict[str, Any]],
    missing: Sequence[str],
    datasets: dict[str, Any],
) -> str:
    """Markdown: scores side by side, verdicts, sensitivity, every training in full, the missing."""
    agents = [agent for agent in NAMES if any(r["agent"] == agent for r in rows)]
    cells = {(r["dataset"], r["agent"]): r for r in rows}
    names = list(dict.fromkeys(r["dataset"] for r in rows))
    body = []
    for name in names:
        data = to_score(datasets[name]["mean_return"], datasets[name]["reference_returns"])
        scores = [
            span(cells[name, a]["score"], cells[name, a]["score_interval"])
            if (name, a) in cells
            else "missing"
            for a in agents
        ]
        body.append([name, f"{data:.1f}", *scores])
    parts = [
        f"**{NOT_D4RL}**\n",
        "## Scores\n\nD4RL's reference returns are 0 and 100; mean over members and episodes of "
        "the last policy, 95 % interval over both. *data*: mean score of the dataset's episodes.\n",
        common.table(["dataset", "data", *(NAMES[a] for a in agents)], body) + "\n",
        "## Is A2PR above?\n\nDifference of scores, A2PR minus the other, with a 95 % interval. "
        "*above* and *below*: the interval lies on one side of 0.\n",
    ]
    for peer in PEERS:
        lines = [d for d in differences if d["peer"] == peer]
        if not lines:
            parts.append(f"- {NAMES[peer]}: missing\n")
            continue
        count = {v: sum(d["verdict"] == v for d in lines if "/" in d["where"])
                 for v in ("above", "below", "cannot tell")}  # fmt: skip
        parts.append(
            f"### against {NAMES[peer]}\n\nDatasets: "
            + ", ".join(f"{n} {v}" for v, n in count.items())
            + ".\n"
        )
        parts += [f"- {d['where']}: {span(d['difference'], d['interval'])}: **{d['verdict']}**"
                  for d in lines]  # fmt: skip
        parts.append("")
    if varied:
        parts.append(
            "## Sensitivity of A2PR\n\nOne coefficient varied at a time, the others as in use. All "
            "values of a coefficient are members of one run.\n"
        )
        parts.append(
            common.table(
                ["dataset", "coefficient", "value", "score"],
                [
                    [r["dataset"], r["field"],
                     f"{r['value']:g}" + (" (in use)" if r["in_use"] else ""),
                     span(r["score"], r["score_interval"])]
                    for r in varied
                ],
            ) + "\n"
        )  # fmt: skip
    parts.append("## Every training\n")
    parts.append(
        common.table(
            ["dataset", "agent", "return", "score", "IQM of scores", "members × episodes"],
            [
                [
                    r["dataset"],
                    NAMES[r["agent"]],
                    span(r["return"], r["return_interval"], 0),
                    span(r["score"], r["score_interval"]),
                    span(r["iqm_score"], r["iqm_interval"]),
                    f"{r['members']} × {r['episodes']}",
                ]
                for r in sorted(rows, key=lambda r: names.index(r["dataset"]))
            ],
        )
        + "\n"
    )
    if missing:
        parts.append(f"## Missing: {len(missing)} trainings\n")
        parts += [f"- {name}" for name in missing]
        parts.append("")
    return "\n".join(parts)


def scale(runs: Sequence[dict[str, Any]]) -> str:
    """One line on what was trained, from the entries themselves."""
    lines = []
    for agent in dict.fromkeys(run["agent"] for run in runs):
        run = next(run for run in runs if run["agent"] == agent)
        sizes = {
            k: v for k, v in run["config"].items() if k.endswith("hidden") and isinstance(v, list)
        }
        layers = ", ".join(f"{k} {'-'.join(map(str, v))}" for k, v in sizes.items())
        extra = f", N {run['config']['samples']}" if agent == "cql" else ""
        lines.append(
            f"- {NAMES[agent]}: {run['updates']} updates of {run['settings']['batch_size']} "
            f"transitions, {layers}{extra}"
        )
    return "\n".join(lines)


def plot_mixtures(
    rows: Sequence[dict[str, Any]],
    datasets: dict[str, Any],
    mixtures: dict[str, list[str]],
    path: Path,
) -> bool:
    """Score against the expert's share, one panel per robot; whether there was anything to draw."""
    cells = {(r["dataset"], r["agent"]): r for r in rows}
    robots = [r for r, names in mixtures.items() if any(n in datasets for n in names)]
    robots = [r for r in robots if any((n, a) in cells for n in mixtures[r] for a in NAMES)]
    if not robots:
        return False
    plt = pyplot()
    figure, axes = plt.subplots(
        1, len(robots), figsize=(4.2 * len(robots) + 2.4, 3.8), layout="constrained", squeeze=False
    )
    for panel, robot in zip(axes[0], robots):
        share = {name: int(name.split("-")[-2]) for name in mixtures[robot]}
        known = [name for name in mixtures[robot] if name in datasets]
        panel.plot(
            [share[n] for n in known],
            [to_score(datasets[n]["mean_return"], datasets[n]["reference_returns"]) for n in known],
            "--", color="#444444", lw=1, label="mean of the data",
        )  # fmt: skip
        for number, agent in enumerate(NAMES):
            there = [cells[n, agent] for n in mixtures[robot] if (n, agent) in cells]
            if not there:
                continue
            x = np.array([share[r["dataset"]] for r in there]) * 1.03 ** (number - 2)
            y = np.array([r["score"] for r in there])
            ends = np.array([r["score_interval"] for r in there]).T
            panel.errorbar(x, y, np.abs(ends - y), fmt="o-", ms=4, capsize=3, lw=1.3,
                           color=COLOURS[agent], label=NAMES[agent])  # fmt: skip
        panel.set(xscale="log", xlabel="expert's share of the rows, %", ylabel="score")
        panel.set_xticks(list(share.values()), [str(v) for v in share.values()])
        panel.minorticks_off()
        panel.set_title(f"{robot}, expert and random", fontsize=10)
        panel.spines[["top", "right"]].set_visible(False)
    legend(figure, axes, "outside right center", 1)
    figure.suptitle("Mean and 95 % interval over members and episodes. Not D4RL's data.",
                    fontsize=9)  # fmt: skip
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def plot_curves(entries: Sequence[dict[str, Any]], datasets: dict[str, Any], path: Path) -> None:
    """Scores during training, one panel per dataset: mean of the members, and their range."""
    plt = pyplot()
    there = [e for e in entries if e["run"] and e["varied"] is None]
    names = list(dict.fromkeys(e["dataset"] for e in there))
    columns = min(5, len(names))
    lines = -(-len(names) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(3 * columns, 2.4 * lines), layout="constrained", squeeze=False
    )
    for panel in axes.flat[len(names) :]:
        panel.set_visible(False)
    for panel, name in zip(axes.flat, names):
        for entry in (e for e in there if e["dataset"] == name):
            curve, colour = entry["run"]["curve"], COLOURS[entry["agent"]]
            scores = to_score(curve["returns"], datasets[name]["reference_returns"])
            panel.plot(curve["updates"], scores.mean(1), color=colour, label=NAMES[entry["agent"]])
            panel.fill_between(curve["updates"], scores.min(1), scores.max(1), color=colour,
                               alpha=0.15, lw=0)  # fmt: skip
        panel.set_title(name, fontsize=7)
        panel.tick_params(labelsize=7)
        panel.spines[["top", "right"]].set_visible(False)
    legend(figure, axes, "outside upper center", len(NAMES))
    figure.supxlabel("updates", fontsize=9)
    figure.supylabel("score", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def legend(figure: Any, axes: Any, place: str, columns: int) -> None:
    """One for all panels: not each panel has every agent."""
    shown: dict[str, Any] = {}
    for panel in axes.flat:
        for handle, label in zip(*panel.get_legend_handles_labels()):
            shown.setdefault(label, handle)
    figure.legend(shown.values(), shown, loc=place, ncols=columns, fontsize=8, frameon=False)


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def write(
    book: Any,
    entries: Sequence[dict[str, Any]],
    mixtures: dict[str, list[str]],
    folder: Path,
    stem: str,
) -> str:
    """Write the report and its plots, and put the summary into the book; returns the report."""
    datasets = book.content["datasets"]
    finished = [e for e in entries if e["run"]]
    if not finished:
        return "Nothing has been trained at this scale.\n"
    rows = [summary(e, datasets[e["dataset"]]) for e in finished if e["varied"] is None]
    differences = comparisons(entries, datasets, mixtures)
    varied = sensitivity(entries, datasets)
    missing = [
        f"{e['dataset']}: {NAMES[e['agent']]}"
        + (f", {next(iter(e['varied']))} varied" if e["varied"] else "")
        for e in entries
        if not e["run"]
    ]
    book.content |= {"rows": rows, "comparisons": differences, "sensitivity": varied,
                     "missing": missing, "date": common.now()}  # fmt: skip
    plotted = plot_mixtures(rows, datasets, mixtures, folder / f"{stem}.png")
    plot_curves(entries, datasets, folder / f"{stem}_curves.png")
    picture = f"![score against the expert's share]({stem}.png)\n\n" if plotted else ""
    text = (
        "# Evidence for A2PR\n\n"
        + picture
        + report(rows, differences, varied, missing, datasets)
        + f"\n![scores during training]({stem}_curves.png)\n\n## Scale\n\n"
        + scale([e["run"] for e in finished])
        + f"\n\n{book.source()}.\n"
    )
    (folder / f"{stem}.md").write_text(text)
    return text
