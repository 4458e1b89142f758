"""`train`: from a dataset (or an environment) to a run folder, resumable to the bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from saferl.data import load_dataset
from saferl.data.dataset import Dataset
from saferl.errors import SaferlError
from saferl.registry import agent_class
from saferl.runs.config import OBJECT, RunConfig
from saferl.runs.folder import RunFolder
from saferl.runs.settings import Resolved, published, resolve
from saferl.safety.limits import no_costs
from saferl.spec import Spec
from saferl.training.engine import check_precision, pick_device, pick_engine
from saferl.training.loop import Run, restore
from saferl.training.setup import Inputs, Place, execute

EnvSource = str | Callable[[], Any]  # a gymnasium id, or a function that makes an environment


def make_agent(
    name: str,
    task: Dataset | Any,
    members: int | Sequence[int] = 1,
    device: torch.device | str = "cpu",
    **settings: Any,
) -> Any:
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
        return cls(task.spec(config), config, members, device)
    config = cls.make_config(published(name, "online") | settings)
    return cls(Spec.from_spaces(task.observation_space, task.action_space), config, members, device)


def train(
    config: str | RunConfig = "td3_bc",
    dataset: str | Path | Dataset | None = None,
    *,
    env: EnvSource | None = None,
    guard: Callable[[Any], Any] | None = None,
    out: str | Path | None = None,
    device: str = "auto",
    memory_map: str | Path | None = None,
    progress: bool = True,
    **options: Any,
) -> Run:
    """Train M members of an agent and evaluate them.

        saferl.train("td3_bc", "d4rl/hopper-medium-v2", steps=1_000_000, members=5)
        saferl.train(RunConfig(agent="td3_bc", dataset="d4rl/hopper-medium-v2"))

    Args:
        config: a registered agent, or the whole configuration.
        dataset: id, path or `Dataset`; None for an agent that learns from an environment alone.
        env: environment to evaluate in, and to act in for an online-capable agent (the dataset
            card's if None); a gymnasium id or a function that makes one.
        guard: for online-capable agents: ``guard(policy)`` returns the `Shield` that stands between
            a member's policy and its environment in training; called once per member.
        out: run folder; ``runs/AGENT-DATASET`` and a number if None.
        device: "auto", "cpu", "cuda" or "cuda:1".
        memory_map: hold the dataset's rows in this file instead of memory.
        progress: print progress.
        options: fields of `RunConfig`, such as ``steps=``, ``members=``, ``cost_limits=``,
            ``settings={"alpha": [1, 2.5, 10]}``, ``eval_interval=``, ``engine=``.

    Returns:
        The finished `Run`. The last checkpoint is the result; no "best" one is chosen.

    Raises:
        SaferlError: anything that the caller can mend, in one line.
        KeyboardInterrupt: after writing a checkpoint, from which `resume` continues.
    """
    asked, inputs = _inputs(config, dataset, env, guard, options)
    place = Place(pick_device(device), memory_map, progress)
    if out is not None:
        RunFolder(out).check_vacant()  # now, not after what is learned before the first update
    _check_machine(agent_class(asked.agent), asked, place.device)
    resolved, inputs = prepare(asked, inputs)
    folder = RunFolder(out) if out else _free_folder(resolved.run, inputs)
    return execute(folder, resolved.run, inputs, place, resumed=False)


def _inputs(
    config: str | RunConfig,
    dataset: str | Path | Dataset | None,
    env: EnvSource | None,
    guard: Callable[[Any], Any] | None,
    options: dict[str, Any],
) -> tuple[RunConfig, Inputs]:
    """What is asked for as a `RunConfig`, in which objects without a name are `OBJECT`."""
    asked = RunConfig(agent=config) if isinstance(config, str) else config
    given = {name: value for name, value in options.items() if value is not None}
    if isinstance(given.get("start_from"), Path):
        given["start_from"] = str(given["start_from"])
    asked = asked.replace(**given)
    found: Dataset | None = None
    if isinstance(dataset, Dataset):
        found, asked = dataset, asked.replace(dataset=OBJECT)
    elif dataset is not None:
        asked = asked.replace(dataset=str(dataset))
    if asked.dataset not in (None, OBJECT) and Path(str(asked.dataset)).is_file():
        # A run resumes from any folder, so a file is recorded by its full path.
        asked = asked.replace(dataset=str(Path(str(asked.dataset)).resolve()))
    if env is not None:
        asked = asked.replace(env=env if isinstance(env, str) else OBJECT)
    if guard is not None:
        asked = asked.replace(guard=OBJECT)
    place = env if env is not None else asked.env
    return asked, Inputs(found, place, guard)


def prepare(asked: RunConfig, inputs: Inputs) -> tuple[Resolved, Inputs]:
    """Load the dataset and fill in the configuration.

    Raises:
        SaferlError: nothing to learn from, or nothing that this agent can learn from.
    """
    cls, agent = agent_class(asked.agent), asked.agent
    if asked.dataset is None and asked.env is None:
        raise SaferlError("neither a dataset nor an environment was given: pass --dataset or --env")
    if asked.start_from is not None:
        asked = asked.replace(settings=_sizes_of(asked.start_from, cls) | asked.settings)
    if asked.dataset is None and cls.needs_dataset:
        raise SaferlError(
            f"{agent} learns from a dataset: pass --dataset (from an environment alone: sac)"
        )
    if inputs.guard is not None and not cls.online:
        raise SaferlError(f"{agent} acts in no environment while it learns: leave out guard")
    dataset = inputs.dataset
    if dataset is None and asked.dataset is not None:
        dataset = load_dataset(asked.dataset, **asked.dataset_options)
    resolved = resolve(asked, "online" if dataset is None else dataset.card.id)
    run, env = resolved.run, inputs.env
    if dataset is not None:
        if run.cost_limits and dataset.costs is None:
            raise SaferlError(no_costs(dataset.card.id))
        if env is None:
            env = dataset.card.env_id
            run = run.replace(env=env)
    if env is None and cls.online:
        raise SaferlError(f"{agent} acts in an environment, but none is known: pass --env")
    return dataclasses.replace(resolved, run=run), Inputs(dataset, env, inputs.guard)


def resume(
    run: str | Path,
    *,
    dataset: Dataset | None = None,
    env: Callable[[], Any] | None = None,
    guard: Callable[[Any], Any] | None = None,
    steps: int | None = None,
    device: str = "auto",
    engine: str | None = None,
    memory_map: str | Path | None = None,
    progress: bool = True,
) -> Run:
    """Continue a run from its last checkpoint: on the CPU the result is that of an unbroken run.

    With engine "compile" it is so to rounding: what was compiled is compiled anew, and the first
    updates are eager.

    Args:
        run: its folder. Agent, settings and dataset are taken from it.
        dataset, env, guard: only where `train` was given an object, which a file cannot hold.
        steps: train longer than planned.
        engine: how updates run from here on; None: as they did.

    Raises:
        SaferlError: not a run, no checkpoint yet, or data or configuration that are not those that
            the run began with.
    """
    folder = RunFolder(run)
    written = folder.config()
    place = Place(pick_device(device), memory_map, progress)
    config = written if engine is None else written.replace(engine=engine)
    _check_machine(agent_class(config.agent), config, place.device)
    for name, given in (("dataset", dataset), ("env", env), ("guard", guard)):
        recorded = getattr(config, name)
        if recorded == OBJECT and given is None:
            raise SaferlError(
                f"{run} was started with a Python object as {name}: continue it with "
                f"saferl.resume(run, {name}=…)"
            )
        if recorded != OBJECT and given is not None:
            raise SaferlError(f"{run} has {name} {recorded}: start another run to change it")
    if config.dataset not in (None, OBJECT):
        dataset = load_dataset(str(config.dataset), **config.dataset_options)
    fingerprint = folder.card().get("fingerprint")
    if dataset is not None and fingerprint != dataset.fingerprint:
        raise SaferlError(
            f"{run} was trained on other data (fingerprint {str(fingerprint)[:12]}, now "
            f"{dataset.fingerprint[:12]}): start another run"
        )
    if steps is not None:
        if steps < config.steps:
            raise SaferlError(
                f"{run} was planned for {config.steps} steps: they may grow, not shrink"
            )
        config = config.replace(steps=steps)
    if config != written:
        folder.write_config(config)
    inputs = Inputs(dataset, env if config.env == OBJECT else config.env, guard)
    return execute(folder, config, inputs, place, resumed=True)


def load_agent(run: str | Path, step: int | None = None, device: str = "cpu") -> Any:
    """The agent of a run folder at its last (or a given) checkpoint.

    Raises:
        SaferlError: no such run or checkpoint, or one that another version of the agent wrote.
    """
    folder = RunFolder(run)
    state, header = folder.load(step)
    cls = agent_class(header["agent"])
    config, spec = cls.make_config(header["config"]), Spec.from_dict(header["spec"])
    precision = folder.config().precision
    agent = cls(spec, config, header["seeds"], pick_device(device), precision)
    restore(agent, state, header["agent"], run)
    return agent


def _sizes_of(run: str | Path, cls: Any) -> dict[str, Any]:
    """The sizes of networks that a run to start from has, as settings."""
    settings = RunFolder(run).config().agent_settings
    names = ("hidden", "critic_hidden", "critics", "actor_layer_norm", "critic_layer_norm")
    return {name: settings[name] for name in names if name in settings and name in fields(cls)}


def fields(cls: Any) -> set[str]:
    """Names of the settings of an agent."""
    return {field.name for field in dataclasses.fields(cls.Config)}


def _check_machine(cls: Any, config: RunConfig, device: torch.device) -> None:
    """Say before any data are read what the device cannot do."""
    pick_engine(config.engine, device)
    if cls.online and config.engine == "cuda_graph":
        raise SaferlError(
            "engine cuda_graph is for agents that learn from a dataset alone: this one steps "
            "environments between its updates, use eager or compile"
        )
    check_precision(config.precision, device)


def _free_folder(config: RunConfig, inputs: Inputs) -> RunFolder:
    task = inputs.env if inputs.dataset is None else inputs.dataset.card.id
    name = task if isinstance(task, str) else "custom"
    stem = Path("runs") / f"{config.agent}-{Path(name).name.replace(':', '-')}"
    path, count = stem, 1
    while path.exists():
        count += 1
        path = stem.with_name(f"{stem.name}-{count}")
    return RunFolder(path)
