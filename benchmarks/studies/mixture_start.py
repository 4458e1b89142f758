"""Why clones of a mixture stand still: where the expert's rows are, and where policies get going.

    python benchmarks/mixture_start.py                     # BC and TD3+BC, ten minutes of one core
    python benchmarks/mixture_start.py --agents a2pr       # any agent of evidence.py

On `saferl/halfcheetah-expert-random-50-v0` half of the episodes are an expert's. Near an episode's
first state, how many of the nearest rows are? And what does a policy trained as in evidence.py
return if it is put into a state that the expert was in after some steps? The data are saferl's own,
not D4RL's.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common

os.environ.update(common.ONE_THREAD)

import evidence
import gymnasium
import numpy as np
import torch

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
    """Trained as evidence.py trains on a CPU."""
    import saferl

    scale = argparse.Namespace(**evidence.SCALES[False] | {"updates": updates})
    with tempfile.TemporaryDirectory() as folder:
        run = saferl.train(
            agent, data, steps=updates, members=members, out=Path(folder) / "run",
            settings=evidence.settings_of(agent, DATASET, scale), device="cpu", eval_interval=0,
            engine="compile", progress=False,
        )  # fmt: skip
        return run.policy()


def returns_from(policy: Any, env: gymnasium.Env, observation: np.ndarray) -> list[float]:
    """Return of `STEPS` steps of each member, begun in the state of ``observation``."""
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


def main() -> None:
    import saferl

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--agents", nargs="+", choices=evidence.AGENTS, default=["bc", "td3_bc"])
    parser.add_argument("--members", type=int, default=3)
    parser.add_argument("--updates", type=int, default=100_000)
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder of the results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data, start = saferl.load_dataset(DATASET), time.perf_counter()
    rows = Rows(data)
    shares = {at: np.mean([rows.share(r) for r in rows.of_expert(at, 20)]) for at in AT}
    env, returns = gymnasium.make(data.card.env_id), {}
    for agent in options.agents:
        policy = policy_of(agent, data, options.members, options.updates)
        returns[agent] = {
            at: np.array([
                returns_from(policy, env, rows.observations[row].astype(np.float64))
                for row in rows.of_expert(at, STATES)
            ]).mean(0)
            for at in AT
        }  # fmt: skip
        print(f"{agent}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    cells = [
        [at, f"{shares[at]:.2f}", *(
            f"{own[at].mean():.0f} ({own[at].min():.0f} to {own[at].max():.0f})"
            for own in returns.values()
        )]
        for at in AT
    ]  # fmt: skip
    head = common.header("mujoco", "gymnasium")
    common.write_json(options.out / "mixture_start.json", head | {
        "dataset": DATASET, "expert_share": {str(k): float(v) for k, v in shares.items()},
        "returns": {agent: {str(at): np.round(v, 1).tolist() for at, v in own.items()}
                    for agent, own in returns.items()},
    })  # fmt: skip
    text = (
        "# Where the clones of a mixture stand still\n\n**The data are generated by saferl, not "
        f"D4RL's.** `{DATASET}`: {rows.expert.mean():.0%} of the rows are the expert's.\n\n"
        + common.table(
            ["expert's step", f"expert's share of the {NEAREST} nearest rows", *returns], cells
        )
        + f"\n\nReturn of {STEPS} steps begun in {STATES} states of the expert after so many "
        f"steps: mean of {options.members} members, and their range.\n\n`{head['command']}`, "
        f"{head['date']}, {head['machine']['cpu']}.\n"
    )
    (options.out / "mixture_start.md").write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
