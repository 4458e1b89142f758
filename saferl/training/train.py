"""`train`: from a dataset (or an environment) to a run folder, resumable to the bit."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saferl.data import load_dataset
from saferl.data.buffer import ReplayBuffer
from saferl.data.dataset import Dataset
from saferl.errors import SaferlError
from saferl.evaluation import Evaluation, Evaluator, check_limit
from saferl.registry import agent_class, make_env
from saferl.spec import Spec
from saferl.training.configs import published, resolve
from saferl.training.engine import Engine, OnlineEngine
from saferl.training.run import MetricsLog, RunFolder

CHUNK_SECONDS = 0.5  # between two movements of the progress bar, and to answer Ctrl-C
EVALUATION_SEED = 10_000  # first of the seeds of evaluation episodes, apart from training's
OBJECT = "a Python object"  # stands in config.yaml for a Dataset or environment that has no name


@dataclasses.dataclass(frozen=True)
class Run:
    """What a training leaves behind."""

    path: Path  # the run folder
    agent: Any  # the trained agent, all members
    evaluation: Evaluation | None  # all evaluations; None where no environment is known

    def policy(self):
        """The trained policy of all members, from raw observations to raw actions."""
        return self.agent.policy()


def make_agent(
    name: str,
    task: Dataset | Any,
    members: int | Sequence[int] = 1,
    device: torch.device | str = "cpu",
    **settings: Any,
):
    """An untrained agent for a `Dataset` or a gymnasium environment.

    Args:
        name: a registered agent (`saferl list agents`).
        task: the dataset, or environment, that gives sizes and units.
        members: a count, or one seed per member.
        settings: hyper-parameters over the published ones for this dataset.

    Raises:
        SaferlError: unknown agent or setting, or an action space that the agent is not for.
    """
    cls = agent_class(name)
    if isinstance(task, Dataset):
        config = cls.make_config(published(name, task.card.id) | settings)
        return cls(Spec.from_dataset(task, config), config, members, device)
    config = cls.make_config(published(name, "online") | settings)
    return cls(Spec.from_spaces(task.observation_space, task.action_space), config, members, device)


def train(
    agent: str = "td3_bc",
    dataset: str | Path | Dataset | None = None,
    *,
    env: str | Callable[[], Any] | None = None,
    steps: int = 20_000,
    members: int = 3,
    seed: int = 0,
    cost_limits: Sequence[float] = (),
    settings: dict[str, Any] | None = None,
    dataset_options: dict[str, Any] | None = None,
    out: str | Path | None = None,
    device: str = "auto",
    threads: int = 1,
    eval_interval: int | None = None,
    eval_episodes: int = 10,
    log_interval: int | None = None,
    checkpoint_interval: int | None = None,
    memory_map: str | Path | None = None,
    progress: bool = True,
) -> Run:
    """Train M members of an agent and evaluate them.

    Args:
        agent: a registered agent.
        dataset: id, path or `Dataset`; None trains online in ``env``.
        env: environment to evaluate in (the dataset card's if None); a gymnasium id or a function
            that makes one.
        steps: gradient updates per member (environment steps when online).
        members: seeds trained side by side; each list in ``settings`` multiplies them.
        seed: of the first member; the others follow.
        cost_limits: expected undiscounted cost per episode, in user units, for the tables.
        settings: hyper-parameters, e.g. ``{"alpha": [1, 2.5, 10]}``.
        dataset_options: passed to `load_dataset`, e.g. ``{"size": 20_000}``.
        out: run folder; ``runs/AGENT-DATASET`` and a number if None.
        device: "auto", "cpu", "cuda" or "cuda:1".
        threads: of the CPU. One is the default because networks of this size gain little from more
            and lose much where other processes want the cores; for many members or wide layers try
            the number of free cores. Results depend on it in the last bits.
        eval_interval: steps between evaluations (a fifth of all if None, 0: only at the end).
        eval_episodes: per member and evaluation.
        log_interval: steps between two readings of the metrics (a hundredth of all if None).
        checkpoint_interval: steps between checkpoints (``eval_interval`` if None).
        memory_map: hold the buffer in this file instead of memory.
        progress: print progress.

    Returns:
        The finished `Run`. The last checkpoint is the result; no "best" one is chosen.

    Raises:
        SaferlError: anything that the caller can mend, in one line.
        KeyboardInterrupt: after writing a checkpoint, from which `resume` continues.
    """
    counts = {"steps": steps, "members": members, "eval_episodes": eval_episodes,
              "threads": threads}  # fmt: skip
    for name, count in counts.items():
        if count < 1:
            raise SaferlError(f"{name} must be 1 or more, got {count}")
    intervals = {"eval_interval": eval_interval, "log_interval": log_interval,
                 "checkpoint_interval": checkpoint_interval}  # fmt: skip
    for name, interval in intervals.items():
        if interval is not None and interval < 0:
            raise SaferlError(f"{name} must be 0 or more steps, got {interval}")
    if dataset is None and env is None:
        raise SaferlError("neither a dataset nor an environment was given: pass --dataset or --env")
    limits = [check_limit(limit) for limit in cost_limits]
    cls = agent_class(agent)
    if dataset is None and not hasattr(cls.Config, "random_steps"):
        raise SaferlError(f"{agent} learns from a dataset: pass --dataset (online: sac)")
    torch_device = pick_device(device)

    source = None
    if dataset is not None and not isinstance(dataset, Dataset):
        # A run resumes from any folder, so a file is recorded by its full path.
        source = str(Path(dataset).resolve()) if Path(dataset).is_file() else str(dataset)
        dataset = load_dataset(source, **(dataset_options or {}))
    if dataset is not None and limits and dataset.costs is None:
        raise SaferlError(
            f"a cost limit is set but {dataset.card.id} has no costs: attach them with "
            "Dataset.with_costs(function), or map a cost column"
        )
    if dataset is not None:
        env = env or dataset.card.env_id
    task = "online" if dataset is None else dataset.card.id
    expanded, who = resolve(
        cls.Config, published(agent, task) | (settings or {}), list(range(seed, seed + members))
    )
    config = cls.make_config(expanded)
    eval_interval = max(1, steps // 5) if eval_interval is None else eval_interval or steps
    plan = {
        "agent": agent,
        "dataset": source if dataset is None or source else OBJECT,
        "dataset_options": dataset_options or {},
        "env": env if isinstance(env, str) or env is None else OBJECT,
        "steps": steps,
        "seeds": list(who.seeds),
        "members": list(who.names),
        "cost_limits": limits,
        "eval_interval": eval_interval,
        "eval_episodes": eval_episodes,
        "log_interval": log_interval or max(1, steps // 100),
        "checkpoint_interval": checkpoint_interval or eval_interval,
        "threads": threads,
        "agent_config": _plain(dataclasses.asdict(config)),
    }
    folder = RunFolder(out) if out else _free_folder(agent, env if dataset is None else task)
    return _execute(folder, plan, dataset, env, torch_device, memory_map, False, progress)


def resume(
    run: str | Path,
    *,
    dataset: Dataset | None = None,
    env: Callable[[], Any] | None = None,
    steps: int | None = None,
    device: str = "auto",
    memory_map: str | Path | None = None,
    progress: bool = True,
) -> Run:
    """Continue a run from its last checkpoint: on the CPU the result is that of an unbroken run.

    Args:
        run: its folder. Agent, settings and dataset are taken from it.
        dataset, env: only where `train` was given an object, which a file cannot hold.
        steps: train longer than planned.

    Raises:
        SaferlError: not a run, no checkpoint yet, or data or configuration that are not those that
            the run began with.
    """
    folder = RunFolder(run)
    plan = folder.config()
    torch_device = pick_device(device)
    for name, given in (("dataset", dataset), ("env", env)):
        if plan[name] == OBJECT and given is None:
            raise SaferlError(
                f"{run} was started with a Python object as {name}: continue it with "
                f"saferl.resume(run, {name}=…)"
            )
        if plan[name] != OBJECT and given is not None:
            raise SaferlError(f"{run} has {name} {plan[name]}: start another run to change it")
    if plan["dataset"] not in (None, OBJECT):
        dataset = load_dataset(plan["dataset"], **plan["dataset_options"])
    recorded = folder.card().get("fingerprint")
    if dataset is not None and recorded != dataset.fingerprint:
        raise SaferlError(
            f"{run} was trained on other data (fingerprint {str(recorded)[:12]}, now "
            f"{dataset.fingerprint[:12]}): start another run"
        )
    if steps is not None and steps < plan["steps"]:
        raise SaferlError(f"{run} was planned for {plan['steps']} steps: they may grow, not shrink")
    if steps is not None and steps > plan["steps"]:
        plan["steps"] = steps
        folder.write_config(plan)
    environment = env if plan["env"] == OBJECT else plan["env"]
    return _execute(folder, plan, dataset, environment, torch_device, memory_map, True, progress)


def _execute(
    folder: RunFolder,
    plan: dict[str, Any],
    dataset: Dataset | None,
    env: str | Callable[[], Any] | None,
    device: torch.device,
    memory_map: str | Path | None,
    resumed: bool,
    progress: bool,
) -> Run:
    say = _say if progress else _silent
    cls = agent_class(plan["agent"])
    config, seeds = cls.make_config(plan["agent_config"]), plan["seeds"]
    card: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(plan["threads"])
        evaluator = None
        if env is not None:
            evaluator = stack.enter_context(Evaluator(env, len(seeds), plan["eval_episodes"]))
        else:
            say(f"no environment is known for {dataset.card.id}: pass --env to evaluate")
        if dataset is None:
            probe = make_env(env)
            stack.callback(probe.close)
            agent = cls(
                Spec.from_spaces(probe.observation_space, probe.action_space), config, seeds, device
            )
            engine: Engine = OnlineEngine(agent, lambda: make_env(env), plan["steps"], seeds, say)
        else:
            card = {
                "card": dataset.card.to_dict(),
                "fingerprint": dataset.fingerprint,
                "summary": dataset.summary(),
                "problems": list(dataset.problems),
            }
            rows = cls.prepare(dataset, config)
            agent = cls(Spec.from_dataset(rows, config), config, seeds, device)
            if evaluator is not None:
                evaluator.check(agent.spec)
            buffer = ReplayBuffer.from_dataset(rows, agent.spec, seeds, device, memory_map, say)
            engine = Engine(agent, buffer)
        if not resumed:
            folder = RunFolder.create(folder.path, plan, card)
        return _Loop(folder, plan, agent, engine, evaluator, say, progress).run(resumed)


class _Loop:
    """Runs an engine from event to event: read metrics, evaluate, write a checkpoint."""

    def __init__(self, folder, plan, agent, engine, evaluator, say, progress):
        self.folder, self.plan, self.names = folder, plan, tuple(plan["members"])
        self.agent, self.engine, self.evaluator = agent, engine, evaluator
        self.say, self.progress = say, progress
        self.step = 0
        self.seconds = 0.0  # training time, evaluation left out
        self.evaluation: Evaluation | None = None

    def run(self, resumed: bool) -> Run:
        if resumed:
            state, header = self.folder.load()
            self._restore(state, header)
            self.say(f"resuming {self.folder.path} at step {self.step}")
        log = MetricsLog(self.folder, self.names, self.step if resumed else None)
        try:
            with _stop_signals() as stopped:
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

        total, plan = self.plan["steps"], self.plan
        intervals = [plan[f"{event}_interval"] for event in ("log", "eval", "checkpoint")]
        chunk = 1
        with tqdm(
            total=total,
            initial=self.step,
            desc=plan["agent"],
            unit="step",
            disable=not self.progress,
            mininterval=1.0,
        ) as bar:
            while self.step < total and not stopped:
                following = [(self.step // interval + 1) * interval for interval in intervals]
                stop = min(*following, self.step + chunk, total)
                start = time.perf_counter()
                self.engine.run(stop - self.step)
                seconds = time.perf_counter() - start
                self.seconds += seconds
                chunk = max(1, round((stop - self.step) / seconds * CHUNK_SECONDS))
                bar.update(stop - self.step)
                self.step = stop
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
        return self.step % self.plan[f"{event}_interval"] == 0 or self.step == self.plan["steps"]

    def _watch(self, metrics: dict[str, np.ndarray]) -> None:
        for name, values in metrics.items():
            if not np.isfinite(values).all():
                member = self.names[int(np.argmin(np.isfinite(values)))]
                raise SaferlError(
                    f"{name} of member {member} is not finite at step {self.step}: the last "
                    f"checkpoint is in {self.folder.checkpoints}; lower a learning rate"
                )

    def _evaluate(self, bar) -> None:
        episodes = self.evaluator.run(self.agent.policy(), seed=EVALUATION_SEED)
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
            "agent": self.plan["agent"],
            "config": self.plan["agent_config"],
            "spec": self.agent.spec.to_dict(),
            "seeds": self.plan["seeds"],
            "seconds": round(self.seconds, 1),
            "versions": versions(),
        }
        self.folder.save(self.step, state, header)

    def _restore(self, state: dict[str, Tensor], header: dict[str, Any]) -> None:
        def part(prefix: str) -> dict[str, Tensor]:
            return {k[len(prefix) :]: v for k, v in state.items() if k.startswith(prefix)}

        for key, recorded in (("config", "agent_config"), ("agent", "agent"), ("seeds", "seeds")):
            if header[key] != self.plan[recorded]:
                raise SaferlError(
                    f"the checkpoints of {self.folder.path} were written with another {recorded} "
                    "than its config.yaml has now: restore the file or start another run"
                )
        self.agent.load_state_dict(part("agent."))
        self.engine.load_state_dict(part("engine."))
        self.step, self.seconds = header["step"], header["seconds"]
        file = self.folder.path / "evaluation.csv"
        if file.exists():
            self.evaluation = Evaluation.read(file).until(self.step)


def load_agent(run: str | Path, step: int | None = None, device: str = "cpu"):
    """The agent of a run folder at its last (or a given) checkpoint.

    Raises:
        SaferlError: no such run or checkpoint.
    """
    state, header = RunFolder(run).load(step)
    cls = agent_class(header["agent"])
    config = cls.make_config(header["config"])
    agent = cls(Spec.from_dict(header["spec"]), config, header["seeds"], pick_device(device))
    agent.load_state_dict({k[6:]: v for k, v in state.items() if k.startswith("agent.")})
    return agent


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
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


def pick_device(name: str) -> torch.device:
    """ "auto" is the GPU if there is one.

    Raises:
        SaferlError: the device does not exist on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise SaferlError(f"device {name!r} cannot be used: {reason}") from None
    return device


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


def _plain(value: Any) -> Any:
    """Tuples as lists, for YAML and JSON."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _free_folder(agent: str, task: str | Callable[[], Any]) -> RunFolder:
    name = task if isinstance(task, str) else "custom"
    stem = Path("runs") / f"{agent}-{Path(name).name.replace(':', '-')}"
    path, count = stem, 1
    while path.exists():
        count += 1
        path = stem.with_name(f"{stem.name}-{count}")
    return RunFolder(path)


def _say(line: str) -> None:
    print(line, flush=True)


def _silent(line: str) -> None:
    pass
