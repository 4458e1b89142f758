"""A2PR beside TD3+BC, IQL, CQL and BC on medium, mixed and mixture datasets.

    python benchmarks/evidence.py                 # small networks, for a CPU: hours
    python benchmarks/evidence.py --full          # the published scale, for a GPU
    python benchmarks/evidence.py --report        # the report of what there is, no training

A training is one dataset and one agent, all members at once. Each is added to
results/evidence.json when it ends; a rerun skips what is there (``--fresh`` starts over). The last
policy of each member plays episodes from the same initial states. docs/benchmarks/evidence.md says
what is compared and at which scale. None of the data are D4RL's.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import os
import sys
import tempfile
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import common
import evidence_report
import numpy as np
from book import Book, last_metrics, narrowed, parse
from scores import EVALUATION_SEED, SHARED_DATA, SharedPolicy, facts_of, rolled_out_card
from scores_report import NOT_D4RL

AGENTS = ("a2pr", "td3_bc", "bc", "iql", "cql")
TIERS = (("a2pr", "td3_bc", "bc"), ("iql",), ("cql",))  # order of work: the main question first
MIXTURES = {
    robot: [f"saferl/{robot}-expert-random-{percent}-v0" for percent in (1, 5, 10, 25, 50)]
    for robot in ("halfcheetah", "hopper", "walker2d")
}
# One-at-a-time variations of A2PR, trained side by side; each list has the value in use.
SENSITIVITY: dict[str, dict[str, list[float]]] = {
    "saferl/halfcheetah-velocity-medium-v0": {"alpha": [1.0, 2.5, 10.0, 40.0]},
    "saferl/hopper-velocity-medium-v0": {"mask": [0.4, 1.0, 2.0, 5.0]},
    "saferl/halfcheetah-expert-random-10-v0": {
        "alpha": [1.0, 2.5, 10.0, 40.0],
        "mask": [0.5, 1.5, 5.0, 15.0],
        "vae_weight": [0.5, 1.0, 1.5, 3.0],
    },
}
# Rolled out in equal shares from policies of ../shared/data, each with its own action noise: files
# of rl_trained_agents, or iterations of the training runs of openai_imitation.
SHARED: dict[str, tuple[str, list[tuple[str, int | None]]]] = {
    "shared/halfcheetah-medium": ("halfcheetah", [("ppo_HalfCheetah-v3.npz", None)]),
    "shared/hopper-medium": ("hopper", [("ppo_Hopper-v3.npz", None)]),
    "shared/walker2d-medium": ("walker2d", [("log_Walker2d-v1_1.h5", 60)]),
} | {
    f"shared/{robot}-medium-replay": (robot, [(file, i) for i in range(0, 101, 20)])
    for robot, file in (
        ("halfcheetah", "log_HalfCheetah-v1_2.h5"),
        ("hopper", "log_Hopper-v1_4.h5"),
        ("walker2d", "log_Walker2d-v1_1.h5"),
    )
}
GROUPS = (  # order of work
    MIXTURES["halfcheetah"],
    [f"saferl/{r}-velocity-{k}-v0" for k in ("mixed", "medium") for r in ("halfcheetah", "hopper")],
    [f"saferl/walker2d-velocity-{k}-v0" for k in ("mixed", "medium")],
    [*SHARED],
    MIXTURES["hopper"],
    MIXTURES["walker2d"],
)
SCALES = {  # by --full
    False: {"updates": 100_000, "hidden": 64, "batch_size": 64, "cql_samples": 4, "device": "cpu"},
    True: {"updates": 1_000_000, "hidden": 0, "batch_size": 256, "cql_samples": 10,
           "device": "auto"},
}  # fmt: skip
CURVE_POINTS, CURVE_EPISODES = 10, 5


# Data ----------------------------------------------------------------------------------------


class Snapshot(SharedPolicy):
    """One iteration of a training run of openai_imitation, in the form of its parent."""

    def __init__(self, path: Path, iteration: int):
        import h5py
        import torch

        with h5py.File(path) as file:
            group = file[f"snapshots/iter{iteration:07d}/GaussianPolicy"]

            def read(name: str) -> torch.Tensor:
                return torch.from_numpy(group[name][()]).float()

            layers = (*(f"hidden/FeedforwardNet/layer_{i}" for i in (0, 2)), "out")
            self.layers = [
                (read(f"{layer}/AffineLayer/W"), read(f"{layer}/AffineLayer/b")[0])
                for layer in layers
            ]
            mean = group["obsnorm/Standardizer/mean_1_D"][()]
            variance = group["obsnorm/Standardizer/meansq_1_D"][()] - mean**2
            self.mean = torch.from_numpy(mean).float()
            self.std = torch.from_numpy(np.sqrt(np.maximum(variance, 0)) + 1e-6).float()
            self.std_of_action = read("logstdevs_1_Da").exp()
        self.activation, self.clip = torch.tanh, float("inf")


def rolled_out(name: str, size: int | None) -> Any:
    """A dataset of `SHARED`, from a cache beside the bundled ones."""
    from saferl.data import Dataset, load_dataset
    from saferl.data.files import data_dir
    from saferl.envs.bundled import ROBOTS
    from saferl.evaluation import collect_transitions

    kind, parts = SHARED[name]
    robot, size = ROBOTS[kind], size or 100_000
    folders = {file: "openai_imitation" if i is not None else "rl_trained_agents"
               for file, i in parts}  # fmt: skip
    paths = {file: SHARED_DATA.parent / folder / file for file, folder in folders.items()}
    digest = hashlib.sha256(repr((parts, size)).encode())
    for path in paths.values():
        digest.update(path.read_bytes())
    cached = data_dir("evidence") / f"{name.split('/')[1]}-{digest.hexdigest()[:16]}.npz"
    if cached.exists():
        return load_dataset(cached)
    runs = []
    for number, (file, iteration) in enumerate(parts):
        path = paths[file]
        policy = SharedPolicy(path) if iteration is None else Snapshot(path, iteration)
        steps = size * (number + 1) // len(parts) - size * number // len(parts)
        runs.append(
            collect_transitions(policy, robot.env_id, steps, 1000 * number, stochastic=True)
        )
    origin = f"rolled out by saferl from the policies of {', '.join(paths)}; not D4RL's"
    card = rolled_out_card(name, robot, origin)
    arrays = {field: np.concatenate([run[field] for run in runs]) for field in Dataset.FIELDS}
    cached.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_arrays(**arrays, card=card).save(cached)
    return load_dataset(cached)  # what a rerun reads, to the bit


@functools.lru_cache(maxsize=2)
def dataset_of(name: str, size: int | None) -> Any:
    import saferl

    if name in SHARED:
        return rolled_out(name, size)
    return saferl.load_dataset(name, **({"size": size} if size else {}))


# One training --------------------------------------------------------------------------------


def published_values(agent: str, dataset: str) -> dict[str, Any]:
    """What configs/ has for the dataset, or for the D4RL dataset that it is most like.

    Rollouts of ../shared/data take the values of the D4RL dataset whose name they bear. Where
    configs/ has no value for one of ours, those of the robot's locomotion data hold, if any.
    """
    from saferl.training.configs import published

    robot = dataset.split("/")[-1].split("-")[0]
    if dataset in SHARED:
        return published(agent, f"d4rl/{dataset.split('/')[1]}-v2")
    return published(agent, dataset) or published(agent, f"d4rl/{robot}-random-v2")


def settings_of(agent: str, dataset: str, options: argparse.Namespace) -> dict[str, Any]:
    """Published values, then the scale: widths, batch, CQL's N, and IQL's decay to the end."""
    settings = published_values(agent, dataset) | {"batch_size": options.batch_size}
    settings |= narrowed(agent, options.hidden)
    if agent == "cql":
        settings["samples"] = options.cql_samples
    if agent == "iql":
        settings["actor_decay_steps"] = options.updates
    return settings


def key_of(task: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """What identifies a training, but for the data's fingerprint."""
    settings = settings_of(task["agent"], task["dataset"], options) | (task["varied"] or {})
    return task | {
        "updates": options.updates,
        "members": options.members,
        "size": options.size,
        "settings": settings,
    }


def train_one(
    key: dict[str, Any], episodes: int, device: str, done: list[str]
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Facts of the dataset, and the finished training (None if the fingerprint is in ``done``)."""
    import saferl
    from saferl.evaluation import rollout
    from saferl.training.run import RunFolder

    data, start = dataset_of(key["dataset"], key["size"]), time.perf_counter()
    facts = facts_of(data)
    if facts["fingerprint"] in done:
        return facts, None
    with tempfile.TemporaryDirectory() as folder:
        run = saferl.train(
            key["agent"],
            data,
            steps=key["updates"],
            members=key["members"],
            settings=key["settings"],
            out=Path(folder) / "run",
            device=device,
            engine="compile" if device == "cpu" else "auto",  # takes 0.4 to 0.7 of the time
            eval_interval=max(1, key["updates"] // CURVE_POINTS),
            eval_episodes=CURVE_EPISODES,
            checkpoint_interval=key["updates"],
            progress=False,
        )
        played = rollout(run.policy(), data.card.env_id, episodes, seed=EVALUATION_SEED)
        plan, metrics = RunFolder(run.path).config(), last_metrics(run.path / "metrics.csv")
    steps = np.unique(run.evaluation.steps)
    curve = [np.round(run.evaluation.at(step).matrix().mean(1), 1).tolist() for step in steps]
    return facts, key | {
        "fingerprint": facts["fingerprint"],
        "names": plan["members"],
        "config": plan["agent_config"],
        "returns": np.round(played.returns, 2).tolist(),  # [members, episodes]
        "costs": None if played.costs is None else np.round(played.costs, 2).tolist(),
        "curve": {"updates": steps.tolist(), "returns": curve},
        "metrics": metrics,
        "seconds": round(time.perf_counter() - start, 1),
        "date": common.now(),
    }


# The schedule --------------------------------------------------------------------------------


def schedule(options: argparse.Namespace) -> list[dict[str, Any]]:
    """All trainings asked for, in the order of work."""
    names = [name for group in GROUPS for name in group]
    others = [n for n in options.datasets or [] if not any(fnmatchcase(k, n) for k in names)]
    tasks, waiting = [], dict(SENSITIVITY)
    for group in (*GROUPS, others):
        chosen = [
            name
            for name in group
            if options.datasets is None or any(fnmatchcase(name, p) for p in options.datasets)
        ]
        if not SHARED_DATA.is_dir():
            chosen = [name for name in chosen if name not in SHARED]
        for tier in TIERS:
            for name in chosen:
                for agent in tier:
                    if agent in options.agents:
                        tasks.append({"dataset": name, "agent": agent, "varied": None})
        if group is not GROUPS[0] and "a2pr" in options.agents:  # once two groups are done
            done = {task["dataset"] for task in tasks}
            for name in [name for name in waiting if name in done]:
                tasks += [
                    {"dataset": name, "agent": "a2pr", "varied": {field: values}}
                    for field, values in waiting.pop(name).items()
                ]
    return [key_of(task, options) for task in tasks]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--datasets", nargs="+", help="ids or patterns such as 'saferl/hopper-*'")
    parser.add_argument("--agents", nargs="+", choices=AGENTS, default=list(AGENTS))
    parser.add_argument("--updates", type=int)
    parser.add_argument("--members", type=int, default=3, help="seeds, trained side by side")
    parser.add_argument("--episodes", type=int, default=20, help="per member, of the last policy")
    parser.add_argument("--size", type=int, help="transitions of each dataset (default 100 000)")
    parser.add_argument("--hidden", type=int, help="units per layer (VAE: twice); 0: as published")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--cql-samples", type=int, help="CQL's N")
    parser.add_argument("--device", help="cpu, cuda or auto")
    parser.add_argument("--full", action="store_true", help="the published scale, for a GPU")
    options = parse(parser, arguments, jobs=True)
    stem = "evidence_full" if options.full else "evidence"
    for name, value in SCALES[options.full].items():
        if getattr(options, name) is None:
            setattr(options, name, value)

    os.environ.update(common.ONE_THREAD)  # for the processes of --jobs
    book, keys = Book(options.out / f"{stem}.json", options.fresh), schedule(options)
    if not keys:
        parser.error("no dataset matches --datasets")
    failed = 0
    if not options.report:
        book.content["note"] = NOT_D4RL
        print(f"{len(keys)} trainings, {options.jobs} at a time", file=sys.stderr, flush=True)
        failed = book.train(
            train_one, keys, (options.episodes, options.device), options.jobs,
            lambda key: f"{key['dataset']} {key['agent']} {key['varied'] or ''}".rstrip(), told_of,
        )  # fmt: skip
    text = evidence_report.write(book, book.entries(keys), MIXTURES, options.out, stem)
    if not options.report:  # which may look at the file of a run that is still writing it
        book.save()
    print(text, end="")
    return 1 if failed else 0


def told_of(run: dict[str, Any]) -> str:
    """A line for the terminal."""
    means = ", ".join(f"{np.mean(row):.0f}" for row in run["returns"])
    return f"{means} ({run['seconds']:.0f} s)"


if __name__ == "__main__":
    sys.exit(main())
