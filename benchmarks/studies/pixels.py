"""From pixels: does a dataset beside the environment help, and how fast does it run?

    python benchmarks/pixels.py             # hours of one CPU core
    python benchmarks/pixels.py --report    # the report of what there is, no training

Tasks of dm_control at 32 pixels, three frames, PlaNet's action repeats, rendered without shadows.
The datasets are made here, no published data: SAC learns from the state until it is an expert, then
acts stochastically while it is filmed. Each seed trains SAC from pixels alone, SAC with
half of every batch from that dataset, and MOORL with it, for the same environment steps and critic
steps, and DrQ+BC on the dataset alone for as many updates. A training is added to
results/pixels.json when it ends; a rerun does those that are missing.
"""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common

os.environ.update(common.ONE_THREAD)

import numpy as np
import torch
from book import Book, Result, parse
from evidence_report import pyplot, span, verdict
from hybrid_tasks import trained_until
from scores import EVALUATION_SEED, facts_of
from scores_report import compare

import saferl
from saferl.data import Dataset
from saferl.data.files import data_dir
from saferl.envs.dmc import DMControlEnv, record
from saferl.evaluation import rollout
from saferl.evaluation.statistics import bootstrap_interval
from saferl.rng import MemberRandom

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


def from_state(task: Task) -> DMControlEnv:
    return DMControlEnv(task.domain, task.name, action_repeat=task.repeat)


def from_pixels(task: Task) -> DMControlEnv:
    return DMControlEnv(task.domain, task.name, PIXELS, action_repeat=task.repeat, shadows=False)


@functools.lru_cache(maxsize=1)
def dataset(name: str) -> Dataset:
    """Filmed episodes of a policy that sees the state and draws its actions."""
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
    made: list[DMControlEnv] = []

    def filmed() -> DMControlEnv:
        made.append(from_pixels(task))
        return made[0]

    policy, random = run.policy(), MemberRandom([5], "cpu")

    def acts(frames: torch.Tensor) -> torch.Tensor:
        inner = made[0].env
        parts = inner.task.get_observation(inner.physics).values()
        state = np.concatenate([np.ravel(part) for part in parts]).astype(np.float32)
        with torch.no_grad():
            return policy.sample(torch.from_numpy(state)[None, None], random)

    data = record(filmed, task.filmed, acts, seed=1)
    shutil.rmtree(work / "unfinished", ignore_errors=True)
    data.save(work / "unfinished")
    (work / "unfinished").rename(folder)
    return saferl.load_dataset(folder)


# Training ------------------------------------------------------------------------------------


def key_of(name: str, arm: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """What identifies a training, but for the data's fingerprint."""
    (agent, settings), task = ARMS[arm], TASKS[name]
    steps = options.steps or task.steps
    own = {"noise_steps": steps} if agent == "drq_bc" else {"random_steps": task.random_steps}
    return {
        "dataset": f"{name}-filmed",
        "arm": arm,
        "agent": agent,
        "seed": seed,
        "steps": steps,
        "settings": settings | task.settings | {"reward_scale": 1 / task.repeat} | own,
    }


def name_of(key: dict[str, Any]) -> str:
    """Of a key's task."""
    return key["dataset"].removesuffix("-filmed")


def train_one(key: dict[str, Any], episodes: int, done: list[str]) -> Result:
    """Facts of the dataset, and the finished training (None if the fingerprint is in ``done``)."""
    name = name_of(key)
    task = TASKS[name]
    env = functools.partial(from_pixels, task)
    data, start = dataset(name), time.process_time()
    facts = facts_of(data)
    if facts["fingerprint"] in done:
        return facts, None
    with tempfile.TemporaryDirectory() as folder:
        # Members share convolutions by groups, which a CPU does no faster than one by one.
        run = saferl.train(
            key["agent"], data, env=env, steps=key["steps"], members=1, seed=key["seed"],
            out=Path(folder) / "run", settings=key["settings"], engine="compile",
            eval_interval=-(-key["steps"] // EVALUATIONS), eval_episodes=task.episodes,
            checkpoint_interval=key["steps"], progress=False,
        )  # fmt: skip
        seconds = time.process_time() - start
        played = rollout(run.policy(), env, episodes, seed=EVALUATION_SEED)
    steps = sorted(set(run.evaluation.steps.tolist()))
    return facts, key | {
        "fingerprint": facts["fingerprint"],
        "returns": np.round(played.returns[0], 1).tolist(),
        "curve": {
            "steps": steps,
            "returns": [round(float(run.evaluation.at(s).matrix().mean()), 1) for s in steps],
        },
        "seconds": round(seconds, 1),
        "date": common.now(),
    }


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


# Report --------------------------------------------------------------------------------------


def report(book: Book, keys: list[dict[str, Any]], out: Path) -> str:
    """Markdown of what is finished, and its plot."""
    entries = book.entries(keys)
    finished = [entry for entry in entries if entry["run"]]
    if not finished:
        return "Nothing has been trained at this scale.\n"
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for entry in sorted(finished, key=lambda entry: list(ARMS).index(entry["arm"])):
        arms = found.setdefault(name_of(entry), {})
        arms.setdefault(entry["arm"], []).append(entry["run"])
    plot(found, out / "pixels.png")
    content = book.content
    parts = [
        "# From pixels, **data generated here**\n\n![return over agent steps](pixels.png)\n\n"
        "*final*: the last policy of each seed in "
        f"{len(finished[0]['run']['returns'])} episodes; *area*: mean of the evaluations while "
        "training; 95 % intervals over seeds (and episodes). Rates, per second of processor time: "
        "of the environment alone, which renders once per agent step; in the tables those of a "
        "whole run, compiled updates and evaluations included (DrQ+BC's steps are updates).\n"
    ]
    for name, runs in found.items():
        task, facts = TASKS[name], content["datasets"][f"{name}-filmed"]
        steps, rate = next(iter(runs.values()))[0]["steps"], content["env_steps_per_second"][name]
        parts.append(
            f"## {task.domain}-{task.name}\n\n{steps} agent steps ({steps * task.repeat} control "
            f"steps) at {PIXELS} pixels. The dataset has {facts['transitions']} rows, mean return "
            f"{facts['mean_return']:.0f}. The environment alone: {rate:.0f} agent steps/s "
            f"({rate * task.repeat:.0f} control steps).\n\n{table(runs)}\n"
        )
    missing: dict[str, list[str]] = {}
    for entry in entries:
        if not entry["run"]:
            missing.setdefault(f"{name_of(entry)}, {entry['arm']}", []).append(str(entry["seed"]))
    if missing:
        lines = (f"{what}: seed {', '.join(seeds)}" for what, seeds in missing.items())
        parts.append(f"Not trained: {'; '.join(lines)}.\n")
    parts.append(f"{book.source()}, one thread of a machine that was busy with other work.\n")
    text = "\n".join(parts)
    (out / "pixels.md").write_text(text)
    return text


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown of one task's arms."""
    lines = []
    last = {arm: np.array([run["returns"] for run in own]) for arm, own in runs.items()}
    for arm, own in runs.items():
        curve = np.array([run["curve"]["returns"] for run in own])
        area = curve[:, np.array(own[0]["curve"]["steps"]) > 0].mean(1, keepdims=True)
        against = ["–", "–"]
        if arm != ALONE and ALONE in last:
            value, low, high = compare(last[arm], last[ALONE])
            ratio = last[arm].mean() / last[ALONE].mean() if last[ALONE].any() else np.inf
            against = [f"{ratio:.2f}", f"{span(value, (low, high), 0)}, {verdict(low, high)}"]
        one = len(own) == 1  # has no spread over seeds
        areas = f"{area.mean():.0f}" if one else span(area.mean(), bootstrap_interval(area), 0)
        rate = statistics.median(run["steps"] / run["seconds"] for run in own)
        lines.append([arm, len(own), span(last[arm].mean(), bootstrap_interval(last[arm]), 0),
                      areas, *against, f"{rate:.0f}"])  # fmt: skip
    heads = ["arm", "seeds", "final", "area", "final / online only", "final - online only",
             "agent steps/s"]  # fmt: skip
    return common.table(heads, lines)


def plot(found: dict[str, dict[str, list[dict[str, Any]]]], path: Path) -> None:
    """Return over agent steps, a panel per task: mean of the seeds, and each seed thin."""
    plt = pyplot()
    figure, panels = plt.subplots(
        1, len(found), figsize=(5.6 * len(found), 4.2), layout="constrained", squeeze=False
    )
    for axes, (name, runs) in zip(panels.flat, found.items()):
        for arm, own in runs.items():
            colour = f"C{list(ARMS).index(arm)}"
            steps = own[0]["curve"]["steps"]
            curves = np.array([run["curve"]["returns"] for run in own])
            axes.plot(steps, curves.T, lw=0.7, alpha=0.4, color=colour)
            axes.plot(steps, curves.mean(0), "o-", ms=3, color=colour, label=arm)
        axes.set_title(f"{TASKS[name].domain}-{TASKS[name].name}", fontsize=9)
        axes.set_xlabel("agent steps (updates, for DrQ+BC)")
        axes.set_ylabel("return per episode")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--steps", type=int, help="agent steps of an arm, instead of the task's")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--episodes", type=int, default=10, help="per seed, of the last policy")
    options = parse(parser, arguments)
    book = Book(options.out / "pixels.json", options.fresh)
    keys = [
        key_of(task, arm, seed, options)
        for task in options.tasks
        for seed in range(options.seeds)
        for arm in options.arms
    ]
    failed = 0
    if not options.report:
        rates = book.content.setdefault("env_steps_per_second", {})
        rates.update({name: frame_rate(TASKS[name]) for name in options.tasks})
        failed = book.train(
            train_one, keys, (options.episodes,), 1,
            lambda key: f"{name_of(key)}, seed {key['seed']}, {key['arm']}", told_of,
        )  # fmt: skip
    text = report(book, keys, options.out)
    if not options.report:
        book.save()
    print(text, end="")
    return 1 if failed else 0


def told_of(run: dict[str, Any]) -> str:
    """A line for the terminal."""
    curve = ", ".join(f"{value:.0f}" for value in run["curve"]["returns"])
    return f"{curve}; last policy {np.mean(run['returns']):.0f} ({run['seconds']:.0f} s)"


if __name__ == "__main__":
    sys.exit(main())
