"""From pixels: does a dataset beside the environment help, and how fast does it run?

Tasks of dm_control at 32 pixels, three frames, PlaNet's action repeats, rendered without shadows.
The datasets are made here, no published data: SAC learns from the state until it is an expert, then
acts stochastically while it is filmed. Each seed trains SAC from pixels alone, SAC with half of
every batch from that dataset, and MOORL with it, for the same environment steps and critic steps,
and DrQ+BC on the dataset alone for as many updates.
"""

from __future__ import annotations

import functools
import shutil
import statistics
import time
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.report import Series, judged, shown
from benchmarks.runner import play, trained
from benchmarks.store import Key, Record, Store
from benchmarks.study import Trained, add

PIXELS, EVALUATIONS = 32, 8


@dataclass(frozen=True)
class Task:
    """An environment of dm_control, its expert, and the scale of its trainings."""

    domain: str
    name: str
    repeat: int  # control steps per agent step
    expert: dict[str, Any]  # of SAC from the state
    until: dict[str, int]  # what its evaluations must reach
    filmed: int  # episodes of the dataset
    episodes: int  # per evaluation while training
    settings: dict[str, Any]  # of all arms
    random_steps: int
    steps: int = 20_000  # agent steps of an arm


TASKS = {
    "walker": Task(
        "walker", "walk", repeat=2, expert={"hidden": [128, 128], "random_steps": 1000, "utd": 1.0},
        until={"least": 850, "every": 5000, "most": 120_000}, filmed=50, episodes=2,
        settings={"discount": 0.99, "tau": 0.01}, random_steps=1000,
    ),
    "cartpole": Task(
        "cartpole", "swingup", repeat=8,
        expert={"hidden": [64, 64], "random_steps": 500, "utd": 2.0},
        until={"least": 800, "every": 1000, "most": 20_000}, filmed=40, episodes=5,
        settings={"discount": 0.95, "tau": 0.02}, random_steps=500,
    ),
}  # fmt: skip
COMMON = {"batch_size": 128, "hidden": [128, 128], "channels": [16, 32, 32, 32],
          "strides": [2, 2, 2, 2], "pad": 2, "actor_lr": 1e-3, "critic_lr": 1e-3}  # fmt: skip
ACTING = COMMON | {"utd": 1.0, "initial_temperature": 0.1, "temperature_lr": 1e-3,
                   "critic_layer_norm": True}  # fmt: skip
ALONE = "SAC, online only"
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    ALONE: ("sac", ACTING | {"offline_share": 0.0}),
    "SAC 50/50": ("sac", ACTING),
    "MOORL, K 2, η 0.5": ("moorl", ACTING | {"inner_steps": 2}),
    "DrQ+BC, offline": ("drq_bc", COMMON),
}


# Data ----------------------------------------------------------------------------------------


def from_state(task: Task) -> Any:
    from saferl.envs.dmc import DMControlEnv

    return DMControlEnv(task.domain, task.name, action_repeat=task.repeat)


def from_pixels(task: Task) -> Any:
    from saferl.envs.dmc import DMControlEnv

    return DMControlEnv(task.domain, task.name, PIXELS, action_repeat=task.repeat, shadows=False)


@functools.lru_cache(maxsize=1)
def filmed(name: str) -> Any:
    """Filmed episodes of a policy that sees the state and draws its actions."""
    import torch

    import saferl
    from benchmarks.studies.online_tasks import trained_until
    from saferl.data.sources.fetch import data_dir
    from saferl.envs.dmc import record
    from saferl.rng import MemberRandom

    task, work = TASKS[name], data_dir("pixels")
    folder = work / f"{name}-filmed-{PIXELS}-{task.filmed}"
    if folder.exists():
        return saferl.load_dataset(folder)
    settings = {"batch_size": 128, "reward_scale": 1 / task.repeat, "initial_temperature": 0.1}
    settings |= {f"{part}_lr": 1e-3 for part in ("actor", "critic", "temperature")}
    run, _ = trained_until(
        out=work / "teacher", env=functools.partial(from_state, task), members=1, episodes=5,
        settings=settings | task.expert, **task.until,
    )  # fmt: skip
    made: list[Any] = []

    def env() -> Any:
        made.append(from_pixels(task))
        return made[0]

    policy, random = run.policy(), MemberRandom([5], "cpu")

    def acts(frames: Any) -> Any:
        inner = made[0].env
        parts = inner.task.get_observation(inner.physics).values()
        state = np.concatenate([np.ravel(part) for part in parts]).astype(np.float32)
        with torch.no_grad():
            return policy.sample(torch.from_numpy(state)[None, None], random)

    data = record(env, task.filmed, acts, seed=1)
    shutil.rmtree(work / "unfinished", ignore_errors=True)
    saferl.save_dataset(data, work / "unfinished")
    (work / "unfinished").rename(folder)
    return saferl.load_dataset(folder)


# The study ---------------------------------------------------------------------------------------


class Pixels(Trained):
    name = "pixels"

    def options(self, parser: ArgumentParser) -> None:
        add(parser, "--tasks", tuple(TASKS), choices=TASKS)
        add(parser, "--arms", tuple(ARMS), choices=ARMS)
        add(parser, "--steps", None, "agent steps of an arm, instead of the task's", type=int)
        add(parser, "--seeds", 5)
        add(parser, "--episodes", 10, "per seed, of the last policy")

    def keys(self, options: Namespace) -> list[Key]:
        found = []
        for name in options.tasks:
            task = TASKS[name]
            steps = options.steps or task.steps
            for seed in range(options.seeds):
                for arm in options.arms:
                    agent, settings = ARMS[arm]
                    own = {"random_steps": task.random_steps}
                    if agent == "drq_bc":
                        own = {"noise_steps": steps}
                    scale = {"reward_scale": 1 / task.repeat}
                    found.append({
                        "dataset": f"{name}-filmed",
                        "arm": arm,
                        "agent": agent,
                        "seed": seed,
                        "steps": steps,
                        "settings": settings | task.settings | scale | own,
                    })  # fmt: skip
        return found

    def dataset(self, key: Key, options: Namespace) -> Any:
        return filmed(name_of(key))

    def note(self, store: Store, options: Namespace) -> None:
        rates = store.content.setdefault("env_steps_per_second", {})
        rates |= {name: frame_rate(TASKS[name]) for name in options.tasks}

    def train(self, key: Key, data: Any, options: Namespace) -> Record:
        task = TASKS[name_of(key)]
        env = functools.partial(from_pixels, task)
        # Members share convolutions by groups, which a CPU does no faster than one by one.
        with trained(key, data, env=env, steps=key["steps"], eval_episodes=task.episodes,
                     eval_interval=-(-key["steps"] // EVALUATIONS),
                     checkpoint_interval=key["steps"]) as run:  # fmt: skip
            return {
                "returns": play(run.policy, env, options.episodes, 1)["returns"][0],
                "curve": {"steps": run.evaluated, "returns": [row[0] for row in run.curve()]},
                "seconds": round(run.cpu_seconds, 1),
            }

    def label(self, key: Key) -> str:
        return f"{name_of(key)}, seed {key['seed']}, {key['arm']}"

    def told(self, run: Record) -> str:
        curve = ", ".join(f"{value:.0f}" for value in run["curve"]["returns"])
        return f"{curve}; last policy {report.brief(run)}"

    def results(self, store: Store, entries: list[dict[str, Any]], path: Path) -> str:
        finished = [entry for entry in entries if entry["run"]]
        found: dict[str, dict[str, list[Record]]] = {}
        for entry in sorted(finished, key=lambda entry: list(ARMS).index(entry["arm"])):
            arms = found.setdefault(name_of(entry), {})
            arms.setdefault(entry["arm"], []).append(entry["run"])
        draw(found, path.with_suffix(".png"))
        parts = [
            "# From pixels, **data generated here**\n\n![return over agent steps](pixels.png)\n\n"
            "*final*: the last policy of each seed in "
            f"{len(finished[0]['run']['returns'])} episodes; *area*: mean of the evaluations while "
            "training; 95 % intervals over seeds (and episodes). Rates, per second of processor "
            "time: of the environment alone, which renders once per agent step; in the tables "
            "those of a whole run, updates and evaluations included (DrQ+BC's steps are updates). "
            "The committed runs had compiled updates.\n"
        ]
        for name, runs in found.items():
            task, facts = TASKS[name], store.datasets[f"{name}-filmed"]
            steps = next(iter(runs.values()))[0]["steps"]
            rate = store.content["env_steps_per_second"][name]
            parts.append(
                f"## {task.domain}-{task.name}\n\n{steps} agent steps ({steps * task.repeat} "
                f"control steps) at {PIXELS} pixels. The dataset has {facts['transitions']} rows, "
                f"mean return {facts['mean_return']:.0f}. The environment alone: {rate:.0f} agent "
                f"steps/s ({rate * task.repeat:.0f} control steps).\n\n{table(runs)}\n"
            )
        missing: dict[str, list[str]] = {}
        for entry in entries:
            if not entry["run"]:
                what = f"{name_of(entry)}, {entry['arm']}"
                missing.setdefault(what, []).append(str(entry["seed"]))
        if missing:
            lines = (f"{what}: seed {', '.join(seeds)}" for what, seeds in missing.items())
            parts.append(f"Not trained: {'; '.join(lines)}.\n")
        source = store.source()
        parts.append(f"{source}, one thread of a machine that was busy with other work.\n")
        return "\n".join(parts)


STUDY = Pixels()


def name_of(key: Key) -> str:
    """Of a key's task."""
    return key["dataset"].removesuffix("-filmed")


def frame_rate(task: Task, count: int = 300) -> float:
    """Agent steps per second of processor time, the environment alone."""
    env, random = from_pixels(task), np.random.default_rng(0)
    env.reset(seed=0)
    times = []
    for _ in range(3):
        start = time.process_time()
        for _ in range(count // 3):
            *_, ended, _ = env.step(random.uniform(-1, 1, env.action_space.shape))
            if ended:
                env.reset()
        times.append((time.process_time() - start) / (count // 3))
    env.close()
    return 1 / statistics.median(times)


def table(runs: dict[str, list[Record]]) -> str:
    """Markdown of one task's arms."""
    lines = []
    last = {arm: np.array([run["returns"] for run in own]) for arm, own in runs.items()}
    for arm, own in runs.items():
        curve = np.array([run["curve"]["returns"] for run in own])
        area = curve[:, np.array(own[0]["curve"]["steps"]) > 0].mean(1)
        against = ["–", "–"]
        if arm != ALONE and ALONE in last:
            ratio = last[arm].mean() / last[ALONE].mean() if last[ALONE].any() else np.inf
            against = [f"{ratio:.2f}", judged(last[arm], last[ALONE])]
        areas = f"{area.mean():.0f}" if len(own) == 1 else shown(area)  # one has no spread
        rate = statistics.median(run["steps"] / run["seconds"] for run in own)
        lines.append([arm, len(own), shown(last[arm]), areas, *against, f"{rate:.0f}"])
    heads = ["arm", "seeds", "final", "area", "final / online only", "final - online only",
             "agent steps/s"]  # fmt: skip
    return report.table(heads, lines)


def draw(found: dict[str, dict[str, list[Record]]], path: Path) -> None:
    """Return over agent steps, a panel per task: mean of the seeds, and each seed thin."""
    panels = {}
    for name, runs in found.items():
        curves = {arm: np.array([run["curve"]["returns"] for run in own])
                  for arm, own in runs.items()}  # fmt: skip
        panels[f"{TASKS[name].domain}-{TASKS[name].name}"] = [
            Series(arm, runs[arm][0]["curve"]["steps"], curve.mean(0),
                   f"C{list(ARMS).index(arm)}", thin=curve)
            for arm, curve in curves.items()
        ]  # fmt: skip
    report.plot(panels, path, x="agent steps (updates, for DrQ+BC)", y="return per episode")
