"""Do agents keep a cost limit? Velocity tasks at limits 20, 40 and 80 per episode.

    python benchmarks/limits.py                 # small networks, for a CPU: hours
    python benchmarks/limits.py --report        # the report of what there is, no training

A training is one dataset and one agent with all its members: five seeds, at each limit where the
agent is trained for one. Each is added to results/limits.json when it ends; a rerun does those that
are missing (``--fresh`` starts over). The last policy of each member plays episodes from the same
initial states. docs/benchmarks/limits.md says what is compared. The data are saferl's own.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common
import limits_report
import numpy as np
from book import Book, Result, last_metrics, narrowed, parse
from scores import EVALUATION_SEED, facts_of

LIMITS = (20.0, 40.0, 80.0)
DATASETS = tuple(f"saferl/{r}-velocity-mixed-v0" for r in ("hopper", "halfcheetah", "walker2d"))
FOR_EACH_LIMIT = {"cost_limit": list(LIMITS)}
# By training: the agent and what is set besides its published values and the scale.
TRAININGS: dict[str, tuple[str, dict[str, Any]]] = {
    "bc_safe": ("bc_safe", {}),
    "caps": ("caps", {}),
    "bc": ("bc", {"lr": 1e-3}),  # as BC-Safe has it
    "td3_bc": ("td3_bc", {}),
    "a2pr": ("a2pr", {}),
    "coptidice": ("coptidice", FOR_EACH_LIMIT),
    "a2pr_limited": ("a2pr", FOR_EACH_LIMIT),
    "cpq": ("cpq", FOR_EACH_LIMIT),
    "bcq_lag": ("bcq_lag", FOR_EACH_LIMIT),
    # Cheap to ask: nearly all of the time goes into neighbours.
    "ogsrl": ("ogsrl", FOR_EACH_LIMIT | {"guardian": "gmm", "model_options": "rows=10000"}),
}
EXPENSIVE = ("coptidice", "a2pr_limited", "cpq", "bcq_lag", "ogsrl")
PLAYING = {"ogsrl": 0.01}  # updates that play episodes in a model: so many instead of one
CLONING = ("bc", "bc_safe")
# What a target of rate τ learns of costs with discount γ takes 1 / (τ (1 - γ)) updates to arrive,
# 20 000 at the published τ. Runs that short in comparison are given faster rates, all alike.
RATES = {"tau": 0.005, "multiplier_lr": 1e-3, "alpha_lr": 1e-4}
# Of what keeps a limit BC-Safe clones all, or the best tenth; members go in this order.
MEMBERS = {"bc_safe": {"best_fraction": [1.0, 0.1], "cost_limit": list(LIMITS)}}
RESERVE = 0.5  # of the limit, kept back by the shield for what stopping costs

Played = dict[str, dict[str, Any]]  # by limit, "any" where there is none: an array per quantity


def settings_of(training: str, dataset: str, options: argparse.Namespace) -> dict[str, Any]:
    """Published values, the scale, what all have alike, and what the training varies."""
    from saferl.registry import agent_class
    from saferl.training.configs import published

    agent, own = TRAININGS[training]
    settings = published(agent, dataset) | narrowed(agent, options.hidden)
    settings["normalize_observations"] = True
    if training not in PLAYING:
        cloning = agent in CLONING
        settings["batch_size"] = options.clone_batch_size if cloning else options.batch_size
    fields = {field.name for field in dataclasses.fields(agent_class(agent).Config)}
    if "tau" in fields:
        settings |= {name: options.faster * rate for name, rate in RATES.items() if name in fields}
    if agent == "caps":
        settings["actor_decay_steps"] = options.updates
    return settings | own


def order(trainings: list[str], datasets: list[str]) -> list[tuple[str, str]]:
    """Cheap trainings on all data, then all others, data by data."""
    cheap = [(t, d) for t in trainings if t not in EXPENSIVE for d in datasets]
    return cheap + [(t, d) for d in datasets for t in trainings if t in EXPENSIVE]


def key_of(training: str, dataset: str, options: argparse.Namespace) -> dict[str, Any]:
    """What identifies a training, but for the data's fingerprint."""
    return {
        "dataset": dataset,
        "training": training,
        "agent": TRAININGS[training][0],
        "updates": max(1, round(options.updates * PLAYING.get(training, 1))),
        "members": options.members,
        "size": options.size,
        "settings": settings_of(training, dataset, options),
    }


def train_one(key: dict[str, Any], episodes: int, device: str, done: list[str]) -> Result:
    """Facts of the dataset, and the finished training (None if the fingerprint is in ``done``)."""
    import saferl
    from saferl.training.run import RunFolder

    options = {"size": key["size"]} if key["size"] else {}
    data, start = saferl.load_dataset(key["dataset"], **options), time.perf_counter()
    cost = data.episode_costs()
    facts = facts_of(data) | {
        "mean_cost": float(cost.mean()),
        "within": {f"{limit:g}": float((cost <= limit).mean()) for limit in LIMITS},
    }
    if facts["fingerprint"] in done:
        return facts, None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        saferl.train(
            key["agent"],
            data,
            steps=key["updates"],
            members=key["members"],
            settings=key["settings"] | MEMBERS.get(key["training"], {}),
            out=path,
            device=device,
            eval_interval=0,
            eval_episodes=1,
            progress=False,
        )
        agent, plan = saferl.load_agent(path, device=device), RunFolder(path).config()
        metrics = last_metrics(path / "metrics.csv")
    trained = time.perf_counter()
    played = dict(play(key, agent, data.card.env_id, episodes))
    return facts, key | {
        "fingerprint": facts["fingerprint"],
        "names": plan["members"],
        "config": plan["agent_config"],
        "played": played,
        "metrics": metrics,
        "seconds": {
            "training": round(trained - start, 1),
            "evaluation": round(time.perf_counter() - trained, 1),
        },
        "date": common.now(),
    }


def play(key: dict[str, Any], agent: Any, env: str, episodes: int) -> Iterator[tuple[str, Played]]:
    """Each row of the report that the training yields, with what its policies reached."""
    from saferl.evaluation import rollout
    from saferl.safety import Shield

    def run(policy: Any) -> dict[str, np.ndarray]:
        played = rollout(policy, env, episodes, seed=EVALUATION_SEED)
        costs = np.zeros_like(played.returns) if played.costs is None else played.costs
        return {"returns": played.returns, "costs": costs, "lengths": played.lengths}

    def each(policy_of: Callable[[int], Any]) -> dict[str, np.ndarray]:
        """Policies of one member, seed by seed."""
        parts = [run(policy_of(seed)) for seed in range(seeds)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def by_limit(played: dict[str, np.ndarray], first: int = 0) -> Played:
        """Members from number ``first`` on go limit by limit, within one by seed."""
        rows = [slice(first + i * seeds, first + (i + 1) * seeds) for i in range(len(LIMITS))]
        return told({limit: {k: v[part] for k, v in played.items()}
                     for limit, part in zip(LIMITS, rows)})  # fmt: skip

    training, policy, seeds = key["training"], agent.policy(), key["members"]
    if training == "caps":
        from saferl.agents.caps import tracked

        def spending(limit: float, seed: int) -> Shield:
            return tracked(policy.member(seed), limit)

        yield training, told({limit: run(agent.policy_for(limit)) for limit in LIMITS})
        yield (
            "caps_tracked",
            told({limit: each(functools.partial(spending, limit)) for limit in LIMITS}),
        )
    elif training == "bc_safe":
        played, best = run(policy), len(LIMITS) * seeds
        yield training, by_limit(played)
        yield "bc_safe_best", by_limit(played, best)

        def guarded(first: int, limit: float, seed: int) -> Shield:
            return Shield(
                policy.member(best + first + seed),
                fallback=policy.member(first + seed),
                cost_limit=limit,
                reserve=RESERVE * limit,
            )

        yield (
            "bc_safe_best_shield",
            told({limit: each(functools.partial(guarded, i * seeds, limit))
                  for i, limit in enumerate(LIMITS)}),
        )  # fmt: skip
    elif "cost_limit" in key["settings"]:
        yield training, by_limit(run(policy))
    else:
        yield training, told({None: run(policy)})


def told(played: dict[float | None, dict[str, np.ndarray]]) -> Played:
    """Arrays ``[seeds, episodes]`` by limit, for JSON."""
    return {
        "any" if limit is None else f"{limit:g}": {
            name: np.round(values, 1).tolist() for name, values in part.items()
        }
        for limit, part in played.items()
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--datasets", nargs="+", default=list(DATASETS))
    parser.add_argument("--trainings", nargs="+", choices=TRAININGS, default=list(TRAININGS))
    parser.add_argument("--updates", type=int, default=10_000)
    parser.add_argument("--members", type=int, default=5, help="seeds, trained side by side")
    parser.add_argument("--episodes", type=int, default=20, help="per member, of the last policy")
    parser.add_argument("--size", type=int, help="transitions of each dataset (default 100 000)")
    parser.add_argument("--hidden", type=int, default=64, help="units per layer; 0: as published")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--clone-batch-size", type=int, default=256, help="of BC and BC-Safe")
    parser.add_argument("--faster", type=float, default=4.0, help="factor of the rates of targets")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or auto")
    options = parse(parser, arguments, jobs=True)
    book = Book(options.out / "limits.json", options.fresh)
    keys = [key_of(*task, options) for task in order(options.trainings, options.datasets)]
    failed = 0
    if not options.report:
        failed = book.train(
            train_one, keys, (options.episodes, options.device), options.jobs,
            lambda key: f"{key['dataset']} {key['training']}", told_of,
        )  # fmt: skip
    text = limits_report.write(book, book.entries(keys), LIMITS, options.out)
    if not options.report:  # which may look at the file of a run that is still writing it
        book.save()
    print(text, end="")
    return 1 if failed else 0


def told_of(run: dict[str, Any]) -> str:
    """A line for the terminal."""
    rows = [
        f"{row}@{limit} {np.mean(part['returns']):.0f}/{np.mean(part['costs']):.0f}"
        for row, played in run["played"].items()
        for limit, part in played.items()
    ]
    return f"return/cost {', '.join(rows)} ({sum(run['seconds'].values()):.0f} s)"


if __name__ == "__main__":
    sys.exit(main())
