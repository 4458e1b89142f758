"""A run is a folder: configuration, dataset card, checkpoints, metrics.

Every file is written under a temporary name and renamed, so a crash or a full disk leaves the
previous one whole; a checkpoint is a single safetensors file whose header carries its JSON.
"""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from saferl.errors import SaferlError, one_line
from saferl.io import atomic_write, write_text
from saferl.registry import agent_class
from saferl.runs.config import RunConfig
from saferl.runs.upgrade import upgrade, upgrade_state

ADVICE = "earlier files are intact: free space, then continue with `saferl train --resume RUN`"


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
    def create(cls, path: str | Path, config: RunConfig, card: dict[str, Any]) -> RunFolder:
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

    def write_config(self, config: RunConfig) -> None:
        text = yaml.safe_dump(config.to_dict(), sort_keys=False)
        write_text(self.path / "config.yaml", text)

    def config(self) -> RunConfig:
        """The record of the run, as this version or an earlier one wrote it."""
        file = self.path / "config.yaml"
        if not file.is_file():
            raise SaferlError(f"{self.path} is not a run folder: it has no config.yaml")
        try:
            values = yaml.safe_load(file.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            line = " ".join(str(error).split())
            raise SaferlError(f"{file} is not valid YAML: {line}") from error
        if not isinstance(values, dict):
            raise SaferlError(f"{file} holds no configuration")
        try:
            return RunConfig.from_dict(upgrade(values))
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise SaferlError(
                f"{file} is not the record of a run ({one_line(error)}): restore the file"
            ) from error

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
                    state = {key: file.get_tensor(key) for key in file.keys()}
            except Exception as error:  # truncated or damaged: fall back to the one before
                broken = error
                continue
            cls = agent_class(header["agent"])
            settings = cls.rename_settings(header["config"], warn=False)
            for key in self.config().who[0].values:  # one member's, in the format before
                if not isinstance(settings[key], list):
                    settings[key] = [settings[key]]
            header["config"] = settings
            return upgrade_state(cls, state), header
        raise SaferlError(f"no checkpoint in {self.path} can be read: {broken}")


def check_record(folder: RunFolder, config: RunConfig, header: dict[str, Any]) -> None:
    """Raises `SaferlError` where config.yaml is not the one that a checkpoint was written with."""
    for key, recorded, what in (
        ("config", config.agent_settings, "settings"),
        ("agent", config.agent, "agent"),
        ("seeds", config.seeds, "seeds"),
    ):
        if header[key] != recorded:
            raise SaferlError(
                f"the checkpoints of {folder.path} were written with another {what} than its "
                "config.yaml has now: restore the file or start another run"
            )
