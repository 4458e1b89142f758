"""The loop: runs an engine from event to event, and stops only between two updates."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import platform
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from saferl.errors import SaferlError, one_line
from saferl.evaluation import Evaluation
from saferl.io import part
from saferl.rollout import EnvironmentFailed, Evaluator
from saferl.runs.config import RunConfig
from saferl.runs.folder import RunFolder, check_record
from saferl.runs.metrics import MetricsLog
from saferl.training.engine import Engine

CHUNK_SECONDS = 0.5  # between two movements of the progress bar, and to answer Ctrl-C
# First of the seeds of evaluation episodes. Those of training begin at multiples of a million and
# three, so that a member of seed 0 meets these initial states from its 10,000th episode on.
EVALUATION_SEED = 10_000


@dataclasses.dataclass(frozen=True)
class Run:
    """What a training leaves behind."""

    path: Path  # the run folder
    agent: Any  # the trained agent, all members
    evaluation: Evaluation | None  # all evaluations; None where no environment is known

    def policy(self) -> Any:
        """The trained policy of all members, from raw observations to raw actions."""
        return self.agent.policy()


class Voice(Protocol):
    """How a run speaks to its user."""

    @property
    def progress(self) -> bool: ...

    def say(self, line: str) -> None: ...


class Loop:
    """Runs an engine from event to event: read metrics, evaluate, write a checkpoint."""

    def __init__(
        self,
        folder: RunFolder,
        config: RunConfig,
        agent: Any,
        engine: Engine,
        evaluator: Evaluator | None,
        place: Voice,
    ):
        self.folder, self.config, self.names = folder, config, config.names
        self.agent, self.engine, self.evaluator = agent, engine, evaluator
        self.say, self.progress = place.say, place.progress
        self.step = 0
        self.seconds = 0.0  # training time, evaluation left out
        self.evaluation: Evaluation | None = None

    def run(self, resumed: bool) -> Run:
        if resumed:
            state, header = self.folder.load()
            self._restore(state, header)
            self.say(f"resuming {self.folder.path} at step {self.step}")
        log = MetricsLog(self.folder, len(self.names), self.step if resumed else None)
        try:
            with stop_signals() as stopped:
                self._train(log, stopped)
                if stopped:
                    self._save()
        finally:
            log.close()
            self.engine.close()
        if stopped:
            self.say(
                f"stopped at step {self.step}; continue with: saferl train --resume "
                f"{self.folder.path}"
            )
            raise KeyboardInterrupt
        return Run(self.folder.path, self.agent, self.evaluation)

    def _train(self, log: MetricsLog, stopped: list[int]) -> None:
        from tqdm import tqdm

        total, intervals = self.config.steps, self.config.intervals.values()
        chunk = 1
        with tqdm(
            total=total,
            initial=self.step,
            desc=self.config.agent,
            unit="step",
            disable=not self.progress,
            mininterval=1.0,
        ) as bar:
            if self._owes_evaluation():
                self._evaluate(bar)
            while self.step < total and not stopped:
                events = [(self.step // interval + 1) * interval for interval in intervals]
                stop = min(*events, self.step + chunk, total)
                start = time.perf_counter()
                done = self.engine.run(stop - self.step)
                self.engine.wait()
                seconds = time.perf_counter() - start
                self.seconds += seconds
                chunk = max(1, round(done / seconds * CHUNK_SECONDS))
                bar.update(done)
                self.step += done
                if self.engine.failure is not None:
                    raise self._stopped_by(self.engine.failure)
                if self._due("log"):
                    metrics = self.engine.read()
                    if metrics:
                        log.write(self.step, metrics)
                        self._watch(metrics)
                if self._due("eval") and self.evaluator is not None:
                    self._evaluate(bar)
                if self._due("checkpoint"):
                    self._save()

    def _due(self, event: str) -> bool:
        return self.step % self.config.intervals[event] == 0 or self.step == self.config.steps

    def _owes_evaluation(self) -> bool:
        """Whether the run stopped in the evaluation of its checkpoint's step."""
        if self.evaluator is None or not self.step or not self._due("eval"):
            return False
        return self.evaluation is None or self.step not in self.evaluation.steps

    def _stopped_by(self, failure: Any) -> SaferlError:
        """What to raise, all that was learned being kept."""
        self._save()
        return SaferlError(
            f"{failure}; everything up to step {self.step} is kept: continue with saferl train "
            f"--resume {self.folder.path}"
        )

    def _watch(self, metrics: dict[str, np.ndarray]) -> None:
        for name, values in metrics.items():
            if not np.isfinite(values).all():
                member = self.names[int(np.argmin(np.isfinite(values)))]
                kept = self.folder.steps()
                where = f"the last checkpoint is of step {kept[-1]}" if kept else "none was saved"
                raise SaferlError(
                    f"{name} of member {member} is not finite at step {self.step}: lower a "
                    f"learning rate, look at the rewards' scale ({where} in "
                    f"{self.folder.checkpoints})"
                )

    def _evaluate(self, bar: Any) -> None:
        assert self.evaluator is not None
        try:
            episodes = self.evaluator.run(self.agent.policy(), seed=EVALUATION_SEED)
        except EnvironmentFailed as error:
            member = self.names[error.index // self.evaluator.per_member]
            raise self._stopped_by(f"evaluation: {error} (member {member})") from error
        rows = Evaluation.from_episodes(episodes, step=self.step)
        earlier = [] if self.evaluation is None else [self.evaluation]
        self.evaluation = Evaluation.concatenate([*earlier, rows])
        self.evaluation.write(self.folder.path / "evaluation.csv")
        if self.progress:
            returns = episodes.returns.mean()
            cost = "" if episodes.costs is None else f", cost {episodes.costs.mean():.1f}"
            bar.write(f"step {self.step}: mean return {returns:.1f}{cost}")

    def _save(self) -> None:
        state = {f"agent.{k}": v for k, v in self.agent.state_dict().items()}
        state |= {f"engine.{k}": v for k, v in self.engine.state_dict().items()}
        header = {
            "agent": self.config.agent,
            "config": self.config.agent_settings,
            "spec": self.agent.spec.to_dict(),
            "seeds": self.config.seeds,
            "seconds": round(self.seconds, 1),
            "versions": versions(),
        }
        self.folder.save(self.step, state, header, self.config.keep_checkpoints)

    def _restore(self, state: dict[str, Tensor], header: dict[str, Any]) -> None:
        check_record(self.folder, self.config, header)
        restore(self.agent, state, header["agent"], self.folder.path)
        self.engine.load_state_dict(part(state, "engine."))
        self.step, self.seconds = header["step"], header["seconds"]
        file = self.folder.path / "evaluation.csv"
        if file.exists():
            self.evaluation = Evaluation.read(file).until(self.step)


def restore(agent: Any, state: dict[str, Tensor], name: str, run: Any) -> None:
    """Fill an agent from the state in a checkpoint of ``run``.

    Raises:
        SaferlError: another version of the agent wrote it.
    """
    try:
        agent.load_state_dict(part(state, "agent."))
    except (KeyError, RuntimeError) as error:
        raise SaferlError(
            f"the checkpoint of {run} does not fit this version's {name} ({one_line(error)}): use "
            "the version that wrote it, or train again"
        ) from error


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that receives Ctrl-C or SIGTERM, so that the loop stops between two updates.

    An exception in the middle of an update would leave a state that no unbroken run passes through.
    A second Ctrl-C interrupts at once.
    """
    received: list[int] = []

    def receive(number: int, frame: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread can handle signals
        return
    previous = {
        number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def versions() -> dict[str, str]:
    """What the result depends on, for the record."""
    packages = ("torch", "numpy", "gymnasium", "mujoco", "saferl")
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
