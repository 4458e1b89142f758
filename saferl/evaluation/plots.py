"""Figures: learning curves, return against cost, the frontier, training metrics.

Each function returns a matplotlib ``Figure`` (no pyplot, no global state, no display needed);
`png` renders it. ``series`` is an `Evaluation`, or a dict of them by name: one colour each.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from saferl.evaluation.evaluate import Evaluation
from saferl.evaluation.statistics import bootstrap_interval
from saferl.evaluation.text import number

# Okabe and Ito's palette: told apart by colour-blind readers and in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LIMIT_COLOUR = "#B00020"
MOST_METRICS = 24

Series = Evaluation | Mapping[str, Evaluation]


def _named(series: Series) -> list[tuple[str, Evaluation, str]]:
    items = {"": series} if isinstance(series, Evaluation) else series
    return [
        (name, evaluation, COLOURS[i % len(COLOURS)])
        for i, (name, evaluation) in enumerate(items.items())
        if len(evaluation)
    ]


def _figure(width: float, height: float, rows: int, columns: int) -> tuple[Any, np.ndarray]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(True, color="#E5E5E5", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=8)
    return figure, axes


def _steps(axis: Any) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axis.set_xlabel("training step", fontsize=9)
    axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))


def learning_curves(series: Series, limits: Sequence[float] = ()) -> Any:
    """Return, and cost where there is one, against the training step.

    Thin lines: the mean of each member; thick line: their mean, with its 95 % bootstrap interval
    over members and episodes as a band; dashed: the cost limits.
    """
    named = _named(series)
    costly = any(evaluation.costs is not None for _, evaluation, _ in named)
    quantities = [("returns", "return per episode")]
    if costly:
        quantities.append(("costs", "cost per episode"))
    figure, axes = _figure(5.2 * len(quantities), 3.6, 1, len(quantities))
    for axis, (quantity, label) in zip(axes[0], quantities):
        for name, evaluation, colour in named:
            if getattr(evaluation, quantity) is not None:
                _curve(axis, evaluation, quantity, name, colour)
        axis.set_ylabel(label, fontsize=9)
        _steps(axis)
        if quantity == "costs":
            for limit in limits:
                axis.axhline(limit, color=LIMIT_COLOUR, linestyle="--", linewidth=1.2)
                axis.annotate(
                    f"limit {number(limit)}",
                    (1, limit),
                    xycoords=("axes fraction", "data"),
                    xytext=(3, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=8,
                    color=LIMIT_COLOUR,
                )
        if axis.lines:
            _fit(axis)
    if len(named) > 1:
        axes[0][0].legend(fontsize=8, frameon=False)
    return figure


def _fit(axis: Any) -> None:
    """Vertical range by the lines alone: the band of two members may be very much wider."""
    values = np.concatenate([line.get_ydata() for line in axis.lines])
    margin = 0.3 * (values.max() - values.min()) or 1.0
    low, high = axis.get_ylim()
    axis.set_ylim(max(low, values.min() - margin), min(high, values.max() + margin))


def _curve(axis: Any, evaluation: Evaluation, quantity: str, name: str, colour: str) -> None:
    steps = np.unique(evaluation.steps)
    values = [evaluation.at(step).matrix(quantity) for step in steps]
    bands = np.array([bootstrap_interval(v, resamples=500) for v in values])
    mark = "o" if len(steps) < 3 else None
    if len(values[0]) > 1 and len({len(v) for v in values}) == 1:
        axis.plot(
            steps, [v.mean(1) for v in values], color=colour, linewidth=0.7, alpha=0.45, marker=mark
        )
    axis.fill_between(steps, bands[:, 0], bands[:, 1], color=colour, alpha=0.18, linewidth=0)
    axis.plot(steps, [v.mean() for v in values], color=colour, linewidth=2, marker=mark, label=name)


def return_against_cost(series: Series, limits: Sequence[float] = ()) -> Any:
    """Return against cost at the last step: faint dots are episodes, large ones means of members.

    Dashed vertical lines are the limits: left of one is within it. None has a place for an
    evaluation without costs: those are left out.
    """
    named = [item for item in _named(series) if item[1].costs is not None]
    figure, axes = _figure(6.2, 4.4, 1, 1)
    axis = axes[0][0]
    for name, evaluation, colour in named:
        last = evaluation.at()
        axis.scatter(last.costs, last.returns, s=9, color=colour, alpha=0.25, linewidths=0)
        axis.scatter(
            last.matrix("costs").mean(1),
            last.matrix("returns").mean(1),
            s=64,
            color=colour,
            edgecolors="white",
            linewidths=1,
            label=name or "mean of a member",
            zorder=3,
        )
    _limit_lines(axis, limits)
    axis.set_xlabel("cost per episode", fontsize=9)
    axis.set_ylabel("return per episode", fontsize=9)
    if named:
        # Outside, because a marker of the legend inside would look like a point.
        figure.legend(loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    return figure


def frontier(
    rows: Sequence[Mapping[str, Any]],
    limits: Sequence[float] = (),
    best: Sequence[Sequence[float]] = (),
) -> Any:
    """Return and cost of each group of members, and the best possible return at each cost.

    ``rows``: those of `Evaluation.table` for whole groups. Mean cost and mean return with the 95 %
    interval of the cost; a line joins groups that differ by their cost limit alone; a diamond
    marks exact values. ``best``: ``[cost, return]`` of the exact frontier, in order of cost.
    """
    figure, axes = _figure(6.8, 4.6, 1, 1)
    axis = axes[0][0]
    if best:
        axis.plot(*np.transpose(best), color="black", linewidth=1.4, label="best possible (exact)")
    points = {row["group"]: row for row in rows}  # the same for each limit it is judged by
    families: dict[str, list[Mapping[str, Any]]] = {}
    for row in points.values():
        families.setdefault(row.get("family") or "policies", []).append(row)
    exact = False
    for i, (name, family) in enumerate(families.items()):
        colour = COLOURS[i % len(COLOURS)]
        family.sort(key=lambda row: row["cost_mean"])
        cost, value, low, high = (
            np.array([row[key] for row in family], float)
            for key in ("cost_mean", "return_mean", "cost_low", "cost_high")
        )
        error = np.nan_to_num([cost - low, high - cost]).clip(0)
        axis.errorbar(
            cost, value, xerr=error, fmt="o-", color=colour, markersize=7, linewidth=1,
            capsize=3, markeredgecolor="white", label=name, zorder=3,
        )  # fmt: skip
        known = [row for row in family if row.get("exact_cost") is not None]
        if known:
            axis.plot(
                [row["exact_cost"] for row in known],
                [row["exact_return"] for row in known],
                "D", markersize=7, markerfacecolor="none", markeredgecolor=colour,
                label=None if exact else "exact value of a policy", zorder=4,
            )  # fmt: skip
            exact = True
    _limit_lines(axis, limits)
    axis.set_xlabel("cost per episode", fontsize=9)
    axis.set_ylabel("return per episode", fontsize=9)
    figure.legend(loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    return figure


def _limit_lines(axis: Any, limits: Sequence[float]) -> None:
    for limit in limits:
        axis.axvline(limit, color=LIMIT_COLOUR, linestyle="--", linewidth=1.2)
        axis.annotate(
            f"limit {number(limit)}",
            (limit, 1),
            xycoords=("data", "axes fraction"),
            xytext=(3, -2),
            textcoords="offset points",
            rotation=90,
            va="top",
            fontsize=8,
            color=LIMIT_COLOUR,
        )


def training_metrics(metrics: Mapping[str, np.ndarray]) -> Any | None:
    """Small multiples of the columns of metrics.csv against the step, a line per member.

    ``metrics``: columns ``step``, ``member`` and any number of names, NaN where a row has no value.
    The first 24 names that have values are drawn; None when there are none.
    """
    steps, members = metrics["step"], metrics["member"]
    names = [
        name
        for name, values in metrics.items()
        if name not in ("step", "member") and np.isfinite(values).any()
    ][:MOST_METRICS]
    if not names:
        return None
    across = min(3, len(names))
    down = -(-len(names) // across)
    figure, axes = _figure(3.5 * across, 2.1 * down + 0.2, down, across)
    for axis, name in zip(axes.flat, names):
        for i, member in enumerate(np.unique(members)):
            rows = (members == member) & np.isfinite(metrics[name])
            order = np.argsort(steps[rows], kind="stable")
            axis.plot(
                steps[rows][order],
                metrics[name][rows][order],
                color=COLOURS[i % len(COLOURS)],
                linewidth=1,
                marker="o" if rows.sum() < 3 else None,
                label=f"member {int(member)}",
            )
        axis.set_title(name, fontsize=9)
        _steps(axis)
        axis.set_xlabel("")
    for axis in list(axes.flat)[len(names) :]:
        axis.set_visible(False)
    if 1 < len(np.unique(members)) <= len(COLOURS):
        figure.legend(
            *axes.flat[0].get_legend_handles_labels(),
            loc="outside upper center",
            ncols=len(COLOURS),
            fontsize=8,
            frameon=False,
        )
    figure.supxlabel("training step", fontsize=9)
    return figure


def png(figure: Any, dpi: int = 110) -> bytes:
    """The figure as a PNG image."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()
