"""From pixels: does a dataset beside the environment help, and how fast does it run?

    python benchmarks/pixels.py             # an hour and a half of one CPU core
    python benchmarks/pixels.py --report    # the report of what there is, no training

cartpole-swingup of dm_control at 64 pixels, three frames, action repeat 8 (PlaNet's for this task),
rendered without shadows. The dataset is made here, no published data: SAC learns from the state
until an evaluation reaches 800, then acts stochastically while it is filmed. Each seed trains SAC
from pixels alone, SAC with half of every batch from that dataset, and MOORL with it, for the same
environment steps and critic steps, and DrQ+BC on the dataset alone for as many updates. A training
is added to results/pixels.json when it ends; a rerun does those that are missing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common

os.environ.update(common.ONE_THREAD)

import numpy as np
import torch
from book import Book, Result
from evidence_report import pyplot, span, verdict
from scores import EVALUATION_SEED, facts_of
from scores_report import compare

import saferl
from saferl.data import Dataset
from saferl.data.files import data_dir
from saferl.envs.dmc import DMControlEnv, record
from saferl.evaluation import rollout
from saferl.evaluation.statistics import bootstrap_interval
from saferl.rng import MemberRandom

NAME, PIXELS, REPEAT, FILMED, EVALUATIONS = "cartpole-filmed", 64, 8, 40, 6
COMMON = {"batch_size": 64, "hidden": [128, 128], "channels": [16, 32, 32, 32],
          "strides": [2, 2, 2, 2], "pad": 4, "reward_scale": 1 / REPEAT, "actor_lr": 1e-3,
          "critic_lr": 1e-3, "tau": 0.02, "discount": 0.95}  # fmt: skip
ACTING = COMMON | {"random_steps": 500, "utd": 1.0, "initial_temperature": 0.1,
                   "temperature_lr": 1e-3}  # fmt: skip
ALONE = "SAC, online only"
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    ALONE: ("sac", ACTING | {"offline_share": 0.0}),
    "SAC 50/50": ("sac", ACTING),
    "MOORL, K 2, η 0.5": ("moorl", ACTING | {"inner_steps": 2}),
    "DrQ+BC, offline": ("drq_bc", COMMON),
}


# Data ----------------------------------------------------------------------------------------


def from_state() -> DMControlEnv:
    return DMControlEnv("cartpole", "swingup", action_repeat=REPEAT)


def from_pixels() -> DMControlEnv:
    return DMControlEnv("cartpole", "swingup", PIXELS, action_repeat=REPEAT, shadows=False)


def dataset() -> Dataset:
    """Filmed episodes of a policy that sees the state and draws its actions."""
    work = data_dir("pixels")
    folder = work / f"{NAME}-{PIXELS}-{FILMED}"
    if folder.exists():
        return saferl.load_dataset(folder)
    settings = {"hidden": [64, 64], "batch_size": 128, "random_steps": 500, "utd": 2.0,
                "reward_scale": 1 / REPEAT, "initial_temperature": 0.1}  # fmt: skip
    settings |= {f"{name}_lr": 1e-3 for name in ("actor", "critic", "temperature")}
    teacher = work / "teacher"
    shutil.rmtree(teacher, ignore_errors=True)
    run = saferl.train("sac", env=from_state, steps=2000, members=1, seed=77, settings=settings,
                       out=teacher, eval_interval=1000, eval_episodes=5,
                       progress=False)  # fmt: skip
    for steps in range(3000, 20_001, 1000):
        mean = float(run.evaluation.at().matrix().mean())
        print(f"from the state, {steps - 1000} steps: {mean:.0f}", file=sys.stderr, flush=True)
        if mean >= 800:
            break
        run = saferl.resume(teacher, env=from_state, steps=steps, progress=False)
    made: list[DMControlEnv] = []

    def filmed() -> DMControlEnv:
        made.append(from_pixels())
        return made[0]

    policy, random = run.policy(), MemberRandom([5], "cpu")

    def acts(frames: torch.Tensor) -> torch.Tensor:
        inner = made[0].env
        parts = inner.task.get_observation(inner.physics).values()
        state = np.concatenate([np.ravel(part) for part in parts]).astype(np.float32)
        with torch.no_grad():
            return policy.sample(torch.from_numpy(state)[None, None], random)

    data = record(filmed, FILMED, acts, seed=1)
    shutil.rmtree(work / "unfinished", ignore_errors=True)
    data.save(work / "unfinished")
    (work / "unfinished").rename(folder)
    return saferl.load_dataset(folder)


# Training ------------------------------------------------------------------------------------


def key_of(arm: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """What identifies a training, but for the data's fingerprint."""
    agent, settings = ARMS[arm]
    if agent == "drq_bc":
        settings = settings | {"noise_steps": options.steps}
    return {
        "dataset": NAME,
        "arm": arm,
        "agent": agent,
        "seed": seed,
        "steps": options.steps,
        "settings": settings,
    }


def train_one(key: dict[str, Any], episodes: int, done: list[str]) -> Result:
    """Facts of the dataset, and the finished training (None if the fingerprint is in ``done``)."""
    data, start = dataset(), time.process_time()
    facts = facts_of(data)
    if facts["fingerprint"] in done:
        return facts, None
    with tempfile.TemporaryDirectory() as folder:
        # Members share convolutions by groups, which a CPU does no faster than one by one.
        run = saferl.train(
            key["agent"], data, env=from_pixels, steps=key["steps"], members=1, seed=key["seed"],
            out=Path(folder) / "run", settings=key["settings"], engine="compile",
            eval_interval=-(-key["steps"] // EVALUATIONS), eval_episodes=5,
            checkpoint_interval=key["steps"], progress=False,
        )  # fmt: skip
        seconds = time.process_time() - start
        played = rollout(run.policy(), from_pixels, episodes, seed=EVALUATION_SEED)
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


def frame_rate(count: int = 300) -> float:
    """Agent steps per second of processor time, the environment alone."""
    env, random = from_pixels(), np.random.default_rng(0)
    env.reset(seed=0)
    times = []
    for _ in range(3):
        start = time.process_time()
        for _ in range(count // 3):
            *_, ended, _ = env.step(random.uniform(-1, 1, 1))
            if ended:
                env.reset()
        times.append((time.process_time() - start) / (count // 3))
    env.close()
    return 1 / statistics.median(times)


# Report --------------------------------------------------------------------------------------


def report(book: Book, keys: list[dict[str, Any]], out: Path) -> str:
    """Markdown of what is finished, and its plot."""
    entries = book.entries(keys)
    runs = {arm: [e["run"] for e in entries if e["arm"] == arm and e["run"]] for arm in ARMS}
    runs = {arm: own for arm, own in runs.items() if own}
    if not runs:
        return "Nothing has been trained at this scale.\n"
    content, facts = book.content, book.content["datasets"][NAME]
    steps = keys[0]["steps"]
    lines = []
    last = {arm: np.array([run["returns"] for run in own]) for arm, own in runs.items()}
    for arm, own in runs.items():
        curve = np.array([run["curve"]["returns"] for run in own])
        area = curve[:, np.array(own[0]["curve"]["steps"]) > 0].mean(1, keepdims=True)
        against = ["–", "–"]
        if arm != ALONE and ALONE in last:
            value, low, high = compare(last[arm], last[ALONE])
            against = [f"{last[arm].mean() / last[ALONE].mean():.2f}",
                       f"{span(value, (low, high), 0)}, {verdict(low, high)}"]  # fmt: skip
        one = len(own) == 1  # has no spread over seeds
        areas = f"{area.mean():.0f}" if one else span(area.mean(), bootstrap_interval(area), 0)
        rate = statistics.median(steps / run["seconds"] for run in own)
        lines.append([arm, len(own), span(last[arm].mean(), bootstrap_interval(last[arm]), 0),
                      areas, *against, f"{rate:.0f}"])  # fmt: skip
    heads = ["arm", "seeds", "final", "area", "final / online only", "final - online only",
             "agent steps/s"]  # fmt: skip
    plot(runs, out / "pixels.png")
    missing = [f"{e['arm']}, seed {e['seed']}" for e in entries if not e["run"]]
    text = (
        "# cartpole-swingup from pixels, **data generated here**\n\n"
        "![return over agent steps](pixels.png)\n\n"
        f"{steps} agent steps ({steps * REPEAT} control steps) at {PIXELS} pixels. The dataset has "
        f"{facts['transitions']} rows, mean return {facts['mean_return']:.0f}. *final*: the last "
        f"policy of each seed in {last[next(iter(last))].shape[1]} episodes; *area*: mean of the "
        "evaluations while training; 95 % intervals over seeds (and episodes).\n\n"
        + common.table(heads, lines)
        + f"\n\nRate: the environment alone, rendering once per agent step, makes "
        f"{content['env_steps_per_second']:.0f} agent steps per second of processor time "
        f"({content['env_steps_per_second'] * REPEAT:.0f} control steps); the table's rates are "
        "those of a whole run, compiled updates and evaluations included; DrQ+BC's steps are "
        "updates.\n"
        + (f"\nNot trained: {'; '.join(missing)}.\n" if missing else "")
        + f"\n`{content['command']}`, {max(r['date'] for own in runs.values() for r in own)}, "
        f"{content['machine']['cpu']}, one thread of a machine that was busy with other work.\n"
    )
    (out / "pixels.md").write_text(text)
    return text


def plot(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Return over agent steps: mean of the seeds, and each seed thin."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for number, (arm, own) in enumerate(runs.items()):
        steps = own[0]["curve"]["steps"]
        curves = np.array([run["curve"]["returns"] for run in own])
        axes.plot(steps, curves.T, lw=0.7, alpha=0.4, color=f"C{number}")
        axes.plot(steps, curves.mean(0), "o-", ms=3, color=f"C{number}", label=arm)
    axes.set_xlabel("agent steps (updates, for DrQ+BC)")
    axes.set_ylabel("return per episode")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--steps", type=int, default=9000, help="agent steps of an arm")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--episodes", type=int, default=10, help="per seed, of the last policy")
    parser.add_argument("--report", action="store_true", help="train nothing, report what there is")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder of the results")
    options = parser.parse_args()
    book = Book(options.out / "pixels.json", options.fresh)
    keys = [key_of(arm, seed, options) for arm in options.arms for seed in range(options.seeds)]
    failed = 0
    if not options.report:
        book.content["env_steps_per_second"] = frame_rate()
        failed = book.train(
            train_one, keys, (options.episodes,), 1,
            lambda key: f"seed {key['seed']}, {key['arm']}", told_of,
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
