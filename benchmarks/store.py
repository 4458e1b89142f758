"""A book of finished trainings that a benchmark continues: evidence, limits, hybrid, pixels.

A training is a dictionary of what identifies it (its key: dataset, agent, settings, …). It is added
to the book's JSON when it ends, with the fingerprint of the data, and is not done again.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import csv
import json
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common
import numpy as np

Result = tuple[dict[str, Any], dict[str, Any] | None]
NETWORKS = ("hidden", "critic_hidden", "value_hidden", "vae_hidden")


class Book:
    """A JSON file: facts of the datasets, and an entry per finished training."""

    def __init__(self, path: Path, fresh: bool = False):
        self.path = path
        self.content: dict[str, Any] = {"datasets": {}, "runs": []}
        if path.exists() and not fresh:
            self.content = json.loads(path.read_text())

    def matching(self, key: dict[str, Any]) -> list[dict[str, Any]]:
        return [run for run in self.content["runs"] if all(run.get(k) == v for k, v in key.items())]

    def add(self, facts: dict[str, Any], run: dict[str, Any] | None, dataset: str) -> None:
        self.content["datasets"][dataset] = facts
        if run is not None:
            self.content["runs"].append(run)
        self.save()

    def save(self) -> None:
        common.write_json(self.path, self.content)

    def train(
        self,
        work: Callable[..., Result],
        keys: list[dict[str, Any]],
        arguments: tuple,
        jobs: int,
        name_of: Callable[[dict[str, Any]], str],
        told: Callable[[dict[str, Any]], str],
    ) -> int:
        """Do those of ``keys`` that are missing and add each as it ends; how many failed.

        ``work`` gets the key, ``arguments`` and the fingerprints of the data on which the training
        is done. Each has a line on the terminal: ``name_of`` the key, and ``told`` of the run.
        """
        self.content |= common.header("mujoco", "gymnasium")
        calls = [(k, *arguments, [r["fingerprint"] for r in self.matching(k)]) for k in keys]
        failed = 0
        for key, result in results(work, calls, jobs):
            if isinstance(result, Exception):
                failed += 1
                text = f"FAILED, {result}"
            else:
                facts, run = result
                self.add(facts, run, key["dataset"])
                text = "done before" if run is None else told(run)
            print(f"{common.now()} {name_of(key)}: {text}", file=sys.stderr, flush=True)
        return failed

    def source(self) -> str:
        """The command that trained, with its last call, the date of the last run and the CPU."""
        content = self.content
        command, dates = content["command"], [r["date"] for r in content["runs"] if "date" in r]
        first = " ".join(command.split()[:2])
        last = "" if command == first else f", in several calls (the last: `{command}`)"
        date = max(dates, default=content["date"])
        return f"`{first}`{last}, {date}, {content['machine']['cpu']}"

    def entries(self, keys: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Each key with its ``run`` on the data as they are now, or None."""
        entries = []
        for key in keys:
            now = self.content["datasets"].get(key["dataset"], {}).get("fingerprint")
            runs = [run for run in self.matching(key) if run["fingerprint"] == now]
            entries.append(key | {"run": runs[-1] if runs else None})
        return entries


def parse(
    parser: argparse.ArgumentParser, arguments: list[str] | None, jobs: bool = False
) -> argparse.Namespace:
    """The command line of a benchmark with a book, whose own options are in ``parser``."""
    if jobs:
        parser.add_argument("--jobs", type=int, default=1, help="trainings at the same time")
    parser.add_argument("--report", action="store_true", help="train nothing, report what there is")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder of the results")
    options = parser.parse_args(arguments)
    if jobs and options.jobs < 1:
        parser.error("--jobs must be 1 or more")
    return options


def narrowed(agent: str, hidden: int) -> dict[str, Any]:
    """Settings that make an agent's networks ``hidden`` units wide; their depth stays.

    The VAE is twice as wide, as published ones are wider. 0: as published.
    """
    import dataclasses

    from saferl.registry import agent_class

    if not hidden:
        return {}
    return {
        field.name: [hidden * (2 if field.name == "vae_hidden" else 1)] * len(field.default)
        for field in dataclasses.fields(agent_class(agent).Config)
        if field.name in NETWORKS
    }


def one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def results(
    work: Callable[..., Result], calls: list[tuple], jobs: int
) -> Iterator[tuple[dict[str, Any], Any]]:
    """The key (first argument) of each call with what ``work`` returned, or what it raised."""
    if jobs == 1:
        one_thread()
        for call in calls:
            try:
                yield call[0], work(*call)
            except Exception as error:
                yield call[0], error
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, context, one_thread) as pool:
        waiting = {pool.submit(work, *call): call[0] for call in calls}
        for future in concurrent.futures.as_completed(waiting):
            error = future.exception()
            yield waiting[future], error or future.result()


def last_metrics(path: Path) -> dict[str, list[float]]:
    """Each metric of a run over its last tenth of readings, mean per member."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    steps = sorted({int(row["step"]) for row in rows})
    late = set(steps[-max(1, len(steps) // 10) :])
    members = 1 + max(int(row["member"]) for row in rows)
    found: dict[str, list[float]] = {}
    for name in rows[0]:
        if name in ("step", "member"):
            continue
        values: list[list[float]] = [[] for _ in range(members)]
        for row in rows:
            if int(row["step"]) in late and row[name]:
                values[int(row["member"])].append(float(row[name]))
        if all(values):
            found[name] = [float(f"{np.mean(value):.6g}") for value in values]
    return found
