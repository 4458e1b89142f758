"""One HTML file for one or more runs: nothing in it is loaded from elsewhere, no scripts.

It is made from the files of the run folders only (`saferl.evaluation.results`), so it can be
written at any time, also while a run goes on.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from saferl.errors import SaferlError
from saferl.evaluation import plots
from saferl.evaluation.evaluate import NO_COST, Evaluation
from saferl.evaluation.results import RunResults
from saferl.evaluation.text import explanation, number, parts
from saferl.io import write_text

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1b1b; max-width: 76rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc; }
h3 { margin-top: 1.6rem; font-size: 1.05rem; }
.scroll { overflow-x: auto; margin: 0.8rem 0; }
table { border-collapse: collapse; font-size: 0.88rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.7rem; border-bottom: 1px solid #e5e5e5; text-align: left;
  vertical-align: top; white-space: nowrap; }
tr:first-child th { white-space: normal; vertical-align: bottom; }
td.long { white-space: normal; overflow-wrap: anywhere; }
.met { background: #d9f2e3; } .not-met { background: #fbdcdc; }
.cannot-tell { background: #fdf0cf; }
.note { color: #555; font-size: 0.88rem; } .missing { background: #f3f3f3; padding: 0.5rem 0.8rem; }
img { max-width: 100%; height: auto; } code { font-size: 0.85rem; overflow-wrap: anywhere; }
"""


def write_report(
    run_dirs: Sequence[str | Path] | str | Path,
    output: str | Path | None = None,
    limits: Sequence[float] | None = None,
) -> Path:
    """Write the report of one or more run folders to ``output`` and return its path.

    ``output``: an HTML file; ``report.html`` in the folder when None, for a single run. ``limits``:
    expected costs per episode to judge by, those of each run's configuration when None.

    Raises `SaferlError` for a folder that is not a run, or a file in it that cannot be read. What
    is merely absent (no evaluation yet) is said in the report.
    """
    folders = [run_dirs] if isinstance(run_dirs, (str, Path)) else list(run_dirs)
    if not folders:
        raise SaferlError("a report needs one run folder or more")
    if output is None and len(folders) > 1:
        raise SaferlError("name the file that the report of several runs goes to")
    runs = [RunResults.read(folder, limits) for folder in folders]
    for i, run in enumerate(runs):
        if [r.name for r in runs].count(run.name) > 1:
            run.name = f"{run.name} ({i + 1})"
    path = Path(output) if output is not None else Path(folders[0]) / "report.html"
    title = f"saferl: {runs[0].name}" if len(runs) == 1 else f"saferl: {len(runs)} runs compared"
    body = [f"<h1>{escape(title)}</h1>"]
    if len(runs) > 1:
        body += _comparison(runs)
    for run in runs:
        body += _section(run)
    body += _method(runs)
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )
    write_text(path, page)
    return path


def _comparison(runs: Sequence[RunResults]) -> list[str]:
    evaluated = [run for run in runs if run.evaluation is not None]
    parts = ["<h2>All runs</h2>"]
    if not evaluated:
        return [*parts, _missing("None of the runs has been evaluated.")]
    rows = []
    for run in evaluated:
        for row in run.table:
            if row["member"] is None:
                rows.append(row | {"group": " ".join(filter(None, [run.name, row["group"]]))})
    parts.append(_rows_table(rows, "run"))
    parts += [_note(f"{run.name}: {run.note}") for run in evaluated if run.note]
    series = {
        " ".join(filter(None, [run.name, name])): evaluation
        for run in evaluated
        for name, evaluation in run.split().items()
    }
    limits = list(dict.fromkeys(limit for run in evaluated for limit in run.limits))
    if any(run.evaluation and run.evaluation.costs is not None for run in evaluated):
        best = next((run.frontier for run in evaluated if run.frontier), [])
        same = len({str(run.config.env) for run in evaluated}) == 1
        parts += _frontier([row for row in rows if row["cost_mean"] is not None], limits,
                           best if same else [])  # fmt: skip
        figure = plots.return_against_cost(series, limits)
        parts += ["<h3>Return against cost</h3>", _image(figure, "Return against cost")]
    figure = plots.learning_curves(series, limits)
    return [*parts, "<h3>Learning curves</h3>", _image(figure, "Learning curves")]


def _section(run: RunResults) -> list[str]:
    agent, task = run.config.agent, run.config.dataset or run.config.env
    heading = " on ".join(str(part) for part in (agent, task) if part) or "run"
    parts = [f"<h2>{escape(run.name)}: {escape(heading)}</h2>", "<h3>Result</h3>"]
    if run.evaluation is None:
        parts.append(
            _missing(
                "This run has no evaluation.csv: it was not evaluated. Evaluate it with "
                f"`saferl evaluate {run.name}`, then write the report again."
            )
        )
    else:
        parts += _result(run, run.evaluation)
    parts.append("<h3>Training metrics</h3>")
    figure = plots.training_metrics(run.metrics) if run.metrics is not None else None
    parts.append(
        _missing("No metrics.csv with values: nothing has been logged yet.")
        if figure is None
        else _image(figure, "Training metrics by step")
    )
    parts += ["<h3>Dataset</h3>"]
    if run.card:
        parts.append(_pairs(run.card.to_dict() | {"fingerprint (SHA-256)": run.fingerprint}))
    else:
        parts.append(_missing("The run was trained without a dataset."))
    record = run.config.to_dict() | {"members": run.config.names}
    settings = record.pop("settings")
    parts += ["<h3>Configuration</h3>", _pairs(record)]
    parts.append("<details><summary>Hyper-parameters that all members share</summary>")
    parts.append(_pairs(settings) + "</details>")
    return parts


def _result(run: RunResults, evaluation: Evaluation) -> list[str]:
    last, parts = evaluation.at(), []
    env = run.config.env or (run.card and run.card.env_id) or "its environment"
    parts.append(
        f"<p>At training step {last.steps[0]}, in {escape(str(env))}: "
        f"{len(np.unique(last.members))} member(s), {len(last)} episodes in all.</p>"
    )
    if run.limits and evaluation.costs is None:
        parts.append(_missing(f"A cost limit is set, but {NO_COST}."))
    rows = run.table
    together = [row for row in rows if row["member"] is None]
    note = _note(run.note) if run.note else ""
    parts += [_rows_table(together), note]
    if len(rows) > 2 * len(together):
        parts += ["<details><summary>Each member</summary>"]
        parts += [_rows_table([row for row in rows if row["member"] is not None]), note]
        parts.append("</details>")
    if run.known and run.known.guardian:
        parts.append(_note(f"OOD rate by guardian: {run.known.guardian}."))
    if evaluation.costs is not None:
        parts += _frontier(together, run.limits, run.frontier)
        parts += _units(run, together)
    if len(np.unique(evaluation.steps)) > 1:
        figure = plots.learning_curves(run.split(), run.limits)
        parts += ["<h3>Learning curves</h3>", _image(figure, "Return and cost by training step")]
        parts.append(_note("Thin: members. Thick: their mean with its 95 % interval."))
    else:
        parts.append(_note("Evaluated at one training step only, so there is no learning curve."))
    if evaluation.costs is not None:
        figure = plots.return_against_cost(run.split(), run.limits)
        parts += ["<h3>Return against cost</h3>", _image(figure, "Return against cost")]
        parts.append(_note("Faint: episodes. Large: mean of a member. Dashed: limits."))
    return parts


def _frontier(
    rows: Sequence[dict[str, Any]], limits: Sequence[float], best: Sequence[Sequence[float]]
) -> list[str]:
    text = "Means of each group; the bars are 95 % intervals of the cost."
    if best:
        text += " Black: the best return of any policy at that cost, from the environment's table."
    figure = plots.frontier(rows, limits, best)
    return ["<h3>Return-cost frontier</h3>", _image(figure, "Return-cost frontier"), _note(text)]


def _units(run: RunResults, together: Sequence[dict[str, Any]]) -> list[str]:
    """Limit and cost per episode beside their equivalents per step."""
    horizon, lines = run.card.horizon if run.card else None, []
    for row in together:
        line = [number(row["limit"]), number(row["cost_mean"]), number(row["length"])]
        line.append(number(row["cost_per_step"]))
        for steps in (row["length"], horizon):
            known = row["limit"] is not None and steps
            line.append(number(row["limit"] / steps) if known else None)
        lines.append([row["group"] or "all members", *(cell or "–" for cell in line)])
    heads = ["group", "limit per episode", "cost per episode", "steps per episode"]
    heads += ["cost per step", "limit per step of these episodes"]
    heads.append(f"limit per step of the horizon{f' ({horizon})' if horizon else ''}")
    note = "Per step: total cost over total steps; the limit divided by the length of an episode."
    return ["<h3>Per episode and per step</h3>", _table(heads, lines), _note(note)]


def _method(runs: Sequence[RunResults]) -> list[str]:
    rows = [row for run in runs if run.evaluation is not None for row in run.table]
    if not rows:
        return []
    lines = [
        *explanation(rows),
        "Cost/limit: mean cost divided by the limit. Episodes within: share of episodes whose own "
        "cost does not exceed the limit. Members within: members whose own mean cost does not.",
        "All members are evaluated by their deterministic policy from the same initial states; "
        "the last training step counts, none is picked for its result.",
    ]
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return ["<h2>How each number is computed</h2>", f"<ul>{items}</ul>"]


def _rows_table(rows: Sequence[dict[str, Any]], group: str = "group") -> str:
    """What the episodes say of each limit; under it what else is known of the same policies."""
    return "\n".join(
        _table([group if head == "group" else head for head in heads], lines)
        for heads, lines in parts(rows)
    )


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    def cell(text: str) -> str:
        name = text.replace(" ", "-") if text in ("met", "not met", "cannot tell") else ""
        return f'<td class="{name}">{escape(text)}</td>' if name else f"<td>{escape(text)}</td>"

    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    body = "".join(f"<tr>{''.join(map(cell, line))}</tr>\n" for line in lines)
    return f'<div class="scroll"><table><tr>{head}</tr>\n{body}</table></div>'


def _pairs(values: Mapping[str, Any]) -> str:
    """Two columns; nested values as JSON, empty ones left out."""

    def shown(value: Any) -> str:
        return value if isinstance(value, str) else json.dumps(value, default=str)

    rows = "".join(
        f'<tr><th>{escape(str(key))}</th><td class="long">{escape(shown(value))}</td></tr>\n'
        for key, value in values.items()
        if value not in (None, "", [], {})
    )
    return f"<table>{rows}</table>"


def _image(figure: Any, text: str) -> str:
    data = base64.b64encode(plots.png(figure)).decode()
    return f'<p><img alt="{escape(text)}" src="data:image/png;base64,{data}"></p>'


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def _missing(text: str) -> str:
    return f'<p class="missing">{escape(text)}</p>'
