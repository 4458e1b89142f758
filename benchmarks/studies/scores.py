"""Scores of BC, TD3+BC, IQL and CQL beside d3rlpy's, on the same data.

    python -m benchmarks scores
    python -m benchmarks scores --shared    # on data from the policies in ../shared/data

Both sides train on the same transitions with equal networks, batches, numbers of updates and
hyper-parameters (`workers.SETTINGS`); ours trains its seeds as members of one run, d3rlpy in an
environment of its own, one seed after the other. The policies of both then play the same episodes
in our process. docs/benchmarks/scores.md lists what remains different. None of the data are D4RL's.
"""

from __future__ import annotations

import dataclasses
import tempfile
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import data as datasets
from benchmarks import report, workers
from benchmarks.report import Series, compare, interval, span, to_score, verdict
from benchmarks.runner import play, trained
from benchmarks.store import Key, Record, Store
from benchmarks.study import NOT_D4RL, Trained, add
from saferl.evaluation.statistics import interquartile_mean

DATASETS = ("saferl/halfcheetah-velocity-medium-v0", "saferl/hopper-velocity-mixed-v0")
SHARED = ("shared/halfcheetah-ppo", "shared/hopper-trpo")
STEPS = {"bc": 50_000, "td3_bc": 50_000, "iql": 50_000, "cql": 20_000}  # and the order of work
OURS, PEER = SIDES = ("saferl", "d3rlpy")
COLOURS = {OURS: "#1f6fb2", PEER: "#9aa5b1"}
WORDS = ("above beyond the interval", "below beyond the interval", "not below")


class Scores(Trained):
    name, parallel = "scores", True

    def options(self, parser: ArgumentParser) -> None:
        add(parser, "--datasets", DATASETS)
        add(parser, "--shared", False, "../shared/data instead, if present")
        add(parser, "--agents", tuple(STEPS), choices=sorted(STEPS))
        add(parser, "--steps", None, "updates (default 50 000, CQL 20 000)", type=int)
        add(parser, "--seeds", 3)
        add(parser, "--episodes", 20, "per seed")
        add(parser, "--size", None, "transitions of each dataset (default 100 000)", type=int)
        add(parser, "--hidden", (64, 64))
        add(parser, "--batch-size", 64)
        add(parser, "--peer-python", None, "an interpreter with d3rlpy; else .venv-peers is made")

    def check(self, parser: ArgumentParser, options: Namespace) -> None:
        if options.shared:
            if not datasets.SHARED_DATA.is_dir() and not options.report:
                parser.error("../shared/data is not here: run without --shared")
            options.datasets = list(SHARED)
        if not options.report:  # made once, before several trainings ask for it
            options.peer_python = workers.peer_python(options.peer_python)

    def file(self, options: Namespace) -> Path:
        return options.out / f"scores{'_shared' if options.shared else ''}.json"

    def header(self, options: Namespace) -> dict[str, Any]:
        found = super().header(options)
        with peer(options) as worker:
            found["versions"] = {"ours": found["versions"], "peer": worker("versions")}
        return found | {"note": NOT_D4RL}

    def keys(self, options: Namespace) -> list[Key]:
        """Agent by agent: an early stop leaves whole comparisons. Our members train together."""
        found = []
        for agent in options.agents:
            for side in SIDES:
                for dataset in options.datasets:
                    key = {
                        "dataset": dataset,
                        "agent": agent,
                        "implementation": side,
                        "steps": options.steps or STEPS[agent],
                        "hidden": options.hidden,
                        "batch_size": options.batch_size,
                    }
                    seeds = [{"seed": seed} for seed in range(options.seeds)]
                    found += [key | own for own in (seeds if side == PEER else
                                                    [{"members": options.seeds}])]  # fmt: skip
        return found

    def dataset(self, key: Key, options: Namespace) -> Any:
        return datasets.dataset_of(key["dataset"], options.size)

    def train(self, key: Key, data: Any, options: Namespace) -> Record:
        settings = workers.settings_of(key["agent"], key["hidden"])
        settings |= {"batch_size": key["batch_size"]}
        side = train_peer if key["implementation"] == PEER else train_ours
        policy, seconds = side(key, data, settings, options)
        return {"seconds": seconds, **play(policy, data.card.env_id, options.episodes, 3)}

    def label(self, key: Key) -> str:
        seed = f" seed {key['seed']}" if "seed" in key else ""
        return f"{key['dataset']} {key['agent']} {key['implementation']}{seed}"

    def results(self, store: Store, entries: list[dict[str, Any]], path: Path) -> str:
        rows = summaries(entries, store.datasets)
        store.content |= {"rows": rows}
        draw(rows, path.with_suffix(".png"))
        below = sum(row["difference_interval"][1] < 0 for row in rows)
        return markdown(rows, store.datasets) + (
            f"\nNot below d3rlpy beyond the interval: {len(rows) - below} of {len(rows)}.\n\n"
            f"`{store.content['command']}`, {store.content['date']}.\n"
        )


STUDY = Scores()


# Training ----------------------------------------------------------------------------------------


def train_ours(key: Key, data: Any, settings: dict[str, Any], _: Namespace) -> tuple[Any, float]:
    """The policy of all seeds, and seconds per seed."""
    from saferl.registry import agent_class

    # Every field is given, so that no published value of configs/ comes in between.
    full = dataclasses.asdict(agent_class(key["agent"]).Config()) | settings
    with trained(key | {"settings": full}, data, steps=key["steps"], device="cpu",
                 eval_interval=key["steps"], eval_episodes=1) as run:  # fmt: skip
        return run.policy, run.seconds / key["members"]


def peer(options: Namespace) -> workers.Worker:
    return workers.Worker(options.peer_python, "speed.peer")


def train_peer(
    key: Key, data: Any, settings: dict[str, Any], options: Namespace
) -> tuple[Any, float]:
    """The policy of one of d3rlpy's seeds, and its seconds of training."""
    import warnings

    import torch

    from saferl.agents.shared.agent import AgentConfig

    scaled = settings.get("normalize_rewards", False)
    scale = data.spec(dataclasses.replace(AgentConfig(), normalize_rewards=scaled)).reward_scale
    names = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")
    with tempfile.TemporaryDirectory() as folder, peer(options) as worker:
        rows, policy = f"{folder}/data.npz", f"{folder}/policy.pt"
        np.savez(rows, **{name: getattr(data, name) for name in names})
        found = worker("train", agent=key["agent"], data=rows, policy=policy, steps=key["steps"],
                       seed=key["seed"], reward_scale=float(scale), settings=settings)  # fmt: skip
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            script = torch.jit.load(policy)
    return lambda observations: script(observations[0])[None], found["seconds"]


# Report ------------------------------------------------------------------------------------------


def summaries(entries: Sequence[dict[str, Any]], facts: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per dataset and agent for which both sides have all seeds."""
    parts: dict[tuple[str, str], dict[str, list[Any]]] = {}
    for entry in entries:
        of = parts.setdefault((entry["dataset"], entry["agent"]), {side: [] for side in SIDES})
        of[entry["implementation"]].append(entry["run"])
    rows = []
    for dataset in facts:
        for agent in STEPS:
            sides = parts.get((dataset, agent), {OURS: [None]})
            if not all(run for runs in sides.values() for run in runs):
                continue
            row: dict[str, Any] = {"dataset": dataset, "agent": agent}
            arrays = {}
            for side, runs in sides.items():
                returns = arrays[side] = np.concatenate([run["returns"] for run in runs])
                costs = [run["costs"] for run in runs]
                row |= {"steps": runs[0]["steps"], "seeds": len(returns),
                        "episodes": returns.shape[1]}  # fmt: skip
                row[side] = {
                    "mean": float(returns.mean()),
                    "mean_interval": interval(returns),
                    "iqm": float(interquartile_mean(returns.reshape(-1))),
                    "iqm_interval": interval(returns, interquartile_mean),
                    "score": float(to_score(returns, facts[dataset]["reference_returns"]).mean()),
                    "cost": float(np.mean(costs)) if costs[0] else None,
                    "seed_means": returns.mean(1).tolist(),
                    "seconds": float(np.mean([run["seconds"] for run in runs])),
                }
            difference, *ends = compare(arrays[OURS], arrays[PEER])
            row |= {"difference": difference, "difference_interval": ends,
                    "verdict": verdict(*ends, WORDS)}  # fmt: skip
            rows.append(row)
    return rows


def markdown(rows: Sequence[dict[str, Any]], facts: dict[str, Any]) -> str:
    parts = []
    for name, data in facts.items():
        chosen = [row for row in rows if row["dataset"] == name]
        if not chosen:
            continue
        cost = "" if data["mean_cost"] is None else f", mean cost {data['mean_cost']:.0f}"
        parts.append(
            f"### {name}\n\n{data['transitions']} transitions, {data['episodes']} episodes, "
            f"mean return {data['mean_return']:.0f}, best {data['best_return']:.0f}{cost}; "
            f"fingerprint {data['fingerprint'][:12]}. {NOT_D4RL}\n"
        )
        body = [
            [
                row["agent"],
                side,
                span(row[side]["mean"], row[side]["mean_interval"], 0),
                span(row[side]["iqm"], row[side]["iqm_interval"], 0),
                f"{row[side]['score']:.1f}",
                "–" if row[side]["cost"] is None else f"{row[side]['cost']:.1f}",
            ]
            for row in chosen
            for side in SIDES
        ]
        heads = ["agent", "library", "mean return", "IQM of returns", "score", "cost / episode"]
        parts.append(report.table(heads, body) + "\n")
        parts.append(report.bullets(
            "{agent}: saferl − d3rlpy {0}: **{verdict}** ({steps} updates, {seeds} seeds, "
            "{episodes} episodes each)".format(
                span(row["difference"], row["difference_interval"], 0), **row
            )
            for row in chosen
        ))  # fmt: skip
    return "\n".join(parts)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Mean returns of both sides with their intervals, a panel per dataset."""
    panels = {}
    for name in dict.fromkeys(row["dataset"] for row in rows):
        chosen = [row for row in rows if row["dataset"] == name]
        panels[name] = [
            Series(
                side, np.arange(len(chosen)) + offset, [row[side]["mean"] for row in chosen],
                COLOURS[side], "o", y_ends=np.array([r[side]["mean_interval"] for r in chosen]).T,
            )
            for side, offset in zip(SIDES, (-0.13, 0.13))
        ]  # fmt: skip

    def agents(name: str, axes: Any) -> None:
        names = [row["agent"] for row in rows if row["dataset"] == name]
        axes.set_xticks(range(len(names)), names)

    report.plot(
        panels, path, y="return per episode", each=agents,
        title="Mean and 95 % interval over seeds and episodes. Not D4RL's data.",
    )  # fmt: skip
