"""Scores of BC, TD3+BC, IQL and CQL beside d3rlpy's, on the same data.

    python benchmarks/scores.py
    python benchmarks/scores.py --shared    # on data from the policies in ../shared/data

Both sides train on the same transitions with equal networks, batches, numbers of updates and
hyper-parameters (`common.SETTINGS`); ours trains its seeds as members of one run, d3rlpy in an
environment of its own, one seed after the other. The policies of both then play the same episodes
in our process. docs/benchmarks/scores.md lists what remains different.

Every finished training is added to results/scores.json at once; a rerun skips what is there
(``--fresh`` starts over). None of the data are D4RL's.
"""

from __future__ import annotations

import argparse
import queue
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
from book import Book
from scores_report import (
    IMPLEMENTATIONS,
    NOT_D4RL,
    STEPS,
    configuration,
    plot,
    report,
    summarise,
)

DATASETS = ("saferl/halfcheetah-velocity-medium-v0", "saferl/hopper-velocity-mixed-v0")
# Policies of github.com/DLR-RM/rl-trained-agents (MIT), played with their own action noise.
SHARED = {
    "shared/halfcheetah-ppo": ("ppo_HalfCheetah-v3.npz", "halfcheetah"),
    "shared/hopper-trpo": ("trpo_Hopper-v3.npz", "hopper"),
}
SHARED_DATA = common.ROOT / ".." / "shared" / "data" / "rl_trained_agents"
EVALUATION_SEED = 10_000  # episode k of every policy starts from the state of seed 10 000 + k


# Our process ---------------------------------------------------------------------------------


class SharedPolicy:
    """A stable-baselines3 actor with a Gaussian of fixed σ, from its exported arrays."""

    members = 1

    def __init__(self, path: Path):
        import torch

        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        self.activation = {"relu": torch.relu, "tanh": torch.tanh}[str(arrays["activation"])]
        self.clip = float(arrays["obs_clip"])
        tensor = {k: torch.from_numpy(v).float() for k, v in arrays.items() if v.dtype.kind == "f"}
        self.mean = tensor["obs_mean"]
        self.std = (tensor["obs_var"] + tensor["obs_eps"]).sqrt()
        names = ("mlp_extractor.policy_net.0", "mlp_extractor.policy_net.2", "action_net")
        self.layers = [(tensor[f"{name}.weight"].T, tensor[f"{name}.bias"]) for name in names]
        self.std_of_action = tensor["log_std"].exp()

    def __call__(self, observations):
        x = ((observations - self.mean) / self.std).clamp(-self.clip, self.clip)
        for weight, bias in self.layers[:-1]:
            x = self.activation(x @ weight + bias)
        return x @ self.layers[-1][0] + self.layers[-1][1]

    def sample(self, observations, random):
        mean = self(observations)
        return mean + self.std_of_action * random.normal(*mean.shape[1:])


def dataset_of(name: str, size: int | None) -> Any:
    """A bundled dataset, or one rolled out from a policy of ../shared/data."""
    import saferl

    if name not in SHARED:
        return saferl.load_dataset(name, **({"size": size} if size else {}))
    from saferl.data import Dataset
    from saferl.envs.bundled import ROBOTS
    from saferl.evaluation import collect_transitions

    file, robot = SHARED[name]
    robot = ROBOTS[robot]
    policy = SharedPolicy(SHARED_DATA / file)
    arrays = collect_transitions(policy, robot.env_id, size or 100_000, seed=0, stochastic=True)
    origin = "rolled out by saferl from a policy of rl-trained-agents, not D4RL's"
    return Dataset.from_arrays(**arrays, card=rolled_out_card(name, robot, origin))


def rolled_out_card(name: str, robot: Any, origin: str) -> Any:
    """The card of data that somebody else's policies made in a robot's environment."""
    from saferl.data import Card

    return Card(
        id=name,
        env_id=robot.env_id,
        action_low=(-1.0,) * robot.action_dim,
        action_high=(1.0,) * robot.action_dim,
        reference_returns=robot.reference_returns,
        reference_source="D4RL",
        licence="MIT",
        origin=origin,
    )


def facts_of(data: Any) -> dict[str, Any]:
    """What a report needs to know of a dataset."""
    returns = data.episode_returns()
    return {
        "fingerprint": data.fingerprint,
        "env": data.card.env_id,
        "origin": data.card.origin,
        "transitions": len(data),
        "episodes": len(returns),
        "mean_return": float(np.mean(returns)),
        "best_return": float(np.max(returns)),
        "reference_returns": list(data.card.reference_returns),
    }


class Ours:
    """Our side: datasets, training, and the evaluation of both sides' policies."""

    def __init__(self) -> None:
        self.datasets: dict[tuple[str, int | None], Any] = {}

    def _dataset(self, name: str, size: int | None) -> Any:
        if (name, size) not in self.datasets:
            self.datasets[name, size] = dataset_of(name, size)
        return self.datasets[name, size]

    def export(self, dataset: str, size: int | None, path: str) -> dict[str, Any]:
        """Write the arrays for the peer; returns what the table needs to know of the data."""
        data = self._dataset(dataset, size)
        names = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")
        np.savez(path, **{name: getattr(data, name) for name in names})
        costs = data.episode_costs()
        mean_cost = None if costs is None else float(np.mean(costs))
        return facts_of(data) | {"mean_cost": mean_cost}

    def reward_scale(self, dataset: str, size: int | None, normalize: bool) -> float:
        """The factor by which our side scales rewards, for the peer to do the same."""
        import dataclasses

        from saferl.agents.base import AgentConfig
        from saferl.spec import Spec

        config = dataclasses.replace(AgentConfig(), normalize_rewards=normalize)
        return Spec.from_dataset(self._dataset(dataset, size), config).reward_scale

    def train(
        self,
        agent: str,
        dataset: str,
        size: int | None,
        steps: int,
        seeds: int,
        episodes: int,
        settings: dict[str, Any],
    ) -> list[dict[str, Any]]:
        """Train all seeds in one run; a result per seed."""
        import dataclasses

        import saferl
        from saferl.registry import agent_class

        # Every field is given, so that no published value of configs/ comes in between.
        full = dataclasses.asdict(agent_class(agent).Config()) | settings
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            run = saferl.train(
                agent,
                self._dataset(dataset, size),
                steps=steps,
                members=seeds,
                settings=full,
                out=Path(folder) / "run",
                device="cpu",
                eval_interval=steps,
                eval_episodes=1,
                progress=False,
            )
            seconds = time.perf_counter() - start
            played = self._play(run.policy(), dataset, size, episodes)
        return [{"seed": s, "seconds": seconds / seeds} | row for s, row in enumerate(played)]

    def evaluate(
        self, policy: str, dataset: str, size: int | None, episodes: int
    ) -> dict[str, Any]:
        """Play a policy that the peer wrote as TorchScript."""
        import warnings

        import torch

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            script = torch.jit.load(policy)
        return self._play(
            lambda observations: script(observations[0])[None], dataset, size, episodes
        )[0]

    def _play(self, policy: Any, dataset: str, size: int | None, episodes: int):
        from saferl.evaluation import rollout

        env = self._dataset(dataset, size).card.env_id
        played = rollout(policy, env, episodes, seed=EVALUATION_SEED)
        return [
            {
                "returns": np.round(played.returns[m], 3).tolist(),
                "costs": None if played.costs is None else played.costs[m].tolist(),
                "lengths": played.lengths[m].tolist(),
            }
            for m in range(len(played.returns))
        ]


def serve() -> None:
    import torch

    torch.set_num_threads(1)
    ours = Ours()
    common.serve(
        {
            "export": ours.export,
            "reward_scale": ours.reward_scale,
            "train": ours.train,
            "evaluate": ours.evaluate,
            "versions": lambda: common.versions(
                ["saferl", "torch", "numpy", "mujoco", "gymnasium"]
            ),
        }
    )


# The schedule --------------------------------------------------------------------------------


class Scores(Book):
    """results/scores.json: what has been trained, one entry per dataset, agent, side and seed."""

    def __init__(self, path: Path, fresh: bool):
        super().__init__(path, fresh)
        self.lock = threading.Lock()

    def runs(self, wanted: dict[str, Any]) -> list[dict[str, Any]]:
        """The trainings with these values, by seed."""
        return sorted(self.matching(wanted), key=lambda run: run["seed"])

    def extend(self, runs: Sequence[dict[str, Any]]) -> None:
        with self.lock:
            self.content["runs"] += runs
            self.save()


def lane(
    tasks: queue.Queue, book: Scores, options: argparse.Namespace, folder: Path, failed: list
) -> None:
    """One of the ``--jobs`` threads: a process of each side, working through the tasks."""
    here = Path(__file__).parent
    with (
        common.Worker(sys.executable, here / "scores.py", "--serve") as ours,
        common.Worker(common.peer_python(options.peer_python), here / "peer_d3rlpy.py") as peer,
    ):
        while not failed:
            try:
                task = tasks.get_nowait()
            except queue.Empty:
                return
            try:
                book.extend(work(task, ours, peer, options, folder))
            except Exception as error:  # the other lane stops after its own training
                failed.append(error)


def work(
    task: dict[str, Any],
    ours: common.Worker,
    peer: common.Worker,
    options: argparse.Namespace,
    folder: Path,
) -> list[dict[str, Any]]:
    """One training: all seeds of ours, or one of the peer's."""
    agent, dataset, steps = task["agent"], task["dataset"], task["steps"]
    settings = common.settings_of(agent, options.hidden) | {"batch_size": options.batch_size}
    where = {"dataset": dataset, "size": options.size}
    start = time.time()
    if task["implementation"] == "saferl":
        found = ours("train", agent=agent, steps=steps, seeds=options.seeds,
                     episodes=options.episodes, settings=settings, **where)  # fmt: skip
    else:
        policy = str(folder / f"{agent}-{threading.get_ident()}.pt")
        scale = ours("reward_scale", normalize=settings.get("normalize_rewards", False), **where)
        trained = peer("train", agent=agent, data=str(folder / task["file"]), policy=policy,
                       steps=steps, seed=task["seed"], reward_scale=scale,
                       settings=settings)  # fmt: skip
        played = ours("evaluate", policy=policy, episodes=options.episodes, **where)
        found = [{"seed": task["seed"], **trained, **played}]
    returns = ", ".join(f"{np.mean(row['returns']):.0f}" for row in found)
    name = f"{dataset} {agent} {task['implementation']}"
    print(f"{name}: {returns} ({time.time() - start:.0f} s)", file=sys.stderr, flush=True)
    key = {k: v for k, v in task.items() if k not in ("seed", "file")}
    return [key | row for row in found]


def schedule(options: argparse.Namespace, datasets: dict[str, Any], book: Scores) -> list:
    """What is still to be trained, agent by agent: an early stop leaves whole comparisons."""
    tasks = []
    for agent in options.agents:
        for side in IMPLEMENTATIONS:
            for number, (name, facts) in enumerate(datasets.items()):
                task = configuration(options, name, facts, agent, side)
                seeds = [s for s in range(options.seeds) if not book.runs(task | {"seed": s})]
                task["file"] = f"data-{number}.npz"
                if side == "d3rlpy":
                    tasks += [task | {"seed": seed} for seed in seeds]
                elif seeds:  # members are trained together
                    tasks.append(task)
    return tasks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--datasets", nargs="+", default=list(DATASETS))
    parser.add_argument("--shared", action="store_true", help="../shared/data instead, if present")
    parser.add_argument("--agents", nargs="+", choices=sorted(STEPS), default=list(STEPS))
    parser.add_argument("--steps", type=int, help="updates (default 50 000, CQL 20 000)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--episodes", type=int, default=20, help="per seed")
    parser.add_argument("--size", type=int, help="transitions of each dataset (default 100 000)")
    parser.add_argument("--hidden", type=int, nargs="+", default=[64, 64])
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--jobs", type=int, default=2, help="trainings at the same time")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    parser.add_argument(
        "--peer-python", help="an interpreter with d3rlpy; else .venv-peers is made"
    )
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder of the results")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve()
    names, stem = options.datasets, "scores"
    if options.shared:
        if not SHARED_DATA.is_dir():
            parser.error("../shared/data is not here: run without --shared")
        names, stem = list(SHARED), "scores_shared"

    python = common.peer_python(options.peer_python)  # made once, before the threads ask for it
    book = Scores(options.out / f"{stem}.json", options.fresh)
    here = Path(__file__).parent
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with common.Worker(sys.executable, here / "scores.py", "--serve") as ours:
            datasets = {
                name: ours("export", dataset=name, size=options.size,
                           path=str(folder / f"data-{number}.npz"))
                for number, name in enumerate(names)
            }  # fmt: skip
            versions = {"ours": ours("versions")}
        with common.Worker(python, here / "peer_d3rlpy.py") as peer:
            versions["peer"] = peer("versions")
        book.content |= {
            "command": common.command(),
            "date": common.now(),
            "machine": common.machine(),
            "versions": versions,
            "settings": {
                agent: common.settings_of(agent, options.hidden)
                | {"batch_size": options.batch_size}
                for agent in STEPS
            },
            "note": NOT_D4RL,
        }
        book.content["datasets"] |= datasets
        tasks: queue.Queue = queue.Queue()
        todo = schedule(options, datasets, book)
        for task in todo:
            tasks.put(task)
        print(f"{len(todo)} trainings to do, {options.jobs} at a time", file=sys.stderr)
        failed: list = []
        lanes = [
            threading.Thread(target=lane, args=(tasks, book, options, folder, failed))
            for _ in range(min(options.jobs, len(todo)))
        ]
        for thread in lanes:
            thread.start()
        for thread in lanes:
            thread.join()
    rows = summarise(book, options)
    book.content |= {"rows": rows, "date": common.now()}
    book.save()
    if failed:
        raise failed[0]
    plot(rows, options.out / f"{stem}.png")
    below = sum(row["difference_interval"][1] < 0 for row in rows)
    text = report(rows, book.content["datasets"]) + (
        f"\nNot below d3rlpy beyond the interval: {len(rows) - below} of {len(rows)}.\n\n"
        f"`{book.content['command']}`, {book.content['date']}.\n"
    )
    (options.out / f"{stem}.md").write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
