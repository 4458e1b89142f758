"""From pixels: does a dataset beside the environment help, and how fast does it run?

    python benchmarks/pixels.py            # a quarter of an hour of one CPU core; resumes
    python benchmarks/pixels.py --report   # Markdown

cartpole-swingup of dm_control at 32 pixels, three frames, action repeat 8 (PlaNet's for this task),
rendered without shadows. The dataset is made here, no published data: SAC learns from the state
until an evaluation reaches 800, then acts stochastically while it is filmed. Then each seed trains
SAC from pixels alone, SAC with half of every batch from that dataset, and MOORL with it, for the
same environment steps and critic steps, and DrQ+BC on the dataset alone for as many updates.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import common

os.environ.update(common.ONE_THREAD)

import numpy as np
import torch

import saferl
from saferl.data import Dataset
from saferl.envs.dmc import DMControlEnv, record
from saferl.rng import MemberRandom

PIXELS, REPEAT, EPISODES, STEPS = 32, 8, 40, 3000
FILE = common.RESULTS / "pixels.json"
COMMON = {"batch_size": 64, "hidden": [128, 128], "channels": [16, 32, 32], "strides": [2, 2, 2],
          "pad": 2, "reward_scale": 1 / REPEAT, "actor_lr": 1e-3, "critic_lr": 1e-3,
          "tau": 0.02, "discount": 0.95}  # fmt: skip
ACTING = COMMON | {"random_steps": 500, "utd": 1.0, "initial_temperature": 0.1,
                   "temperature_lr": 1e-3}  # fmt: skip
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "SAC online only": ("sac", ACTING | {"offline_share": 0.0}),
    "SAC 50/50": ("sac", ACTING),
    "DrQ+BC offline": ("drq_bc", COMMON | {"noise_steps": STEPS}),
    "MOORL, K=2, eta 0.5": ("moorl", ACTING | {"inner_steps": 2}),
}


def from_state() -> DMControlEnv:
    return DMControlEnv("cartpole", "swingup", action_repeat=REPEAT)


def from_pixels() -> DMControlEnv:
    return DMControlEnv("cartpole", "swingup", PIXELS, action_repeat=REPEAT, shadows=False)


def dataset(work: Path) -> Dataset:
    """Filmed episodes of a policy that sees the state and draws its actions."""
    folder = work / "demonstrations"
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
        print(f"from the state, {steps - 1000} steps: {mean:.0f}", flush=True)
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

    start = time.process_time()
    data = record(filmed, EPISODES, acts, seed=1)
    print(f"{len(data)} rows, mean return {data.episode_returns().mean():.0f}, "
          f"{time.process_time() - start:.0f} s", flush=True)  # fmt: skip
    data.save(work / "unfinished")
    (work / "unfinished").rename(folder)
    return data


def train(name: str, seed: int, data: Dataset, work: Path, steps: int) -> dict[str, Any]:
    agent, settings = ARMS[name]
    folder = work / f"{agent}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    start = time.process_time()
    run = saferl.train(agent, data, env=from_pixels, steps=steps, members=1, seed=seed, out=folder,
                       settings=settings, eval_interval=steps // 3, eval_episodes=5,
                       checkpoint_interval=steps, progress=False)  # fmt: skip
    evaluated = run.evaluation
    result = {
        "settings": settings,
        "steps": sorted(set(evaluated.steps.tolist())),
        "seconds": time.process_time() - start,
    }
    result["returns"] = [float(evaluated.at(s).matrix().mean()) for s in result["steps"]]
    shutil.rmtree(folder)
    return result


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


def run(work: Path, steps: int, seeds: list[int]) -> None:
    torch.set_num_threads(1)
    work.mkdir(parents=True, exist_ok=True)
    data = dataset(work)
    found = json.loads(FILE.read_text()) if FILE.exists() else {}
    if found.get("steps") != steps:
        found = {"steps": steps, "done": {}}
    returns = data.episode_returns()
    found |= {
        "command": common.command(),
        "machine": common.machine(),
        "data": {"rows": len(data), "mean": float(returns.mean()), "least": float(returns.min()),
                 "largest": float(returns.max())},
        "pixels": PIXELS,
        "action_repeat": REPEAT,
        "env_steps_per_second": frame_rate(),
    }  # fmt: skip
    arms = list(ARMS)
    for pair in (arms[:2], arms[2:]):  # what the question is about comes first
        for seed, name in itertools.product(seeds, pair):
            done = found["done"].setdefault(name, {})
            if done.get(str(seed), {}).get("settings") == ARMS[name][1]:
                continue
            done[str(seed)] = result = train(name, seed, data, work, steps)
            found["when"] = common.now()
            common.write_json(FILE, found)
            curve = " ".join(f"{value:.0f}" for value in result["returns"])
            print(f"seed {seed}, {name}: {curve}, {result['seconds']:.0f} s", flush=True)


def report() -> str:
    found = json.loads(FILE.read_text())
    steps, repeat, data = found["steps"], found["action_repeat"], found["data"]
    lines = [
        "# cartpole-swingup from pixels, **data generated here**",
        "",
        f"`{found['command']}`, {found['when']}, {found['machine']['cpu']}, one thread.",
        "",
        f"{steps} agent steps ({steps * repeat} control steps) at {found['pixels']} pixels; the "
        f"dataset has {data['rows']} rows, mean return {data['mean']:.0f} ({data['least']:.0f} to "
        f"{data['largest']:.0f}). Means over seeds, and their range; the last policy of each, 5 "
        "episodes per evaluation.",
        "",
    ]
    rows, heads = [], ["arm", "seeds"]
    for name, seeds in found["done"].items():
        if not seeds:
            continue
        curves = np.array([result["returns"] for result in seeds.values()])
        at = next(iter(seeds.values()))["steps"]
        heads[2:] = [f"{step}" for step in at]
        rates = [steps / result["seconds"] for result in seeds.values()]
        rows.append([name, len(seeds), *(_spread(column) for column in curves.T),
                     f"{statistics.median(rates):.0f}"])  # fmt: skip
    lines.append(common.table([*heads, "agent steps/s"], rows))
    last = {name: np.mean([result["returns"][-1] for result in seeds.values()])
            for name, seeds in found["done"].items() if seeds}  # fmt: skip
    alone = last["SAC online only"]
    lines += [
        "",
        "Final return over that of SAC online only: "
        + ", ".join(f"{name} {value / alone:.2f}" for name, value in last.items() if value != alone)
        + ".",
        "",
        f"Rate: the environment alone, rendering once per agent step, makes "
        f"{found['env_steps_per_second']:.0f} agent steps per second of processor time "
        f"({found['env_steps_per_second'] * repeat:.0f} control steps); the table's rates are "
        "those of a whole run, updates and evaluations included; DrQ+BC's steps are updates.",
    ]
    return "\n".join(lines)


def _spread(values: np.ndarray) -> str:
    return f"{values.mean():.0f} ({values.min():.0f} to {values.max():.0f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", action="store_true", help="print the table and stop")
    parser.add_argument("--steps", type=int, default=STEPS, help="agent steps of an arm")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path("pixels-work"), help="scratch folder")
    options = parser.parse_args()
    if not options.report:
        run(options.work, options.steps, options.seeds)
    text = report()
    FILE.with_suffix(".md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    sys.exit(main())
