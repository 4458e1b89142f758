"""Learning from a dataset and an environment: what the loop costs, and what each method gains.

    python benchmarks/hybrid.py speed     # the loop beside pure updates; the meta step
    python benchmarks/hybrid.py arms      # methods on Pendulum; goes on where it stopped
    python benchmarks/hybrid.py report    # Markdown of both

``speed`` counts processor time (`time.process_time`) of one thread in blocks that take turns, and
gives ratios of medians. ``arms`` trains the comparison set of docs/agents/moorl.md at the same
number of environment steps and critic steps on `Pendulum-v1`, where the dataset is 10,000
transitions of a half-trained SAC policy acting stochastically: made here, no published data. The
controls of the meta step are eta = 1 (the same blocks without it) and mixed batches with the same
slow weights.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from pathlib import Path

import common

os.environ.update(common.ONE_THREAD)

import numpy as np
import torch

import saferl
from saferl.agents.moorl import MOORL
from saferl.agents.sac import SAC
from saferl.data import Dataset
from saferl.data.buffer import ReplayBuffer
from saferl.evaluation.rollout import Slots
from saferl.registry import agent_class
from saferl.spec import Spec
from saferl.training.engine import Engine
from saferl.training.hybrid import HybridEngine

ENV = "Pendulum-v1"
SPEC = Spec(3, 1, action_low=(-2.0,), action_high=(2.0,), horizon=200)
FILE = common.RESULTS / "hybrid.json"
RATES = {"actor_lr": 1e-3, "critic_lr": 1e-3, "temperature_lr": 1e-3}
COMMON = {"hidden": [64, 64], "batch_size": 128}
DATA = 10_000


# What the loop costs ------------------------------------------------------------------------------


def speed(rounds: int, hidden: list[int], members: int) -> dict:
    """Processor time of an update in each loop, and of MOORL's iteration with its meta step."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    rows, ends = 20_000, np.arange(20_000) % 200 == 199
    data = Dataset.from_arrays(
        rng.normal(size=(rows, 3)), rng.uniform(-2, 2, (rows, 1)), rng.normal(size=rows),
        np.zeros(rows), ends, rng.normal(size=(rows, 3)), action_low=(-2.0,), action_high=(2.0,),
    )  # fmt: skip
    seeds = range(members)
    config = SAC.make_config({"hidden": hidden, "random_steps": 0, "start_steps": 0})
    buffer = ReplayBuffer.from_dataset(data, SPEC, seeds)
    pure = Engine(SAC(SPEC, config, members), buffer)
    both = HybridEngine(
        SAC(SPEC, config, members), Slots(ENV, members, None), 10**5,
        ReplayBuffer.from_dataset(data, SPEC, seeds),
    )  # fmt: skip
    moorl = MOORL(SPEC, MOORL.make_config({"hidden": hidden}), members)
    batch = buffer.sample(moorl.batch_rows)
    both.run(300)

    def meta() -> None:
        with torch.no_grad():
            torch._foreach_copy_(moorl._meta, moorl._moving)
        moorl.meta_step()

    tasks = {
        "offline": (lambda: pure.run(20), 20),
        "hybrid": (lambda: both.run(20), 20),
        "moorl": (lambda: [moorl.update(batch) for _ in range(4)], 4),
        "meta": (lambda: [meta() for _ in range(40)], 40),
    }
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for turn in range(rounds + 1):
        for name, (run, count) in tasks.items():
            start = time.process_time()
            run()
            if turn:  # the first warms up
                times[name].append((time.process_time() - start) / count)
    both.close()
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "command": common.command(),
        "when": common.now(),
        "machine": common.machine(),
        "hidden": hidden,
        "members": members,
        "rounds": rounds,
        "milliseconds": {name: 1e3 * value for name, value in medians.items()},
        "update_rate_of_offline": medians["offline"] / medians["hybrid"],
        "meta_step_of_iteration": medians["meta"] / medians["moorl"],
    }


# What each method gains ---------------------------------------------------------------------------


def arms(utd: int) -> dict[str, tuple[str, dict]]:
    """Name → agent and settings, at ``utd`` critic steps per environment step."""
    k = {"inner_steps": 5, "utd": float(utd)}
    plain, norm = {"utd": float(utd)}, {"critic_layer_norm": True}
    return {
        "SAC online only": ("sac", plain | {"offline_share": 0.0}),
        "SAC one buffer": ("sac", plain | {"share_rule": "proportional"}),
        "SAC 50/50": ("sac", plain),
        "SAC 50/50 + LayerNorm": ("sac", plain | norm),
        "blocks, K=5, no meta step (eta 1)": ("moorl", k | {"eta": 1.0}),
        "MOORL, K=5, eta 0.9": ("moorl", k | {"eta": 0.9}),
        "MOORL, K=5, eta 0.5": ("moorl", k | {"eta": 0.5}),
        "MOORL, K=5, eta 0.5 + LayerNorm": ("moorl", k | norm | {"eta": 0.5}),
        "50/50 + slow weights, K=5, eta 0.5": ("moorl", k | {"sampling": "mixed"}),
        "RLPD, same UTD": ("rlpd", {"inner_steps": utd}),
        "Cal-QL, after 2,000 offline": (
            "cal_ql", {"utd": float(utd), "offline_steps": 2000, "critic_hidden": [64, 64]},
        ),
        "IQL, after 2,000 offline": (
            "iql_finetune",
            {"utd": float(utd), "offline_steps": 2000, "value_lr": 1e-3, "actor_decay_steps": 0},
        ),
        "WSRL, from Cal-QL": ("wsrl", {"inner_steps": utd, "start_steps": 500}),
    }  # fmt: skip


def dataset(work: Path) -> Dataset:
    """Stochastic transitions of SAC's policy at the first evaluation above -700."""
    file = work / "pendulum-medium.npz"
    if not file.exists():
        settings = COMMON | RATES | {"random_steps": 500}
        folder = work / "behaviour"
        shutil.rmtree(folder, ignore_errors=True)
        run = saferl.train(
            "sac", env=ENV, steps=1000, members=1, seed=77, settings=settings, out=folder,
            eval_interval=250, eval_episodes=10, progress=False,
        )  # fmt: skip
        for steps in range(1250, 6001, 250):
            mean = float(run.evaluation.at().matrix().mean())
            print(f"behaviour after {steps - 250} steps: {mean:.0f}", flush=True)
            if mean > -700:
                break
            run = saferl.resume(folder, steps=steps, progress=False)
        from saferl.evaluation import collect_transitions

        arrays = collect_transitions(run.policy(), ENV, DATA, seed=5, stochastic=True)
        data = Dataset.from_arrays(
            **arrays, id="pendulum-medium", env_id=ENV, action_low=(-2.0,), action_high=(2.0,),
            horizon=200, origin=f"SAC after {steps - 250} steps, acting stochastically",
        )  # fmt: skip
        data.save(file)
    return saferl.load_dataset(file)


def train_arm(name: str, work: Path, steps: int, utd: int, seeds: int) -> dict:
    agent, own = arms(utd)[name]
    data, folder = dataset(work), work / agent
    shutil.rmtree(folder, ignore_errors=True)
    known = agent_class(agent).Config
    rates = {key: rate for key, rate in RATES.items() if hasattr(known, key)}
    settings = COMMON | rates | own
    options: dict = {"settings": settings, "members": seeds, "out": folder, "eval_episodes": 5}
    if "offline_steps" not in own and agent != "wsrl":
        settings["random_steps"] = 500
    total = steps + own.get("offline_steps", 0)
    options |= {"steps": total, "eval_interval": steps // 5, "log_interval": 50,
                "checkpoint_interval": total, "progress": False}  # fmt: skip
    start = time.process_time()
    if agent == "wsrl":
        first = work / "pre-training"
        shutil.rmtree(first, ignore_errors=True)
        pre = {"critic_hidden": [64, 64], "critics": 10, "actor_layer_norm": True,
               "critic_layer_norm": True, "offline_steps": 2000}  # fmt: skip
        saferl.train("cal_ql", data, settings=COMMON | rates | pre, steps=2000, members=seeds,
                     out=first, eval_interval=0, eval_episodes=1, progress=False)  # fmt: skip
        run = saferl.train(agent, env=ENV, start_from=first, **options)
    else:
        run = saferl.train(agent, data, **options)
    seconds = time.process_time() - start
    evaluated = run.evaluation
    acting = [s for s in sorted(set(evaluated.steps.tolist())) if s > total - steps]
    returns = np.array([evaluated.at(s).matrix().mean(1) for s in acting])  # [evaluations, seeds]
    import pandas as pd

    q = pd.read_csv(folder / "metrics.csv").query("step > @total - @steps").groupby("member")["q"]
    shutil.rmtree(folder)
    return {
        "agent": agent,
        "settings": own,
        "area": returns.mean(0).tolist(),
        "final": returns[-1].tolist(),
        "q_final": q.last().tolist(),
        "q_largest": q.max().tolist(),
        "seconds": seconds,
    }


def run_arms(work: Path, steps: int, utd: int, seeds: int) -> None:
    torch.set_num_threads(1)
    work.mkdir(parents=True, exist_ok=True)
    results = json.loads(FILE.read_text()) if FILE.exists() else {}
    key = {"steps": steps, "utd": utd, "seeds": seeds}
    if results.get("arms", {}).get("key") != key:
        data = dataset(work)
        results["arms"] = {
            "key": key, "command": common.command(), "machine": common.machine(), "done": {},
            "data": {"mean": float(data.episode_returns().mean()), "origin": data.card.origin,
                     "rows": len(data)},
        }  # fmt: skip
    for name in arms(utd):
        if name in results["arms"]["done"]:
            continue
        result = train_arm(name, work, steps, utd, seeds)
        results["arms"]["done"][name] = result
        results["arms"]["when"] = common.now()
        common.write_json(FILE, results)
        print(f"{name}: area {np.mean(result['area']):.0f}, final {np.mean(result['final']):.0f}",
              flush=True)  # fmt: skip


def report() -> str:
    results = json.loads(FILE.read_text())
    lines = []
    for found in results.get("speed", []):
        ms = found["milliseconds"]
        lines.append(
            f"- {found['members']} member(s), layers {found['hidden']}: an update takes "
            f"{ms['offline']:.2f} ms in the offline loop and {ms['hybrid']:.2f} ms with its "
            f"environment step, {100 * found['update_rate_of_offline']:.0f} % of the rate; a MOORL "
            f"iteration of K = 5 takes {ms['moorl']:.2f} ms, snapshot and meta step "
            f"{1e3 * ms['meta']:.0f} µs of it, {100 * found['meta_step_of_iteration']:.2f} %"
        )
    if "arms" in results:
        found = results["arms"]
        key = found["key"]
        lines += ["", f"{key['steps']} environment steps, UTD {key['utd']}, {key['seeds']} seeds; "
                  f"the data's mean return is {found['data']['mean']:.0f}.", ""]  # fmt: skip
        rows = [
            [name, *(_spread(arm[k]) for k in ("area", "final", "q_final", "q_largest")),
             f"{arm['seconds']:.0f}"]
            for name, arm in found["done"].items()
        ]  # fmt: skip
        heads = ["arm", "area (range)", "final (range)", "last Q", "largest Q", "CPU seconds"]
        lines.append(common.table(heads, rows))
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{np.mean(values):.0f} ({min(values):.0f} to {max(values):.0f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["speed", "arms", "report"])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--hidden", type=int, nargs="+", default=[256, 256])
    parser.add_argument("--members", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--steps", type=int, default=2000, help="environment steps of an arm")
    parser.add_argument("--utd", type=int, default=2, help="critic steps per environment step")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("hybrid-work"), help="scratch folder")
    options = parser.parse_args()
    if options.what == "speed":
        found = [speed(options.rounds, options.hidden, m) for m in options.members]
        results = json.loads(FILE.read_text()) if FILE.exists() else {}
        common.write_json(FILE, results | {"speed": found})
        print(report())
    elif options.what == "arms":
        run_arms(options.work, options.steps, options.utd, options.seeds)
    else:
        print(report())


if __name__ == "__main__":
    sys.exit(main())
