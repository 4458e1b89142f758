"""A run is a folder: configuration, dataset card, checkpoints, metrics.

Every file is written under a temporary name and renamed, so a crash or a full disk leaves the
previous one whole; a checkpoint is a single safetensors file whose header carries its JSON.
"""

from __future__ import annotations

import csv
import errno
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from torch import Tensor

from saferl.errors import SaferlError
from saferl.io import atomic_write, write_text

ADVICE = "earlier files are intact: free space, then continue with `saferl train --resume RUN`"
OBJECT = "a Python object"  # stands in config.yaml for a Dataset or environment that has no name


class RunFolder:
    """Reads and writes the files of one run.

    Raises:
        SaferlError: the folder is not a run, or a file in it cannot be read.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"

    def check_vacant(self) -> None:
        """Refuse a folder that holds a run already."""
        if (self.path / "config.yaml").exists():
            raise SaferlError(
                f"{self.path} holds a run already: continue it with `saferl train --resume "
                f"{self.path}` or choose another --out"
            )

    @classmethod
    def create(cls, path: str | Path, config: dict[str, Any], card: dict[str, Any]) -> RunFolder:
        """A folder for a run that has not started; refuses one that holds a run already."""
        run = cls(path)
        run.check_vacant()
        try:
            run.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SaferlError(f"cannot create {run.path}: {error.strerror}") from error
        write_text(run.path / "dataset.json", json.dumps(card, indent=2) + "\n")
        run.write_config(config)
        return run

    def write_config(self, config: dict[str, Any]) -> None:
        write_text(self.path / "config.yaml", yaml.safe_dump(config, sort_keys=False))

    def config(self) -> dict[str, Any]:
        """The fully resolved configuration."""
        file = self.path / "config.yaml"
        if not file.is_file():
            raise SaferlError(f"{self.path} is not a run folder: it has no config.yaml")
        return yaml.safe_load(file.read_text())

    def card(self) -> dict[str, Any]:
        """The dataset's card and fingerprint (empty for online runs)."""
        file = self.path / "dataset.json"
        return json.loads(file.read_text()) if file.is_file() else {}

    def steps(self) -> list[int]:
        """Steps of the checkpoints that exist, ascending."""
        return sorted(
            int(f.stem.split("-")[1]) for f in self.checkpoints.glob("step-*.safetensors")
        )

    def _checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:09d}.safetensors"

    def save(
        self, step: int, state: dict[str, Tensor], header: dict[str, Any], keep: int = 1
    ) -> None:
        """Write a checkpoint, then drop all but the last ``keep``."""
        from safetensors.torch import save_file

        tensors = {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
        metadata = {"saferl": json.dumps(header | {"step": step})}

        def write(temporary: Path) -> None:
            try:
                save_file(tensors, temporary, metadata=metadata)
            except Exception as error:  # safetensors wraps the system's error in its own type
                text = str(error)
                full = "No space left" in text or "os error 28" in text
                raise OSError(errno.ENOSPC if full else errno.EIO, text) from error

        atomic_write(self._checkpoint(step), write, ADVICE)
        for old in self.steps()[:-keep]:
            self._checkpoint(old).unlink()

    def load(self, step: int | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and header of the checkpoint at ``step`` (the last one that is readable)."""
        from safetensors import safe_open

        steps = self.steps()
        if not steps:
            self.config()  # says so where this is no run at all
            raise SaferlError(
                f"{self.path} has no checkpoint: its training stopped before the first one was "
                "written; start it again"
            )
        if step is not None and step not in steps:
            raise SaferlError(f"{self.path} has no checkpoint at step {step}; it has {steps}")
        broken: Exception | None = None
        for candidate in [step] if step is not None else reversed(steps):
            try:
                with safe_open(self._checkpoint(candidate), "pt") as file:
                    header = json.loads(file.metadata()["saferl"])
                    return {key: file.get_tensor(key) for key in file.keys()}, header
            except Exception as error:  # truncated or damaged: fall back to the one before
                broken = error
        raise SaferlError(f"no checkpoint in {self.path} can be read: {broken}")


class MetricsLog:
    """metrics.csv (one row per member and read) and TensorBoard events.

    The file's header grows when a metric appears for the first time.
    """

    def __init__(self, run: RunFolder, members: tuple[str, ...], resume_step: int | None = None):
        from torch.utils.tensorboard import SummaryWriter

        self.path = run.path / "metrics.csv"
        self.members = members
        self.columns = ["step", "member"]
        if resume_step is not None:
            drop_rows_after(self.path, resume_step)
            if self.path.exists():
                with self.path.open(newline="") as file:
                    self.columns = next(csv.reader(file), self.columns)
        purge = None if resume_step is None else resume_step + 1
        self.events = SummaryWriter(str(run.path), purge_step=purge)

    def write(self, step: int, metrics: dict[str, np.ndarray]) -> None:
        """Append metrics ``name → [M]`` at a step."""
        names = [name for name in metrics if name not in self.columns]
        if names:
            self.columns += names
            rows = []
            if self.path.exists():
                with self.path.open(newline="") as file:
                    rows = list(csv.DictReader(file))
            text = io.StringIO()
            writer = csv.DictWriter(text, self.columns, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            write_text(self.path, text.getvalue(), ADVICE)
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, self.columns, restval="", lineterminator="\n")
            for member in range(len(self.members)):
                values = {name: f"{value[member]:.8g}" for name, value in metrics.items()}
                writer.writerow({"step": step, "member": member} | values)
        for name, value in metrics.items():
            for member in range(len(self.members)):
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
