"""A2PR's scores beside those of its authors' code, on the same data.

    git clone https://github.com/ltlhuuu/A2PR
    python -m benchmarks a2pr_authors --a2pr A2PR           # two hours; resumes

The authors' class and buffer train at the scale of the study `comparison`, one seed after the
other, and play the same episodes as the members in results/comparison.json. Their code is used as
it is, but for the widths of its layers. That its updates are ours, `published` shows. None of the
data are D4RL's.
"""

from __future__ import annotations

import time
from argparse import ArgumentParser, Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

from benchmarks import report
from benchmarks.fidelity import published
from benchmarks.report import compare, span, to_score, verdict
from benchmarks.runner import play
from benchmarks.store import RESULTS, Key, Record, Store
from benchmarks.studies import comparison
from benchmarks.study import NOT_D4RL, NOTHING, Trained, add

DATASETS = (  # where A2PR is above the others, and where it comes out badly
    "saferl/halfcheetah-expert-random-10-v0",
    "saferl/halfcheetah-velocity-medium-v0",
    "saferl/hopper-velocity-medium-v0",
)
FIELDS = ("observations", "actions", "next_observations", "rewards", "terminals")


class Played:
    """Their actor as a policy of one member: raw observations ``[1, B, O]`` to actions."""

    members = 1

    def __init__(self, actor: Any, mean: np.ndarray, std: np.ndarray):
        import torch

        self.actor = actor
        self.mean, self.std = (torch.from_numpy(x).float() for x in (mean, std))

    def __call__(self, observations: Any) -> Any:
        import torch

        with torch.no_grad():
            return self.actor((observations - self.mean) / self.std)


def build(folder: Path, data: Any, settings: dict[str, Any]) -> Any:
    """Their agent with layers as wide as those of ``settings``, in place of 256 and 750 units."""
    from torch import nn

    widths = {256: settings["hidden"][0], 750: settings["vae_hidden"][0]}

    class Linear(nn.Linear):
        def __init__(self, inputs: int, outputs: int):
            super().__init__(widths.get(inputs, inputs), widths.get(outputs, outputs))

    with mock.patch.object(nn, "Linear", Linear):
        return published.AuthorsA2PR(folder, data, SimpleNamespace(**settings)).theirs


class Authors(Trained):
    name, parallel = "a2pr_authors", True

    def options(self, parser: ArgumentParser) -> None:
        scale = comparison.SCALES[False]
        add(parser, "--a2pr", None, f"a clone of {published.SOURCES['a2pr']}", type=Path)
        add(parser, "--datasets", DATASETS)
        add(parser, "--seeds", 3)
        add(parser, "--episodes", 20, "per seed, of the last policy")
        add(parser, "--updates", scale["updates"])
        add(parser, "--hidden", scale["hidden"])
        add(parser, "--size", None, "transitions of each dataset (default 100 000)", type=int)

    def check(self, parser: ArgumentParser, options: Namespace) -> None:
        if not options.report:
            published.check(parser, options.a2pr, published.AuthorsA2PR)

    def keys(self, options: Namespace) -> list[Key]:
        scale = Namespace(**comparison.SCALES[False] | vars(options))
        return [
            {
                "dataset": name,
                "agent": "a2pr",
                "varied": None,
                "updates": options.updates,
                "size": options.size,
                "settings": comparison.settings_of("a2pr", name, scale),
                "seed": seed,
            }
            for name in options.datasets
            for seed in range(options.seeds)
        ]

    def train(self, key: Key, data: Any, options: Namespace) -> Record:
        """One seed of theirs."""
        import torch

        start = time.perf_counter()
        torch.manual_seed(key["seed"])
        np.random.seed(key["seed"])  # noqa: NPY002 (their buffer draws from it)
        theirs = build(options.a2pr, data, key["settings"])
        kind = published.load(options.a2pr / "utils" / "buffer.py").ReplayBuffer
        buffer = kind(0, 0, "cpu", "", scale=1, shift=0, max_size=0)
        buffer.D4RL_convert({name: np.asarray(getattr(data, name)) for name in FIELDS})
        mean, std = buffer.normalize_states()
        late = []  # targets of the critics
        for update in range(1, key["updates"] + 1):
            told = theirs.train(buffer, key["settings"]["batch_size"])
            if update > 0.9 * key["updates"] and "target_Q" in told:  # in every second update
                late.append(told["target_Q"])
        policy = Played(theirs.actor, mean, std)
        return {
            "returns": play(policy, data.card.env_id, options.episodes)["returns"][0],
            "metrics": {"target_q": float(f"{np.mean(late):.6g}")},
            "seconds": round(time.perf_counter() - start, 1),
        }

    def label(self, key: Key) -> str:
        return f"{key['dataset']} seed {key['seed']}"

    def results(self, store: Store, entries: list[dict[str, Any]], path: Path) -> str:
        ours = Store(RESULTS / "comparison.json")
        rows = summaries(store, ours, entries)
        if not rows:
            return NOTHING
        store.content["rows"] = rows
        return markdown(rows, store.source())


STUDY = Authors()


def summaries(store: Store, ours: Store, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per dataset for which both sides have all seeds, on the same data."""
    rows = []
    for name in dict.fromkeys(entry["dataset"] for entry in entries):
        wanted = [entry for entry in entries if entry["dataset"] == name]
        theirs = [entry["run"] for entry in wanted]
        key = {k: v for k, v in wanted[0].items() if k not in ("seed", "run")}
        own = ours.entries([key | {"members": len(wanted)}], report=True)[0]["run"]
        if not all(theirs) or own is None or own["fingerprint"] != theirs[0]["fingerprint"]:
            continue
        reference = store.datasets[name]["reference_returns"]
        scores = [
            to_score(returns, reference)
            for returns in (own["returns"], [run["returns"] for run in theirs])
        ]
        difference, *ends = compare(*scores)
        rows.append({
            "dataset": name,
            "saferl": scores[0].mean(1).tolist(),
            "authors": scores[1].mean(1).tolist(),
            "difference": difference,
            "interval": ends,
            "q": {
                "saferl": own["metrics"]["q"],
                "authors": [run["metrics"]["target_q"] for run in theirs],
            },
        })  # fmt: skip
    return rows


def markdown(rows: list[dict[str, Any]], source: str) -> str:
    body = [
        [row["dataset"], side, f"{np.mean(row[side]):.1f}",
         ", ".join(f"{value:.1f}" for value in row[side]),
         ", ".join(f"{value:.4g}" for value in row["q"][side])]
        for row in rows
        for side in ("saferl", "authors")
    ]  # fmt: skip
    words = ("saferl above", "saferl below", "cannot tell")
    said = report.bullets(
        f"{row['dataset']}: saferl − authors {span(row['difference'], row['interval'])}: "
        f"**{verdict(*row['interval'], words)}**"
        for row in rows
    )
    return (
        f"# A2PR and its authors' code\n\n**{NOT_D4RL}**\n\nThe last policies, which play the same "
        "episodes, at the scale of [comparison.md](comparison.md). *Q*: mean target of the critics "
        "on the data over the last tenth of the updates (saferl: their mean value there).\n\n"
        + report.table(["dataset", "code", "score", "seeds", "Q"], body)
        + f"\n\n{said}\n{source}, one thread of a machine that was busy with other work.\n"
    )
