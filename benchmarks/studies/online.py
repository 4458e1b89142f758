"""Offline data and an environment together: what each method gains, and what the loop costs.

    python benchmarks/hybrid.py             # every task and method, small networks: hours
    python benchmarks/hybrid.py --report    # the report of what there is, no training
    python benchmarks/hybrid.py speed       # the loop beside pure updates; the meta step

A training is one task and one method with all its seeds. Each is added to results/hybrid.json when
it ends; a rerun does those that are missing (``--fresh`` starts over). docs/benchmarks/hybrid.md
says what is compared. No data are published ones: cartpole's are made here, the others saferl's.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import common

os.environ.update(common.ONE_THREAD)

import hybrid_report
import hybrid_tasks
import numpy as np
from book import Book, Result, parse
from hybrid_tasks import METHODS, TASKS
from scores import EVALUATION_SEED, facts_of

PROBES = 512  # logged states at which Q(s, π(s)) is followed
CURVE_EPISODES = 2


def key_of(task: str, method: str, options: argparse.Namespace) -> dict[str, Any]:
    """What identifies a training, but for the data's fingerprint."""
    facts, how = TASKS[task], METHODS[method]
    settings = hybrid_tasks.settings_of(facts, how)
    if options.hidden:
        settings |= {k: [options.hidden] for k in ("hidden", "critic_hidden") if k in settings}
    return {
        "task": task,
        "method": method,
        "dataset": facts.data,
        "agent": how.agent,
        "steps": options.steps or facts.steps,
        "members": options.members,
        "size": options.size,
        "guard": how.guard,
        "settings": settings,
    }


def train_one(key: dict[str, Any], episodes: int, done: list[str]) -> Result:
    """Facts of the dataset, and the finished training (None if the fingerprint is in ``done``)."""
    import saferl
    from saferl.evaluation import rollout
    from saferl.training.run import RunFolder

    task, data = TASKS[key["task"]], hybrid_tasks.dataset_of(key["dataset"], key["size"])
    facts = facts_of(data)
    if data.costs is not None:
        facts["mean_cost"] = float(data.episode_costs().mean())
    if facts["fingerprint"] in done:
        return facts, None
    settings, env = key["settings"], hybrid_tasks.environment(task.env)
    first = settings.get("offline_steps", 0)
    every, total = key["steps"] // task.evaluations, first + key["steps"]
    options = {"settings": settings, "members": key["members"], "progress": False}
    start, seconds = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        source: dict[str, Any] = {"dataset": data}
        if key["agent"] == "wsrl":
            before = Path(folder) / "before"
            pretrain(data, key, before, task)
            source = {"start_from": before}
        run = saferl.train(
            key["agent"], env=env, steps=total, out=Path(folder) / "run", eval_interval=every,
            keep_checkpoints=total // every + 1, eval_episodes=min(CURVE_EPISODES, episodes),
            log_interval=max(1, every // 20),
            guard=hybrid_tasks.guard if key["guard"] else None, **source, **options,
        )  # fmt: skip
        seconds = time.process_time() - seconds
        steps = [int(s) for s in np.unique(run.evaluation.steps)]
        curve = [np.round(run.evaluation.at(s).matrix().mean(1), 1).tolist() for s in steps]
        probes = [probe_values(saferl.load_agent(run.path, s), data) for s in steps]
        played = {"bare": rollout(run.policy(), env, episodes, seed=EVALUATION_SEED)}
        if key["guard"]:
            played["guarded"] = guarded(run.policy(), env, episodes)
        logged = metrics_of(run.path / "metrics.csv", first)
        plan = RunFolder(run.path).config()
        shutil.rmtree(run.path)
    config = run.agent.config
    counts = updates_of(run.agent, task, key)
    costs = hybrid_tasks.passes(key["agent"], config)
    return facts, key | {
        "fingerprint": facts["fingerprint"],
        "names": plan["members"],
        "config": plan["agent_config"],
        "played": {
            name: {
                "returns": np.round(p.returns, 2).tolist(),
                "costs": None if p.costs is None else np.round(p.costs, 2).tolist(),
                "lengths": np.asarray(p.lengths).tolist(),
            }
            for name, p in played.items()
        },
        "curve": {"steps": [s - first for s in steps], "returns": curve},
        "probe": {
            "mean": [np.round(mean, 3).tolist() for mean, _ in probes],
            "largest": [np.round(largest, 3).tolist() for _, largest in probes],
        },
        "metrics": logged,
        "updates": counts,
        "passes": counts["critic"] * costs["critic"] + counts["actor"] * costs["actor"],
        "seconds": {
            "cpu": round(seconds, 1), "wall": round(time.perf_counter() - start, 1),
        },
        "date": common.now(),
    }  # fmt: skip


def pretrain(data: Any, key: dict[str, Any], out: Path, task: Any) -> None:
    """Cal-QL on the data alone, as WSRL begins."""
    import saferl

    method = hybrid_tasks.Method("", "cal_ql", hybrid_tasks.BEFORE_WSRL)
    settings = hybrid_tasks.settings_of(task, method)
    sizes = key["settings"]["hidden"]
    settings |= {"hidden": sizes, "critic_hidden": sizes}
    saferl.train(
        "cal_ql", data, env=hybrid_tasks.environment(task.env), steps=settings["offline_steps"],
        settings=settings, members=key["members"], out=out, eval_interval=0, eval_episodes=1,
        progress=False,
    )  # fmt: skip


def probe_values(agent: Any, data: Any) -> tuple[np.ndarray, np.ndarray]:
    """Mean and largest of Q(s, π(s)) ``[M]`` over fixed logged states; Q: mean of the ensemble."""
    import torch

    rows = np.random.default_rng(0).integers(len(data), size=PROBES)
    observations = torch.from_numpy(agent.spec.observations(data.observations[np.sort(rows)]))
    observations = observations.expand(agent.members, -1, -1)
    with torch.no_grad():
        q = agent.critic(observations, agent.actor.mode(observations)).mean(1)
    return q.mean(1).double().numpy(), q.amax(1).double().numpy()


def guarded(policy: Any, env: Any, episodes: int) -> Any:
    """Episodes of each member under the guard that stood between it and the environment."""
    from types import SimpleNamespace

    from saferl.evaluation import rollout

    parts = [
        rollout(hybrid_tasks.guard(policy.member(m)), env, episodes, seed=EVALUATION_SEED)
        for m in range(policy.members)
    ]
    return SimpleNamespace(
        **{name: np.concatenate([np.asarray(getattr(p, name)) for p in parts])
           for name in ("returns", "costs", "lengths")}
    )  # fmt: skip


def metrics_of(path: Path, first: int) -> dict[str, Any]:
    """From metrics.csv while acting: largest mean Q of a batch, and what exploring cost.

    ``first``: step after which the members act. Each ``[M]``; the cost also as a curve.
    """
    series: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if int(row["step"]) > first:
                for name in ("q", "exploration_cost", "multiplier", "guard_changed", "step"):
                    if row.get(name):
                        series[name][int(row["member"])].append(float(row[name]))
    found: dict[str, Any] = {}
    values = {name: [own[m] for m in sorted(own)] for name, own in series.items()}
    if "q" in values:
        found |= {
            "q_largest": [max(v) for v in values["q"]],
            "q_last": [v[-1] for v in values["q"]],
        }
    for name in ("multiplier", "guard_changed"):
        if name in values:
            found[name] = [float(np.mean(v[-max(1, len(v) // 10) :])) for v in values[name]]
    if "exploration_cost" in values:
        found["exploration_cost"] = [v[-1] for v in values["exploration_cost"]]
        found["spent"] = {
            "steps": [s - first for s in values["step"][0]],
            "cost": np.mean(values["exploration_cost"], 0).tolist(),
        }
    return found


def updates_of(agent: Any, task: Any, key: dict[str, Any]) -> dict[str, int]:
    """Gradient steps of critics and of the policy, pre-training included."""
    c, n = agent.config, agent.updates
    k = c.critic_steps
    counts = {
        "critic": n * k,
        "actor": n * (k if getattr(c, "actor_steps", "each") == "each" else 1),
    }
    if key["agent"] == "wsrl":
        counts = {name: count + task.pretraining for name, count in counts.items()}
    return counts


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", choices=["arms", "speed"], default="arms")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS)
    parser.add_argument("--members", type=int, help="seeds, side by side (5; speed: 1 and 3)")
    parser.add_argument("--steps", type=int, help="environment steps, instead of each task's")
    parser.add_argument("--episodes", type=int, default=5, help="per seed, of the last policy")
    parser.add_argument("--size", type=int, help="transitions of each dataset")
    parser.add_argument("--hidden", type=int, help="one layer of so many units, for a try")
    parser.add_argument("--rounds", type=int, default=60, help="of speed")
    options = parse(parser, arguments)
    if options.what == "speed":
        import hybrid_speed

        counts = [options.members] if options.members else [1, 3]
        found = [hybrid_speed.speed(options.rounds, [256, 256], m) for m in counts]
        found.append(hybrid_speed.speed(options.rounds, [64, 64], 1))
        common.write_json(options.out / "hybrid_speed.json", {"speed": found})
        print("\n".join(map(hybrid_speed.told, found)))
        return 0
    options.members = options.members or 5
    book = Book(options.out / "hybrid.json", options.fresh)
    pairs = hybrid_tasks.schedule(options.tasks, options.methods)
    keys, failed = [key_of(*pair, options) for pair in pairs], 0
    if not options.report:
        failed = book.train(
            train_one, keys, (options.episodes,), 1,
            lambda key: f"{key['task']}: {key['method']}", told_of,
        )  # fmt: skip
    text = hybrid_report.write(book, book.entries(keys), options.out)
    if not options.report:  # which may look at the file of a run that is still writing it
        book.save()
    print(text, end="")
    return 1 if failed else 0


def told_of(run: dict[str, Any]) -> str:
    """A line for the terminal."""
    curve = ", ".join(f"{np.mean(row):.0f}" for row in run["curve"]["returns"])
    means = ", ".join(f"{np.mean(row):.0f}" for row in run["played"]["bare"]["returns"])
    return f"{curve}; last policies {means} ({run['seconds']['cpu']:.0f} s)"


if __name__ == "__main__":
    sys.exit(main())
