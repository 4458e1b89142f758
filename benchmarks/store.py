"""The results store: a JSON file that a study fills, and where its numbers come from.

A training is identified by its key, a dictionary of what was asked for (dataset, agent, settings,
…). Its record is the key and what came out; it is written when the training ends, with the
fingerprint of the data, and is not done again.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.workers import ROOT, versions

RESULTS = ROOT / "benchmarks" / "results"
PATHS = (
    "--peer-python",
    "--a2pr",
    "--corl",
    "--out",
    "--data",
    "--runs",
)  # they name this machine's folders
WITHDRAWN = "withdrawn: measured with an engine that mis-trained OGSRL; to be measured again"
Key = dict[str, Any]
Record = dict[str, Any]


class Store:
    """Facts of the datasets, and a record per finished training."""

    def __init__(self, path: Path, fresh: bool = False):
        self.path = path
        self.content: dict[str, Any] = {"datasets": {}, "runs": []}
        if path.exists() and not fresh:
            self.content = json.loads(path.read_text())

    @property
    def datasets(self) -> dict[str, Any]:
        return self.content["datasets"]

    def matching(self, key: Key) -> list[Record]:
        """Records with these values, in the order in which they were added."""
        return [run for run in self.content["runs"] if all(run.get(k) == v for k, v in key.items())]

    def done(self, key: Key) -> list[str]:
        """Fingerprints of the data on which a training is done."""
        return [run["fingerprint"] for run in self.matching(key)]

    def add(self, dataset: str, facts: dict[str, Any], records: Sequence[Record]) -> None:
        self.datasets[dataset] = facts
        self.content["runs"] += records
        self.save()

    def save(self) -> None:
        write_json(self.path, self.content)

    def entries(self, keys: Sequence[Key], report: bool = False) -> list[dict[str, Any]]:
        """Each key with its last record (``run``) on the data as they are now, or None.

        For a ``report`` a record made with other settings than today's stands in where there is
        none with today's: results stay readable when a default changes. It has its own settings.
        """
        found = []
        for key in keys:
            now = self.datasets.get(key["dataset"], {}).get("fingerprint")
            runs = self.matching(key)
            if report and not runs:
                runs = self.matching({k: v for k, v in key.items() if k != "settings"})
            runs = [run for run in runs if run["fingerprint"] == now]
            found.append(key | {"run": runs[-1] if runs else None})
        return found

    def source(self) -> str:
        """The command that trained, with its last call, the date of the last run and the CPU."""
        content = self.content
        command, dates = content["command"], [r["date"] for r in content["runs"] if "date" in r]
        first = " ".join(command.split()[:4])
        last = "" if command == first else f", in several calls (the last: `{command}`)"
        date = max(dates, default=content["date"])
        return f"`{first}`{last}, {date}, {content['machine']['cpu']}"


def now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def machine() -> dict[str, Any]:
    """Processor, cores and system."""
    model = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {"cpu": model, "cores": os.cpu_count(), "system": f"{platform.system()} {os.uname()[4]}"}


def command_of(study: str, arguments: Sequence[str]) -> str:
    """A command line without the options that name this machine's paths."""
    kept, skip = [], False
    for argument in arguments:
        path = argument in PATHS
        if not skip and not path:
            kept.append(argument)
        skip = path
    return shlex.join(["python", "-m", "benchmarks", study, *kept])


def header(command: str, *packages: str) -> dict[str, Any]:
    """What results begin with: command, date, machine, and versions of what made them."""
    return {
        "command": command,
        "date": now(),
        "machine": machine(),
        "versions": versions(["saferl", "torch", "numpy", *packages]),
    }


def write_json(path: Path, value: Any) -> None:
    """Write beside ``path`` and rename, so that an interruption leaves the earlier file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)
