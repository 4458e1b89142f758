"""What is in a dataset, as text and as a picture: behind ``saferl inspect DATASET --plot FILE``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from saferl.data import validate
from saferl.data.dataset import QUANTILES, Dataset
from saferl.data.frames import Frames
from saferl.errors import SaferlError, unknown

MANY_COLUMNS = 12  # more state or action columns than this are summed up, not listed


def coverage(dataset: Dataset) -> dict[str, Any]:
    """Which states and actions the data hold, as plain values.

    ``observation_min/max/mean`` and ``action_min/max/mean`` per column; ``action_at_low/high``, the
    share of rows within 0.1 % of each bound; ``at_bounds``, the share of rows with any component
    there; ``action_counts`` for discrete actions; ``duplicates``, rows that repeat an earlier
    row's observation, action and reward exactly.
    """
    observations = dataset.observations
    if isinstance(observations, Frames):  # one column for all pixels
        flat = observations.frames.reshape(-1, 1)
    else:
        flat = observations.reshape(len(dataset), -1)
    values: dict[str, Any] = {
        "observation_min": flat.min(0).tolist(),
        "observation_max": flat.max(0).tolist(),
        "observation_mean": flat.mean(0, dtype=np.float64).tolist(),
        "duplicates": validate.duplicate_rows(
            dataset.observations, dataset.actions, dataset.rewards
        ),
    }
    if dataset.discrete:
        counts = np.bincount(dataset.actions, minlength=dataset.action_dim)
        return values | {"action_counts": counts.tolist()}
    actions = dataset.actions
    low, high = (np.asarray(b, np.float32) for b in
                 (dataset.card.action_low, dataset.card.action_high))  # fmt: skip
    slack = 1e-3 * (high - low)
    at_low, at_high = actions <= low + slack, actions >= high - slack
    return values | {
        "action_min": actions.min(0).tolist(),
        "action_max": actions.max(0).tolist(),
        "action_mean": actions.mean(0, dtype=np.float64).tolist(),
        "action_at_low": at_low.mean(0).tolist(),
        "action_at_high": at_high.mean(0).tolist(),
        "at_bounds": float((at_low | at_high).any(1).mean()),
    }


def describe(dataset: Dataset) -> str:
    """The card, distributions of return and cost, coverage, problems and notes, as text."""
    card, lines = dataset.card, []

    def row(name: str, text: str) -> None:
        lines.append(f"{name:<14}{text}")

    row("dataset", card.id)
    row("environment", card.env_id or "none set")
    if card.horizon:
        row("horizon", f"{card.horizon} steps")
    if card.reference_returns:
        low, high = card.reference_returns
        source = f" ({card.reference_source})" if card.reference_source else ""
        row("reference", f"score 0 at return {low:g}, 100 at {high:g}{source}")
    row("licence", card.licence)
    if card.origin:
        row("origin", card.origin)
    shape = " x ".join(map(str, dataset.observations.shape[1:]))
    row("observations", f"{shape} {dataset.observations.dtype}")
    row("actions", _action_line(dataset))
    ends = f"{dataset.terminals.sum():,} terminal, {dataset.timeouts.sum():,} by timeout"
    row("episodes", f"{len(dataset.episodes):,}: {ends}")
    row("rows", f"{len(dataset):,} in {dataset.nbytes / 1e6:,.1f} MB")
    row("fingerprint", dataset.fingerprint[:16])

    tables = {"return": dataset.episode_returns()}
    if card.reference_returns:
        tables["score"] = dataset.normalised_score(tables["return"])
    if dataset.costs is not None:
        tables["cost"] = np.asarray(dataset.episode_costs())
    tables["length"] = dataset.episode_lengths()
    heads = ("mean", "std", "min", *(f"{100 * q:.0f} %" for q in QUANTILES), "max")
    lines += ["", f"{'per episode':<14}" + "".join(f"{head:>10}" for head in heads)]
    for name, column in tables.items():
        if len(column):
            values = (column.mean(), column.std(), column.min(), *np.quantile(column, QUANTILES),
                      column.max())  # fmt: skip
            row(name, "".join(f"{_short(v):>10}" for v in values))
    if dataset.costs is None:
        row("cost", f"{'none':>10}  (no costs in this dataset; attach them with with_costs)")

    lines += ["", "coverage"]
    cover = coverage(dataset)
    lines += _ranges("state", cover["observation_min"], cover["observation_max"],
                     cover["observation_mean"])  # fmt: skip
    if dataset.discrete:
        shares = np.array(cover["action_counts"]) / len(dataset)
        shown = ", ".join(f"{a}: {100 * s:.1f} %" for a, s in enumerate(shares[:MANY_COLUMNS]))
        lines.append(f"  actions {shown}{', …' if len(shares) > MANY_COLUMNS else ''}")
        lines.append(f"  {int((shares == 0).sum())} of {len(shares)} actions never taken")
    else:
        lines += _ranges("action", cover["action_min"], cover["action_max"], cover["action_mean"],
                         cover["action_at_low"], cover["action_at_high"])  # fmt: skip
        lines.append(f"  {100 * cover['at_bounds']:.1f} % of rows have an action at a bound")
    repeats = cover["duplicates"]
    lines.append(
        f"  {repeats:,} rows ({100 * repeats / len(dataset):.2g} %) repeat another exactly"
    )

    lines += ["", f"problems      {len(dataset.problems) or 'none found'}"]
    lines += [f"  - {problem}" for problem in dataset.problems]
    if card.notes:
        lines += ["notes", *(f"  - {note}" for note in card.notes)]
    return "\n".join(lines)


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def _action_line(dataset: Dataset) -> str:
    if dataset.discrete:
        return f"discrete, {dataset.action_dim} actions"
    low, high = dataset.card.action_low or (), dataset.card.action_high or ()
    if len(set(low)) == len(set(high)) == 1:
        return f"{dataset.action_dim} continuous in [{low[0]:g}, {high[0]:g}]"
    return f"{dataset.action_dim} continuous, bounds differ per component"


def _ranges(name: str, low, high, mean, at_low=None, at_high=None) -> list[str]:
    if len(low) > MANY_COLUMNS:
        line = f"  {name}: {len(low)} columns within [{_short(min(low))}, {_short(max(high))}]"
        if at_low is not None:
            line += f"; at most {100 * max(*at_low, *at_high):.1f} % of a column at one bound"
        return [line]
    head = f"  {name:<8}{'min':>12}{'mean':>12}{'max':>12}"
    lines = [head if at_low is None else head + f"{'at low':>12}{'at high':>12}"]
    for i in range(len(low)):
        line = f"  {i:<8}{_short(low[i]):>12}{_short(mean[i]):>12}{_short(high[i]):>12}"
        if at_low is not None:
            line += f"{100 * at_low[i]:>10.1f} %{100 * at_high[i]:>10.1f} %"
        lines.append(line)
    return lines


def _bins(values: np.ndarray) -> np.ndarray | int:
    """Whole-number bins for counts (0/1 costs, lengths), so that no bin is empty by arithmetic."""
    count = min(50, max(5, len(values) // 5))
    if (values == np.round(values)).all():
        low, high = values.min(), values.max()
        step = max(1, int(np.ceil((high - low + 1) / count)))
        return np.arange(low, high + step + 1, step) - 0.5
    return count


def plot(dataset: Dataset, path: str | Path) -> Path:
    """Write a picture (.png, .pdf, .svg): return, cost, return against cost, actions.

    Without costs the length of episodes stands in for the cost. Raises `SaferlError` for a file
    type that cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = Path(path)
    returns, costs = dataset.episode_returns(), dataset.episode_costs()
    second, second_name = (costs, "episode cost")
    if costs is None:
        second, second_name = (dataset.episode_lengths(), "episode length (no costs in the data)")
    figure = Figure(figsize=(10, 7), layout="constrained")
    known = FigureCanvasAgg(figure).get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        raise unknown("plot file type", path.suffix or path.name, known)
    (a, b), (c, d) = figure.subplots(2, 2)
    blue, red, grey = "#3b6ea5", "#b5473c", "#666666"

    def histogram(axis, values, colour, label):
        axis.hist(values, bins=_bins(values), color=colour)
        axis.axvline(float(np.mean(values)), color="black", linewidth=1, linestyle="--")
        axis.set(xlabel=f"{label}; dashed: mean", ylabel="episodes")

    if len(returns):
        histogram(a, returns, blue, "episode return")
        histogram(b, second, red, second_name)
        size, alpha = (14, 0.6) if len(returns) < 1000 else (5, 0.25)
        c.scatter(second, returns, s=size, alpha=alpha, color=grey, edgecolors="none")
    c.set(xlabel=second_name, ylabel="episode return")
    if dataset.card.reference_returns is not None and len(returns):
        random, expert = dataset.card.reference_returns
        scores = a.secondary_xaxis(
            "top",
            functions=(
                dataset.normalised_score,
                lambda score: random + score * (expert - random) / 100,
            ),
        )
        scores.set_xlabel("normalised score")
    if dataset.discrete:
        counts = np.bincount(dataset.actions, minlength=dataset.action_dim)
        d.bar(np.arange(len(counts)), counts / len(dataset), color=blue)
        d.set(xlabel="action", ylabel="share of rows")
    else:
        low, high = (np.asarray(v) for v in (dataset.card.action_low, dataset.card.action_high))
        scaled = 2 * (dataset.actions - low) / (high - low) - 1
        edges = np.linspace(-1, 1, 51)
        for i in range(scaled.shape[1]):
            counts, _ = np.histogram(scaled[:, i], edges)
            few = scaled.shape[1] <= 6
            d.stairs(counts / len(dataset), edges, alpha=0.9 if few else 0.4,
                     label=f"component {i}" if few else None)  # fmt: skip
        d.set(xlabel="action, bounds scaled to −1 … 1", ylabel="share of rows per bin")
        d.set_xticks([-1, -0.5, 0, 0.5, 1])
        if scaled.shape[1] <= 6:
            d.legend(fontsize=8, frameon=False)
    for axis in (a, b, c, d):
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{dataset.card.id}: {len(dataset):,} rows, {len(returns):,} episodes")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise SaferlError(f"cannot write the plot {path}: {error}") from None
    return path
