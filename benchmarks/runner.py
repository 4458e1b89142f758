"""Train one, play, summarise: the only place in which studies train agents of saferl.

with trained(key, data, steps=key["steps"]) as run:
    return run.summary() | {"returns": play(run.policy, env, 20)["returns"]}
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import csv
import dataclasses
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import study as studies
from benchmarks.store import Key, Record, Store, now

if TYPE_CHECKING:
    from benchmarks.study import Trained

EVALUATION_SEED = 10_000  # episode k of every policy starts from the state of seed 10 000 + k
NETWORKS = ("hidden", "critic_hidden", "value_hidden", "vae_hidden")
Result = tuple[dict[str, Any], Record | None]  # facts of the data, and the record


# One training ------------------------------------------------------------------------------------


@dataclasses.dataclass
class Finished:
    """A run that has just ended; its folder is there until `trained` is left."""

    run: Any
    seconds: float  # on the wall
    cpu_seconds: float

    @property
    def policy(self) -> Any:
        return self.run.policy()

    @property
    def path(self) -> Path:
        return Path(self.run.path)

    def summary(self) -> Record:
        """Members, settings in use, and the metrics at the end."""
        from saferl.runs.folder import RunFolder

        config = RunFolder(self.path).config()
        return {
            "names": config.names,
            "config": config.agent_settings,
            "metrics": last_metrics(self.path / "metrics.csv"),
        }

    @property
    def evaluated(self) -> list[int]:
        """Steps of the evaluations."""
        return [int(step) for step in np.unique(self.run.evaluation.steps)]

    def curve(self) -> list[list[float]]:
        """Mean return ``[evaluations][members]``."""
        found = (self.run.evaluation.at(step).matrix().mean(1) for step in self.evaluated)
        return [np.round(row, 1).tolist() for row in found]


@contextlib.contextmanager
def trained(
    key: Key, data: Any, *, steps: int, folder: Path | None = None, **options: Any
) -> Iterator[Finished]:
    """All members of a key in one run, on the engine that saferl takes by itself.

    Args:
        key: has ``agent`` and ``settings``, and may have ``members`` and ``seed``.
        folder: keep the run there; one that was interrupted goes on at its last checkpoint. None:
            a temporary one.
        options: of `saferl.train`.
    """
    import saferl

    start, processor = time.perf_counter(), time.process_time()
    with contextlib.ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "run"
        if _begun(folder):
            run = saferl.resume(folder, dataset=data, device=options.get("device", "auto"),
                                progress=False)  # fmt: skip
        else:
            run = saferl.train(
                key["agent"], data, steps=steps, members=key.get("members", 1),
                seed=key.get("seed", 0), settings=key["settings"], out=folder, progress=False,
                **options,
            )  # fmt: skip
        yield Finished(run, time.perf_counter() - start, time.process_time() - processor)


def _begun(folder: Path) -> bool:
    """Whether a run can go on there; what is left of one that cannot is removed."""
    from saferl.runs.folder import RunFolder

    if folder.exists() and not RunFolder(folder).steps():
        shutil.rmtree(folder)
    return folder.exists()


def play(policy: Any, env: Any, episodes: int, digits: int = 2) -> dict[str, Any]:
    """Returns, costs (None where there are none) and lengths of `rollout`, for JSON."""
    from saferl.rollout import rollout

    played = rollout(policy, env, episodes, seed=EVALUATION_SEED)
    return {
        name: None if values is None else np.round(values, digits).tolist()
        for name, values in (
            ("returns", played.returns), ("costs", played.costs), ("lengths", played.lengths),
        )
    }  # fmt: skip


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


def fields_of(agent: str) -> dict[str, dataclasses.Field[Any]]:
    """The settings of an agent, by name."""
    from saferl.registry import agent_class

    return {field.name: field for field in dataclasses.fields(agent_class(agent).Config)}


def narrowed(agent: str, hidden: int) -> dict[str, Any]:
    """Settings that make an agent's networks ``hidden`` units wide; their depth stays.

    The VAE is twice as wide, as published ones are wider. 0: as published.
    """
    return {
        name: [hidden * (2 if name == "vae_hidden" else 1)] * len(field.default)
        for name, field in fields_of(agent).items()
        if hidden and name in NETWORKS
    }


# All trainings of a study ------------------------------------------------------------------------


def train_all(
    study: Trained, keys: Sequence[Key], store: Store, options: argparse.Namespace
) -> int:
    """Do those of ``keys`` that are missing and add each as it ends; how many failed."""
    calls = [(study.name, key, options, store.done(key)) for key in keys]
    print(f"{len(keys)} trainings", file=sys.stderr, flush=True)
    failed = 0
    for key, result in _results(calls, getattr(options, "jobs", 1)):
        if isinstance(result, BaseException):
            failed += 1
            text = f"FAILED, {result}"
            store.content.setdefault("failed", {})[study.label(key)] = str(result)
            store.save()
        else:
            facts, record = result
            store.content.get("failed", {}).pop(study.label(key), None)
            store.add(key["dataset"], facts, [] if record is None else [record])
            text = "done before" if record is None else study.told(record)
        print(f"{now()} {study.label(key)}: {text}", file=sys.stderr, flush=True)
    return failed


def work(name: str, key: Key, options: argparse.Namespace, done: Sequence[str]) -> Result:
    """Facts of the data, and the record (None if the training is done on them)."""
    study = studies.load(name)
    data = study.dataset(key, options)
    facts = study.facts(data)
    if facts["fingerprint"] in done:
        return facts, None
    found = study.train(key, data, options)
    return facts, key | {"fingerprint": facts["fingerprint"]} | found | {"date": now()}


def one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _results(calls: list[tuple], jobs: int) -> Iterator[tuple[Key, Any]]:
    """The key of each call with what `work` returned, or what it raised."""
    if jobs == 1:
        one_thread()
        for call in calls:
            try:
                yield call[1], work(*call)
            except Exception as error:
                yield call[1], error
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, context, one_thread) as pool:
        waiting = {pool.submit(work, *call): call[1] for call in calls}
        for future in concurrent.futures.as_completed(waiting):
            yield waiting[future], future.exception() or future.result()
