"""Returns of one agent trained in fp32 and in bf16, on the same data.

Both runs differ in ``precision`` alone: same seeds, batches, noise and first weights. Rounded
products send training another way soon, so what is compared is what comes out: the last policies of
all members play the same episodes. The data are the package's own, not D4RL's.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.report import compare, to_score
from benchmarks.runner import NETWORKS, fields_of, play, trained
from benchmarks.store import Key, Record, Store
from benchmarks.study import NOT_D4RL, Trained, add


class Precision(Trained):
    name = "precision"

    def options(self, parser: ArgumentParser) -> None:
        add(parser, "--agent", "td3_bc")
        add(parser, "--dataset", "saferl/hopper-velocity-mixed-v0")
        add(parser, "--size", None, "transitions (default: all)", type=int)
        add(parser, "--steps", 20_000)
        add(parser, "--members", 3)
        add(parser, "--episodes", 20, "of each member")
        add(parser, "--hidden", (64, 64))
        add(parser, "--batch-size", 64)

    def keys(self, options: Namespace) -> list[Key]:
        fields = fields_of(options.agent)
        settings = {name: options.hidden for name in NETWORKS if name in fields}
        return [
            {
                "dataset": options.dataset,
                "agent": options.agent,
                "precision": precision,
                "steps": options.steps,
                "members": options.members,
                "size": options.size,
                "settings": settings | {"batch_size": options.batch_size},
            }
            for precision in ("fp32", "bf16")
        ]

    def train(self, key: Key, data: Any, options: Namespace) -> Record:
        with trained(key, data, steps=key["steps"], device="cpu", precision=key["precision"],
                     eval_interval=0) as run:  # fmt: skip
            played = play(run.policy, data.card.env_id, options.episodes, 3)
            return {"returns": played["returns"], "seconds": run.cpu_seconds}

    def label(self, key: Key) -> str:
        return f"{key['agent']} {key['precision']}"

    def results(self, store: Store, entries: list[dict[str, Any]], path: Path) -> str:
        runs = [entry["run"] for entry in entries if entry["run"]]
        key, facts = runs[0], store.datasets[runs[0]["dataset"]]
        returns = {run["precision"]: np.array(run["returns"]) for run in runs}
        rows = [
            [run["precision"], f"{own.mean():.0f}", ", ".join(f"{r:.0f}" for r in own.mean(1)),
             f"{to_score(own, facts['reference_returns']).mean():.1f}", f"{run['seconds']:.0f}"]
            for run, own in zip(runs, returns.values())
        ]  # fmt: skip
        members, episodes = returns[key["precision"]].shape
        said = "Only one of two was trained."
        if len(runs) == 2:
            difference, low, high = compare(returns["bf16"], returns["fp32"])
            holds = "holds 0" if low <= 0 <= high else "DOES NOT hold 0"
            said = (
                f"bf16 - fp32: {difference:.0f}, 95 % interval {low:.0f} to {high:.0f}, which "
                f"{holds} ({members} members, {episodes} episodes each; the data's mean return is "
                f"{facts['mean_return']:.0f}, their best {facts['best_return']:.0f})."
            )
        return (
            f"## {key['agent']} in fp32 and bf16 on {key['dataset']}\n\n"
            + report.table(["precision", "mean return", "members", "score", "CPU s"], rows)
            + f"\n\n{said} {key['steps']} updates of {key['settings']['batch_size']} transitions, "
            f"layers of {key['settings']['hidden'][0]} units. Few members make the interval wide: "
            f"no difference was shown, which is not equality. {NOT_D4RL}\n\n{store.source()}, one "
            f"thread.\n"
        )


STUDY = Precision()
