"""What training measures: metrics.csv (a row per member and reading) and TensorBoard events."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from saferl.errors import SaferlError
from saferl.io import csv_lines, read_csv, write_text
from saferl.runs.folder import ADVICE, RunFolder


class MetricsLog:
    """Appends metrics to a run folder. The file's header grows when a metric appears first.

    Args:
        members: how many there are.
        resume_step: rows beyond this step, which a crash left behind, are removed.
    """

    def __init__(self, run: RunFolder, members: int, resume_step: int | None = None):
        from torch.utils.tensorboard import SummaryWriter

        self.path = run.path / "metrics.csv"
        self.members = members
        self.columns = ["step", "member"]
        if resume_step is not None:
            drop_rows_after(self.path, resume_step)
            if self.path.exists():
                self.columns = read_csv(self.path)[0] or self.columns
        purge = None if resume_step is None else resume_step + 1
        self.events = SummaryWriter(str(run.path), purge_step=purge)

    def write(self, step: int, metrics: Mapping[str, np.ndarray]) -> None:
        """Append metrics ``name → [M]`` at a step."""
        names = [name for name in metrics if name not in self.columns]
        if names:
            self.columns += names
            rows = read_csv(self.path)[1] if self.path.exists() else []
            write_text(self.path, csv_lines(self.columns, rows, header=True), ADVICE)
        rows = [
            {"step": str(step), "member": str(member)}
            | {name: f"{value[member]:.8g}" for name, value in metrics.items()}
            for member in range(self.members)
        ]
        with self.path.open("a", newline="") as file:
            file.write(csv_lines(self.columns, rows))
        for name, value in metrics.items():
            for member in range(self.members):
                self.events.add_scalar(f"{name}/member{member}", value[member], step)

    def close(self) -> None:
        self.events.close()


def drop_rows_after(path: Path, step: int) -> None:
    """Remove rows of a CSV file whose first column exceeds ``step`` (a crash left them behind)."""
    if not path.exists():
        return
    lines = path.read_text().splitlines(keepends=True)
    # A row without its line end was cut off by the crash.
    kept = lines[:1] + [
        line for line in lines[1:] if line.endswith("\n") and int(line.split(",", 1)[0]) <= step
    ]
    if kept != lines:
        write_text(path, "".join(kept))


def read_metrics(path: str | Path) -> dict[str, np.ndarray]:
    """Columns of metrics.csv as float arrays; a cell without a number is NaN.

    Rows cut off by a crash (fewer cells than the heading) count as far as they go.
    """
    names, rows = read_csv(Path(path))
    if not {"step", "member"} <= set(names):
        raise SaferlError(f"{path} is not a metrics file: it has no columns step and member")
    return {name: np.array([_float(row.get(name)) for row in rows]) for name in names}


def _float(cell: str | None) -> float:
    try:
        return float(cell or "nan")
    except ValueError:
        return float("nan")
