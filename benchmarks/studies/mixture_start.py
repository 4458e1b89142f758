"""Why clones of a mixture stand still: where the expert's rows are, and where policies get going.

    python -m benchmarks mixture_start                     # BC and TD3+BC, ten minutes of one core
    python -m benchmarks mixture_start --agents a2pr       # any agent of the study `comparison`

On `saferl/halfcheetah-expert-random-50-v0` half of the episodes are an expert's. Near an episode's
first state, how many of the nearest rows are? And what does a policy trained as in `comparison`
return if it is put into a state that the expert was in after some steps? The data are saferl's own,
not D4RL's.
"""

from __future__ import annotations

import sys
import time
from argparse import ArgumentParser, Namespace
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.runner import one_thread, trained
from benchmarks.studies import comparison
from benchmarks.study import Study, add

DATASET = "saferl/halfcheetah-expert-random-50-v0"
EXPERT = 3000.0  # return above which an episode is the expert's: random ones are below 0
AT, NEAREST, STATES, STEPS = (0, 5, 10, 20, 50, 100, 300), 500, 5, 500


class Rows:
    """The dataset by episode and step."""

    def __init__(self, data: Any):
        lengths = data.episode_lengths()
        self.observations = data.observations
        self.episode = np.repeat(np.arange(len(lengths)), lengths)
        self.step = np.concatenate([np.arange(n) for n in lengths])
        self.expert = (data.episode_returns() > EXPERT)[self.episode]
        self.std = data.observations.std(0)

    def of_expert(self, step: int, count: int) -> np.ndarray:
        """Up to ``count`` rows that the expert was in after ``step`` steps."""
        return np.flatnonzero(self.expert & (self.step == step))[:count]

    def share(self, row: int) -> float:
        """Of the rows of other episodes that are nearest, the part that is the expert's."""
        distance = (((self.observations - self.observations[row]) / self.std) ** 2).sum(1)
        distance[self.episode == self.episode[row]] = np.inf
        return float(self.expert[np.argpartition(distance, NEAREST)[:NEAREST]].mean())


def policy_of(agent: str, data: Any, members: int, updates: int) -> Any:
    """Trained as `comparison` trains on a CPU."""
    scale = Namespace(**comparison.SCALES[False] | {"updates": updates})
    settings = comparison.settings_of(agent, DATASET, scale)
    key = {"agent": agent, "members": members, "settings": settings}
    with trained(key, data, steps=updates, device="cpu", eval_interval=0) as run:
        return run.policy


def returns_from(policy: Any, env: Any, observation: np.ndarray) -> list[float]:
    """Return of `STEPS` steps of each member, begun in the state of ``observation``."""
    import torch

    half, found = len(observation) // 2, []
    for member in range(policy.members):
        own, total, seen = policy.member(member), 0.0, observation
        env.reset(seed=0)
        # An observation is all of the state but the place along the track, which is 0.
        env.unwrapped.set_state(np.r_[0.0, observation[:half]], observation[half:])
        for _ in range(STEPS):
            action = own(torch.from_numpy(seen.astype(np.float32))[None, None])[0, 0].numpy()
            seen, reward, *_ = env.step(action)
            total += float(reward)
        found.append(total)
    return found


class MixtureStart(Study):
    name, packages = "mixture_start", ("mujoco", "gymnasium")

    def options(self, parser: ArgumentParser) -> None:
        add(parser, "--agents", ("bc", "td3_bc"), choices=comparison.NAMES)
        add(parser, "--members", 3)
        add(parser, "--updates", 100_000)

    def measure(self, options: Namespace) -> dict[str, Any]:
        import gymnasium

        import saferl

        one_thread()
        data, start = saferl.load_dataset(DATASET), time.perf_counter()
        rows, env = Rows(data), gymnasium.make(data.card.env_id)
        returns: dict[str, dict[str, list[float]]] = {}
        for agent in options.agents:
            policy = policy_of(agent, data, options.members, options.updates)
            returns[agent] = {}
            for at in AT:
                begun = [
                    returns_from(policy, env, rows.observations[row].astype(np.float64))
                    for row in rows.of_expert(at, STATES)
                ]
                returns[agent][str(at)] = np.round(np.mean(begun, 0), 1).tolist()
            print(f"{agent}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        shares = {at: [rows.share(row) for row in rows.of_expert(at, 20)] for at in AT}
        return self.header(options) | {
            "dataset": DATASET,
            "expert_rows": float(rows.expert.mean()),
            "expert_share": {str(at): float(np.mean(share)) for at, share in shares.items()},
            "returns": returns,
        }

    def report(self, content: dict[str, Any]) -> str:
        returns = {agent: {at: np.array(v) for at, v in own.items()}
                   for agent, own in content["returns"].items()}  # fmt: skip
        cells = [
            [at, f"{share:.2f}", *(
                f"{own[at].mean():.0f} ({own[at].min():.0f} to {own[at].max():.0f})"
                for own in returns.values()
            )]
            for at, share in content["expert_share"].items()
        ]  # fmt: skip
        heads = ["expert's step", f"expert's share of the {NEAREST} nearest rows", *returns]
        members = len(next(iter(content["returns"].values()))["0"])
        return (
            "# Where the clones of a mixture stand still\n\n**The data are generated by saferl, "
            f"not D4RL's.** `{DATASET}`: {content['expert_rows']:.0%} of the rows are the "
            f"expert's.\n\n{report.table(heads, cells)}\n\nReturn of {STEPS} steps begun in "
            f"{STATES} states of the expert after so many steps: mean of {members} members, and "
            f"their range.\n\n`{content['command']}`, {content['date']}, "
            f"{content['machine']['cpu']}.\n"
        )


STUDY = MixtureStart()
