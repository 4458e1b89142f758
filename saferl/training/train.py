"""`train`: from a dataset (or an environment) to a run folder, resumable to the bit."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from saferl.data import load_dataset
from saferl.data.dataset import Dataset
from saferl.errors import SaferlError
from saferl.evaluation import Evaluator
from saferl.io import part
from saferl.registry import agent_class
from saferl.replay import make_buffer
from saferl.rollout import VectorEnv
from saferl.runs.folder import OBJECT, RunFolder
from saferl.runs.settings import constrain, published, resolve
from saferl.safety.limits import check_limit, limit_warnings, no_costs
from saferl.spec import Spec
from saferl.training.engine import Engine, check_precision, pick_device, pick_engine
from saferl.training.loop import Loop, Run, restore
from saferl.training.memory import announce
from saferl.training.online import OnlineEngine

KEPT_CHECKPOINTS = 2  # the last and, should the disk lose it, the one before


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
        return cls(task.spec(config), config, members, device)
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
    engine: str = "auto",
    precision: str = "fp32",
    threads: int = 1,
    eval_interval: int | None = None,
    eval_episodes: int = 10,
    log_interval: int | None = None,
    checkpoint_interval: int | None = None,
    keep_checkpoints: int = KEPT_CHECKPOINTS,
    memory_map: str | Path | None = None,
    start_from: str | Path | None = None,
    guard: Callable[[Any], Any] | None = None,
    progress: bool = True,
) -> Run:
    """Train M members of an agent and evaluate them.

    Args:
        agent: a registered agent.
        dataset: id, path or `Dataset`; None for an agent that learns from an environment alone.
        env: environment to evaluate in, and to act in for an agent that does (the dataset card's if
            None); a gymnasium id or a function that makes one.
        steps: gradient updates per member; environment steps per member for an agent that acts,
            after its ``offline_steps`` updates on the dataset, which count among them.
        members: seeds trained side by side; each list in ``settings`` multiplies them.
        seed: of the first member; the others follow.
        cost_limits: expected undiscounted cost per episode, in user units, for the tables; an agent
            that learns under a limit is trained for each, unless ``settings`` has ``cost_limit``.
            If none is given it is judged by what it is trained for.
        settings: hyper-parameters, e.g. ``{"alpha": [1, 2.5, 10]}``.
        dataset_options: passed to `load_dataset`, e.g. ``{"size": 20_000}``.
        out: run folder; ``runs/AGENT-DATASET`` and a number if None.
        device: "auto", "cpu", "cuda" or "cuda:1".
        engine: how updates run, see `saferl.training.engine`; "auto", "eager", "compile" or
            "cuda_graph". All give the same result, "compile" to rounding.
        precision: "fp32", or "bf16" for the products of networks where the device has them.
        threads: of the CPU. One is the default because networks of this size gain little from more
            and lose much where other processes want the cores; for many members or wide layers try
            the number of free cores. Results depend on it in the last bits.
        eval_interval: steps between evaluations (a fifth of all if None, 0: only at the end).
        eval_episodes: per member and evaluation.
        log_interval: steps between two readings of the metrics (a hundredth of all if None).
        checkpoint_interval: steps between checkpoints (``eval_interval`` if None).
        keep_checkpoints: so many of the last stay on disk; `load_agent` and `saferl evaluate` take
            a ``step``.
        memory_map: hold the dataset's rows in this file instead of memory.
        start_from: folder of a run whose networks and optimisers this one begins with
            (`Agent.warm_start`), in that run's units of observations and rewards.
        guard: for agents that act: ``guard(policy)`` returns the `Shield` that stands between a
            member's policy and its environment in training; called once per member.
        progress: print progress.

    Returns:
        The finished `Run`. The last checkpoint is the result; no "best" one is chosen.

    Raises:
        SaferlError: anything that the caller can mend, in one line.
        KeyboardInterrupt: after writing a checkpoint, from which `resume` continues.
    """
    counts = {"steps": steps, "members": members, "eval_episodes": eval_episodes,
              "keep_checkpoints": keep_checkpoints, "threads": threads}  # fmt: skip
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
    if out is not None:
        RunFolder(out).check_vacant()  # now, not after what is learned before the first update
    limits = [check_limit(limit) for limit in cost_limits]
    cls, settings = agent_class(agent), dict(settings or {})
    if start_from is not None:
        settings = _sizes_of(start_from, cls) | settings
    if dataset is None and cls.needs_dataset:
        raise SaferlError(
            f"{agent} learns from a dataset: pass --dataset (from an environment alone: sac)"
        )
    if guard is not None and not cls.acts:
        raise SaferlError(f"{agent} acts in no environment while it learns: leave out guard")
    torch_device = pick_device(device)
    _check_machine(cls, engine, precision, torch_device)

    source = None
    if dataset is not None and not isinstance(dataset, Dataset):
        # A run resumes from any folder, so a file is recorded by its full path.
        source = str(Path(dataset).resolve()) if Path(dataset).is_file() else str(dataset)
        dataset = load_dataset(source, **(dataset_options or {}))
    task = "online" if dataset is None else dataset.card.id
    limits, settings = constrain(cls.Config, limits, settings, published(agent, task))
    if dataset is not None and limits and dataset.costs is None:
        raise SaferlError(no_costs(dataset.card.id))
    if dataset is not None:
        env = env or dataset.card.env_id
    if env is None and cls.acts:
        raise SaferlError(f"{agent} acts in an environment, but none is known: pass --env")
    expanded, who = resolve(cls.Config, settings, list(range(seed, seed + members)))
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
        "keep_checkpoints": keep_checkpoints,
        "threads": threads,
        "engine": engine,
        "precision": precision,
        "start_from": None if start_from is None else str(start_from),
        "guard": None if guard is None else OBJECT,
        "agent_config": _plain(dataclasses.asdict(config)),
    }
    folder = RunFolder(out) if out else _free_folder(agent, env if dataset is None else task)
    return _execute(folder, plan, dataset, env, guard, torch_device, memory_map, False, progress)


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
    torch_device = pick_device(device)
    cls = agent_class(written["agent"])
    earlier = {"guard": None, "keep_checkpoints": KEPT_CHECKPOINTS, "engine": "auto"}
    plan = earlier | written  # by this version or another
    if engine is not None:
        plan["engine"] = engine
    _check_machine(cls, plan["engine"], plan["precision"], torch_device)
    for name, given in (("dataset", dataset), ("env", env), ("guard", guard)):
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
    plan["steps"] = steps or plan["steps"]
    if plan != written:
        folder.write_config(plan)
    environment = env if plan["env"] == OBJECT else plan["env"]
    return _execute(
        folder, plan, dataset, environment, guard, torch_device, memory_map, True, progress
    )


def _execute(
    folder: RunFolder,
    plan: dict[str, Any],
    dataset: Dataset | None,
    env: str | Callable[[], Any] | None,
    guard: Callable[[Any], Any] | None,
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
        rows = None
        if dataset is None and memory_map is not None:
            raise SaferlError(
                "--memory-map holds a dataset's rows, and there is no dataset: leave it out"
            )
        if dataset is not None:
            card = {
                "card": dataset.card.to_dict(),
                "fingerprint": dataset.fingerprint,
                "summary": dataset.summary(),
                "problems": list(dataset.problems),
            }
            for line in limit_warnings(dataset, plan["cost_limits"]):
                say(f"warning: {line}")
            rows = cls.prepare(dataset, config)
        slots = None
        if cls.acts:
            slots = VectorEnv(env, len(seeds), None)
            stack.callback(slots.close)
        start = None
        if plan.get("start_from"):
            start = (folder if resumed else RunFolder(plan["start_from"])).load()
        spec = _spec(rows, slots, config, start)
        if slots is not None:
            slots.check(spec)
            for line in slots.remarks(spec, None if rows is None else rows.card.horizon):
                say(f"warning: {line}")
        own_rows = config.online_capacity or plan["steps"] - config.offline_steps if cls.acts else 0
        need = announce(
            say, cls, spec, config, seeds, 0 if rows is None else len(rows), device,
            plan["precision"], costs=rows is None or rows.costs is not None,
            memory_map=memory_map is not None, own_rows=own_rows, dataset=rows,
        )  # fmt: skip
        loop: Loop | None = None
        stack.enter_context(need.guarding(
            lambda: (loop.step if loop else 0, folder.path if folder.steps() else None)
        ))  # fmt: skip
        evaluator = None
        if env is not None:  # as many environments as members: only now is it known that they fit
            evaluator = stack.enter_context(Evaluator(env, len(seeds), plan["eval_episodes"]))
            evaluator.check(spec)
        else:
            say(f"no environment is known for {dataset.card.id}: pass --env to evaluate")
        agent = cls(spec, config, seeds, device, plan["precision"])
        buffer = None
        if rows is not None:
            file_said = say if memory_map is not None else _silent  # the rest is in `need`'s line
            extras = cls.batch_extras(config)
            buffer = make_buffer(rows, spec, seeds, device, extras, memory_map, file_said)
            buffer.restrict(agent.rows(rows))
        if slots is None:
            engine = Engine(agent, buffer, plan["engine"])
        else:
            kind = "eager" if plan["engine"] == "auto" else plan["engine"]
            engine = OnlineEngine(
                agent, slots, plan["steps"], buffer, plan["members"], guard, say, kind
            )
        if not resumed:
            if start is not None:
                agent.warm_start(part(start[0], "agent."))
            elif rows is not None:
                agent.fit(rows, say)
            if cls.acts and config.random_steps and (start is not None or config.offline_steps):
                say(
                    f"warning: the first {config.random_steps} environment steps take random "
                    "actions, though a policy is there that has learned: --set random_steps=0 "
                    "lets it act, and --set start_steps=N before the first update"
                )
            if start is None and cls.pretrained:
                say(
                    f"warning: {plan['agent']} is meant to begin with the networks of another run, "
                    "and begins with random ones: give the run with --from"
                )
            folder = RunFolder.create(folder.path, plan, card)
        loop = Loop(folder, plan, agent, engine, evaluator, say, progress)
        run = loop.run(resumed)
        if (line := need.peak()) is not None:
            say(line)
        return run


def _spec(rows: Dataset | None, slots: VectorEnv | None, config: Any, start: tuple | None) -> Spec:
    """The task as the agent sees it: a checkpoint's, the dataset's or the environment's."""
    own = None if rows is None else rows.spec(config)
    if start is not None:
        theirs = Spec.from_dict(start[1]["spec"])
        for name in ("observation_dim", "action_dim", "discrete", "image"):
            if own is not None and getattr(own, name) != getattr(theirs, name):
                raise SaferlError(
                    f"{name} is {getattr(theirs, name)} in the run to start from and "
                    f"{getattr(own, name)} in {rows.card.id}: start from a run on the same task"
                )
        return theirs
    if own is not None:
        return own
    if config.normalize_observations or config.normalize_rewards:
        raise SaferlError(
            "there is no dataset to normalise by: pass --dataset, or leave out "
            "normalize_observations and normalize_rewards"
        )
    env = slots.envs[0]
    spec = Spec.from_spaces(env.observation_space, env.action_space)
    return dataclasses.replace(
        spec,
        horizon=slots.known_horizon,
        reward_scale=float(config.reward_scale),
        reward_shift=float(config.reward_shift),
    )


def load_agent(run: str | Path, step: int | None = None, device: str = "cpu"):
    """The agent of a run folder at its last (or a given) checkpoint.

    Raises:
        SaferlError: no such run or checkpoint, or one that another version of the agent wrote.
    """
    folder = RunFolder(run)
    state, header = folder.load(step)
    cls = agent_class(header["agent"])
    config, spec = cls.make_config(header["config"]), Spec.from_dict(header["spec"])
    precision = folder.config()["precision"]
    agent = cls(spec, config, header["seeds"], pick_device(device), precision)
    restore(agent, state, header["agent"], run)
    return agent


def _sizes_of(run: str | Path, cls: type) -> dict[str, Any]:
    """The sizes of networks that a run to start from has, as settings."""
    config = RunFolder(run).config()["agent_config"]
    names = ("hidden", "critic_hidden", "critics", "actor_layer_norm", "critic_layer_norm")
    return {name: config[name] for name in names if name in config and hasattr(cls.Config, name)}


def _check_machine(cls: type, engine: str, precision: str, device: torch.device) -> None:
    """Say before any data are read what the device cannot do."""
    pick_engine(engine, device)
    if cls.acts and engine == "cuda_graph":
        raise SaferlError(
            "engine cuda_graph is for agents that learn from a dataset alone: this one steps "
            "environments between its updates, use eager or compile"
        )
    check_precision(precision, device)


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
