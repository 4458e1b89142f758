"""What reports are made of: one table, one plot, intervals, comparisons and verdicts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from saferl.evaluation.statistics import bootstrap_interval, mean

Interval = Sequence[float]
WORDS = ("above", "below", "cannot tell")


# Words and numbers -------------------------------------------------------------------------------


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table; the first column to the left, numbers to the right."""
    lines = [list(map(str, heads)), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]

    def text(line: Sequence[str]) -> str:
        cells = [
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths))
        ]
        return "| " + " | ".join(cells) + " |"

    rule = "|" + "|".join("-" * (w + 1) + ("-" if i == 0 else ":") for i, w in enumerate(widths))
    return "\n".join([text(lines[0]), rule + "|", *map(text, lines[1:])])


def bullets(lines: Iterable[str]) -> str:
    return "".join(f"- {line}\n" for line in lines)


def span(value: float, interval: Interval, digits: int = 1) -> str:
    """``1.0 [0.5, 1.5]``."""
    low, high = interval
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def shown(values: np.ndarray | None, digits: int = 0, least: float = -np.inf) -> str:
    """A mean with its interval; – for None."""
    if values is None:
        return "–"
    low, high = interval(values)
    return span(float(values.mean()), (max(low, least), high), digits)


def brief(run: dict[str, Any]) -> str:
    """A training's means of ``returns`` per member, and its seconds."""
    means = ", ".join(f"{np.mean(row):.0f}" for row in np.atleast_2d(run["returns"]))
    return f"{means} ({run['seconds']:.0f} s)"


def layers(config: dict[str, Any]) -> str:
    """``hidden 64-64, critic_hidden 64-64``."""
    return ", ".join(
        f"{k} {'-'.join(map(str, v))}"
        for k, v in config.items()
        if k.endswith("hidden") and isinstance(v, (list, tuple))
    )


# Intervals and verdicts --------------------------------------------------------------------------


def interval(values: np.ndarray, statistic: Callable = mean) -> tuple[float, float]:
    """95 %, over members (and episodes, if there is a second axis)."""
    values = np.asarray(values, np.float64)
    return bootstrap_interval(values if values.ndim == 2 else values[:, None], statistic)


def compare(ours: np.ndarray, peer: np.ndarray) -> tuple[float, float, float]:
    """Difference of means (``[members]`` or ``[members, episodes]``), with a 95 % interval.

    The interval is put together from both sides' bootstrap intervals by the method of variance
    estimates recovery (Zou and Donner 2008): its distance to each side is the root of the sum of
    squares of the distances that matter on that side.
    """
    mine, its = ours.mean(), peer.mean()
    (my_low, my_high), (its_low, its_high) = interval(ours), interval(peer)
    low = mine - its - np.hypot(mine - my_low, its_high - its)
    high = mine - its + np.hypot(my_high - mine, its - its_low)
    return float(mine - its), float(low), float(high)


def pooled(differences: Sequence[tuple[float, float, float]]) -> tuple[float, float, float]:
    """Mean of independent differences ``(estimate, low, high)``, with an interval as in `compare`.

    The distances to the ends add as roots of sums of squares.
    """
    d, low, high = np.array(differences, np.float64).T
    middle, n = d.mean(), len(d)
    down, up = np.sqrt(np.square(d - low).sum()) / n, np.sqrt(np.square(high - d).sum()) / n
    return float(middle), float(middle - down), float(middle + up)


def verdict(low: float, high: float, words: Sequence[str] = WORDS) -> str:
    """Of a difference, from its interval: the word for more, for less, and for neither."""
    return words[0] if low > 0 else words[1] if high < 0 else words[2]


def judged(ours: np.ndarray, peer: np.ndarray, digits: int = 0) -> str:
    """``5 [1, 9], above``."""
    value, low, high = compare(ours, peer)
    return f"{span(value, (low, high), digits)}, {verdict(low, high)}"


def limit_verdict(low: float, high: float, limit: float) -> str:
    """Whether a mean cost is within a limit, from its interval."""
    return "met" if high <= limit else "not met" if low > limit else "cannot tell"


def to_score(value: Any, reference: Sequence[float]) -> np.ndarray:
    """Returns as scores: 0 is the first and 100 the second reference."""
    low, high = reference
    return 100 * (np.asarray(value, np.float64) - low) / (high - low)


# The plot ----------------------------------------------------------------------------------------


@dataclasses.dataclass
class Series:
    """What has one label and one colour in a panel.

    Attributes:
        style: of matplotlib, "o-" or "--".
        x_ends, y_ends: (lows, highs), drawn as error bars. band: likewise, drawn as an area.
        thin: curves ``[S, N]`` of single seeds.
        hollow: markers that are not filled.
    """

    label: str | None
    x: Any
    y: Any
    colour: Any
    style: str = "o-"
    x_ends: Any = None
    y_ends: Any = None
    band: Any = None
    thin: Any = None
    hollow: bool = False

    def draw(self, axes: Any) -> None:
        x, y = np.asarray(self.x), np.asarray(self.y, np.float64)
        bars = {
            f"{axis}err": np.abs(np.asarray(ends).reshape(2, -1) - middle)
            for axis, ends, middle in (("x", self.x_ends, x), ("y", self.y_ends, y))
            if ends is not None
        }
        fill = {"mfc": "white"} if self.hollow else {}
        axes.errorbar(x, y, fmt=self.style, ms=4.5, lw=1.3, elinewidth=0.9, capsize=2,
                      color=self.colour, label=self.label, **bars, **fill)  # fmt: skip
        if self.band is not None:
            axes.fill_between(x, *self.band, color=self.colour, alpha=0.1, lw=0)
        for curve in () if self.thin is None else self.thin:
            axes.plot(x, curve, lw=0.7, alpha=0.4, color=self.colour)


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def colours(names: Sequence[str]) -> dict[str, Any]:
    """A colour for each name, the same in all panels."""
    palette = pyplot().get_cmap("tab20").colors
    order = [*palette[::2], *palette[1::2]]
    return {name: order[i % len(order)] for i, name in enumerate(names)}


def plot(
    panels: dict[str, Sequence[Series]],
    path: Path,
    *,
    x: str = "",
    y: str = "",
    title: str = "",
    columns: int = 3,
    size: tuple[float, float] = (4.4, 3.4),
    share: dict[str, Any] | None = None,
    each: Callable[[str, Any], None] | None = None,
) -> None:
    """A panel per title, one legend for all of them; nothing where there is no panel.

    Args:
        each: is given the title and the axes of a panel, for scales and reference lines.
        share: ``sharex`` and ``sharey`` of the panels.
    """
    if not panels:
        return
    plt = pyplot()
    columns = min(columns, len(panels))
    lines = -(-len(panels) // columns)
    figure, grid = plt.subplots(
        lines, columns, figsize=(size[0] * columns + 2.2, size[1] * lines + 0.4), squeeze=False,
        layout="constrained", **(share or {}),
    )  # fmt: skip
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    labels: dict[str, Any] = {}
    for axes, (name, series) in zip(grid.flat, panels.items()):
        for one in series:
            one.draw(axes)
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        if each:
            each(name, axes)
        for handle, label in zip(*axes.get_legend_handles_labels()):
            labels.setdefault(label, handle)
    figure.legend(labels.values(), labels, loc="outside right upper", fontsize=8, frameon=False)
    figure.supxlabel(x, fontsize=9)
    figure.supylabel(y, fontsize=9)
    figure.suptitle(title, fontsize=9, x=0.01, ha="left")
    figure.savefig(path, dpi=110)
    plt.close(figure)
