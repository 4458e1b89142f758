"""A2PR's scores beside those of its authors' code, on the same data.

    git clone https://github.com/ltlhuuu/A2PR
    python benchmarks/a2pr_authors.py --a2pr A2PR           # two hours; resumes
    python benchmarks/a2pr_authors.py --report              # of what there is, no training

The authors' class and buffer train at the scale of `evidence.py`, one seed after the other, and
play the same episodes as the members in results/evidence.json. Their code is used as it is, but for
the widths of its layers. That its updates are ours, `published.py` shows. None of the data are
D4RL's.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import common
import evidence
import numpy as np
import published
from book import Book, parse
from evidence_report import span, to_score, verdict
from scores import EVALUATION_SEED, facts_of
from scores_report import NOT_D4RL, compare

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


def train_one(
    key: dict[str, Any], folder: Path, episodes: int, done: list[str]
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Facts of the dataset, and one seed of theirs (None if the fingerprint is in ``done``)."""
    import torch

    from saferl.evaluation import rollout

    data, start = evidence.dataset_of(key["dataset"], key["size"]), time.perf_counter()
    facts = facts_of(data)
    if facts["fingerprint"] in done:
        return facts, None
    torch.manual_seed(key["seed"])
    np.random.seed(key["seed"])  # noqa: NPY002 (their buffer draws from it)
    theirs = build(folder, data, key["settings"])
    kind = published.load(folder / "utils" / "buffer.py").ReplayBuffer
    buffer = kind(0, 0, "cpu", "", scale=1, shift=0, max_size=0)
    buffer.D4RL_convert({name: np.asarray(getattr(data, name)) for name in FIELDS})
    mean, std = buffer.normalize_states()
    late = []  # targets of the critics
    for update in range(1, key["updates"] + 1):
        told = theirs.train(buffer, key["settings"]["batch_size"])
        if update > 0.9 * key["updates"] and "target_Q" in told:  # in every second update
            late.append(told["target_Q"])
    policy = Played(theirs.actor, mean, std)
    played = rollout(policy, data.card.env_id, episodes, seed=EVALUATION_SEED)
    return facts, key | {
        "fingerprint": facts["fingerprint"],
        "returns": np.round(played.returns[0], 2).tolist(),
        "metrics": {"target_q": float(f"{np.mean(late):.6g}")},
        "seconds": round(time.perf_counter() - start, 1),
        "date": common.now(),
    }


def summarise(book: Book, ours: Book, keys: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per dataset for which both sides have all seeds, on the same data."""
    rows = []
    for name in dict.fromkeys(key["dataset"] for key in keys):
        wanted = [key for key in keys if key["dataset"] == name]
        theirs = [entry["run"] for entry in book.entries(wanted)]
        as_one = {k: v for k, v in wanted[0].items() if k != "seed"} | {"members": len(wanted)}
        own = ours.entries([as_one])[0]["run"]
        if not all(theirs) or own is None or own["fingerprint"] != theirs[0]["fingerprint"]:
            continue
        reference = book.content["datasets"][name]["reference_returns"]
        scores = [
            to_score(returns, reference)
            for returns in (own["returns"], [run["returns"] for run in theirs])
        ]
        difference, low, high = compare(*scores)
        rows.append(
            {
                "dataset": name,
                "saferl": scores[0].mean(1).tolist(),
                "authors": scores[1].mean(1).tolist(),
                "difference": difference,
                "interval": [low, high],
                "q": {
                    "saferl": own["metrics"]["q"],
                    "authors": [run["metrics"]["target_q"] for run in theirs],
                },
            }
        )
    return rows


def report(rows: list[dict[str, Any]], source: str) -> str:
    table, lines = [], []
    for row in rows:
        for side in ("saferl", "authors"):
            table.append(
                [row["dataset"], side, f"{np.mean(row[side]):.1f}",
                 ", ".join(f"{value:.1f}" for value in row[side]),
                 ", ".join(f"{value:.4g}" for value in row["q"][side])]
            )  # fmt: skip
        words = ("saferl above", "saferl below", "cannot tell")
        lines.append(
            f"- {row['dataset']}: saferl − authors {span(row['difference'], row['interval'])}: "
            f"**{verdict(*row['interval'], words)}**"
        )
    return (
        f"# A2PR and its authors' code\n\n**{NOT_D4RL}**\n\nThe last policies, which play the same "
        "episodes, at the scale of [evidence.md](evidence.md). *Q*: mean target of the critics on "
        "the data over the last tenth of the updates (saferl: their mean value there).\n\n"
        + common.table(["dataset", "code", "score", "seeds", "Q"], table)
        + "\n\n"
        + "\n".join(lines)
        + f"\n\n{source}, one thread of a machine that was busy with other work.\n"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--a2pr", type=Path, help=f"a clone of {published.SOURCES['a2pr']}")
    parser.add_argument("--datasets", nargs="+", default=list(DATASETS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--episodes", type=int, default=20, help="per seed, of the last policy")
    parser.add_argument("--updates", type=int, default=evidence.SCALES[False]["updates"])
    parser.add_argument("--hidden", type=int, default=evidence.SCALES[False]["hidden"])
    parser.add_argument("--size", type=int, help="transitions of each dataset (default 100 000)")
    options = parse(parser, arguments, jobs=True)
    if not options.report:
        published.check(parser, options.a2pr, published.AuthorsA2PR)

    os.environ.update(common.ONE_THREAD)  # for the processes of --jobs
    book = Book(options.out / "a2pr_authors.json", options.fresh)
    plan = argparse.Namespace(**evidence.SCALES[False] | vars(options))
    keys = [
        {
            "dataset": name,
            "agent": "a2pr",
            "varied": None,
            "updates": options.updates,
            "size": options.size,
            "settings": evidence.settings_of("a2pr", name, plan),
            "seed": seed,
        }
        for name in options.datasets
        for seed in range(options.seeds)
    ]
    failed = 0
    if not options.report:
        failed = book.train(
            train_one, keys, (options.a2pr, options.episodes), options.jobs,
            lambda key: f"{key['dataset']} seed {key['seed']}",
            lambda run: f"{np.mean(run['returns']):.0f} ({run['seconds']:.0f} s)",
        )  # fmt: skip
    rows = summarise(book, Book(common.RESULTS / "evidence.json"), keys)
    if not rows:
        print("No dataset has all its seeds here and in results/evidence.json.")
        return 1 if failed else 0
    book.content["rows"] = rows
    text = report(rows, book.source())
    (options.out / "a2pr_authors.md").write_text(text)
    if not options.report:
        book.save()
    print(text, end="")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
