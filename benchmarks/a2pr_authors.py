"""A2PR beside its authors' code: the same updates, then scores on the same data.

    git clone https://github.com/ltlhuuu/A2PR authors
    python benchmarks/a2pr_authors.py --source authors      # hours; resumes
    python benchmarks/a2pr_authors.py --report              # of what there is, no training

*Updates*: both begin with the same weights, at the published widths, and get the same batches and
random numbers. *Scores*: the authors' class and buffer train at the scale of `evidence.py`, one
seed after the other, and play the same episodes as the members in results/evidence.json. Their code
is used as it is, but for the widths of its layers in the second part. None of the data are D4RL's.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import common
import evidence
import numpy as np
from book import Book
from evidence_report import span, to_score, verdict
from scores import EVALUATION_SEED, facts_of
from scores_report import NOT_D4RL, compare

DATASETS = (  # where A2PR is above the others, and where it comes out badly
    "saferl/halfcheetah-expert-random-10-v0",
    "saferl/halfcheetah-velocity-medium-v0",
    "saferl/hopper-velocity-medium-v0",
)
UPDATES_OF = "saferl/hopper-velocity-medium-v0"  # the data of the first part
READ_AT = (1, 2, 10, 100, 1000)  # updates
FIELDS = ("observations", "actions", "next_observations", "rewards", "terminals")
NETWORKS = ("actor", "critic", "value", "vae", "actor_target", "critic_target")


def authors(source: Path) -> tuple[type, type]:
    """Their agent and their replay buffer."""
    sys.path.insert(0, str(source))
    try:
        from A2PR import A2PR
        from utils.buffer import ReplayBuffer
    finally:
        sys.path.remove(str(source))
    return A2PR, ReplayBuffer


@contextlib.contextmanager
def silent() -> Iterator[None]:
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        yield


def build(cls: type, data: Any, settings: dict[str, Any], widths: dict[int, int]) -> Any:
    """Their agent, its hidden layers of 256 and 750 units replaced by those of ``widths``."""
    from torch import nn

    class Linear(nn.Linear):
        def __init__(self, inputs: int, outputs: int):
            super().__init__(widths.get(inputs, inputs), widths.get(outputs, outputs))

    sizes = data.observation_dim, data.action_dim
    named = {name: settings[name] for name in ("alpha", "mask", "vae_weight", "discount")}
    with silent(), mock.patch.object(nn, "Linear", Linear):
        return cls(*sizes, 1.0, "cpu", **named)


# The same updates ----------------------------------------------------------------------------


class Handed:
    """Their replay buffer's place, taken by batches of ours."""

    batch: list[Any]

    def sample(self, rows: int) -> list[Any]:
        return self.batch


def pairs(ours: Any, theirs: Any) -> Iterator[tuple[str, Any, Any]]:
    """Network, their parameter, and our view of it."""
    from torch import nn

    def layers(mlp: Any, element: int = 0) -> list[tuple[Any, Any]]:
        return [(w[0, element], b[0, element, 0]) for w, b in zip(mlp.weights, mlp.biases)]

    for name in NETWORKS:
        net = getattr(ours, name)
        if name == "vae":  # their heads of μ and log ς are the halves of our last layer
            *own, (weight, bias) = layers(net.encoder)
            z = net.latent_dim
            own += [(weight[:, :z], bias[:z]), (weight[:, z:], bias[z:]), *layers(net.decoder)]
        else:
            own = [pair for e in range(net.mlp.ensemble) for pair in layers(net.mlp, e)]
        linear = [m for m in getattr(theirs, name).modules() if isinstance(m, nn.Linear)]
        for layer, (weight, bias) in zip(linear, own, strict=True):
            yield name, layer.weight, weight.T
            yield name, layer.bias, bias


def same_updates(cls: type, size: int | None, updates: int, precision: str) -> list[dict[str, Any]]:
    """How far apart the weights of each network are, of how far they have moved."""
    import torch

    from saferl.data.buffer import ReplayBuffer
    from saferl.registry import agent_class
    from saferl.rng import MemberRandom
    from saferl.spec import Spec

    data = evidence.dataset_of(UPDATES_OF, size)
    config = agent_class("a2pr").make_config(evidence.published_values("a2pr", UPDATES_OF))
    spec = Spec.from_dataset(data, config)
    buffer = ReplayBuffer.from_dataset(data, spec, [0])
    torch.set_default_dtype(getattr(torch, precision))
    try:
        ours = agent_class("a2pr")(spec, config, [0])
        theirs = build(cls, data, vars(config), {})
        with torch.no_grad():
            for _, parameter, own in pairs(ours, theirs):
                parameter.copy_(own)
        first = [parameter.detach().clone() for _, parameter, _ in pairs(ours, theirs)]
        random, handed, rows = MemberRandom([0], stream=1), Handed(), []

        def numbers(like: Any) -> Any:
            return random.normal(*like.shape)[0]

        for update in range(1, updates + 1):
            batch = buffer.sample(config.batch_size).map(
                lambda field: field.to(torch.get_default_dtype())
            )
            s, a, r, s2, end = (
                field[0]
                for field in (batch.observations, batch.actions, batch.rewards,
                              batch.next_observations, batch.terminals)
            )  # fmt: skip
            handed.batch = [s, a, r[:, None], s2, 1 - end[:, None]]
            with mock.patch.object(torch, "randn_like", numbers):
                theirs.train(handed, config.batch_size)
            ours.update(batch)
            if update in READ_AT or update == updates:
                apart: dict[str, list[float]] = {name: [0.0, 0.0] for name in NETWORKS}
                for (name, parameter, own), start in zip(pairs(ours, theirs), first):
                    parameter = parameter.detach()
                    apart[name][0] += float((own.detach() - parameter).square().sum())
                    apart[name][1] += float((parameter - start).square().sum())
                found = {n: (d / m) ** 0.5 if m else None for n, (d, m) in apart.items()}
                rows.append({"precision": precision, "updates": update, "apart": found})
        return rows
    finally:
        torch.set_default_dtype(torch.float32)


# Scores --------------------------------------------------------------------------------------


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


def train_one(
    key: dict[str, Any], source: Path, episodes: int, done: list[str]
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Facts of the dataset, and one seed of theirs (None if the fingerprint is in ``done``)."""
    import torch

    from saferl.evaluation import rollout

    cls, buffer_class = authors(source)
    data, start = evidence.dataset_of(key["dataset"], key["size"]), time.perf_counter()
    facts = facts_of(data)
    if facts["fingerprint"] in done:
        return facts, None
    torch.manual_seed(key["seed"])
    np.random.seed(key["seed"])  # noqa: NPY002 (their buffer draws from it)
    settings = key["settings"]
    widths = {256: settings["hidden"][0], 750: settings["vae_hidden"][0]}
    theirs = build(cls, data, settings, widths)
    buffer = buffer_class(0, 0, "cpu", "", scale=1, shift=0, max_size=0)
    buffer.D4RL_convert({name: np.asarray(getattr(data, name)) for name in FIELDS})
    mean, std = buffer.normalize_states()
    late = []  # targets of the critics
    for update in range(1, key["updates"] + 1):
        told = theirs.train(buffer, settings["batch_size"])
        if update > 0.9 * key["updates"]:
            late += [told["target_Q"]] if "target_Q" in told else []  # of every second update
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
        facts = book.content["datasets"].get(name)
        runs = [entry["run"] for entry in book.entries([k for k in keys if k["dataset"] == name])]
        key = {k: v for k, v in keys[0].items() if k not in ("seed", "dataset", "settings")}
        own = ours.entries([
            key | {"dataset": name, "settings": k["settings"], "members": len(runs)}
            for k in keys if k["dataset"] == name
        ][:1])[0]["run"]  # fmt: skip
        if not all(runs) or own is None or own["fingerprint"] != facts["fingerprint"]:
            continue
        scores = [
            to_score(returns, facts["reference_returns"])
            for returns in (own["returns"], [run["returns"] for run in runs])
        ]
        difference, low, high = compare(*scores)
        rows.append(
            {
                "dataset": name,
                "saferl": scores[0].mean(1).tolist(),
                "authors": scores[1].mean(1).tolist(),
                "difference": difference,
                "interval": [low, high],
                "q": {"saferl": own["metrics"]["q"],
                      "authors": [run["metrics"]["target_q"] for run in runs]},
            }
        )  # fmt: skip
    return rows


def report(content: dict[str, Any], rows: list[dict[str, Any]], source: str) -> str:
    parts = [f"# A2PR and its authors' code\n\n**{NOT_D4RL}**\n"]
    if content.get("updates"):
        parts.append(
            "## The same updates\n\nFrom the same weights, with the same batches and random "
            f"numbers, on {UPDATES_OF}, published widths and values: distance of the weights of "
            "both, of the distance that they have moved. Targets and policy move with every second "
            "update.\n"
        )
        table = [
            [row["precision"], row["updates"]]
            + ["–" if row["apart"][n] is None else f"{row['apart'][n]:.1e}" for n in NETWORKS]
            for row in content["updates"]
        ]
        parts.append(common.table(["precision", "updates", *NETWORKS], table) + "\n")
    if rows:
        parts.append(
            "## Scores\n\nThe last policies, which play the same episodes, at the scale of "
            "[evidence.md](evidence.md). *Q*: mean target of the critics on the data over the last "
            "tenth of the updates (saferl: their mean value there).\n"
        )
        table = []
        for row in rows:
            for side in ("saferl", "authors"):
                table.append(
                    [row["dataset"], side, f"{np.mean(row[side]):.1f}",
                     ", ".join(f"{value:.1f}" for value in row[side]),
                     ", ".join(f"{value:.4g}" for value in row["q"][side])]
                )  # fmt: skip
        parts.append(common.table(["dataset", "code", "score", "seeds", "Q"], table) + "\n")
        for row in rows:
            words = ("saferl above", "saferl below", "cannot tell")
            parts.append(
                f"- {row['dataset']}: saferl − authors {span(row['difference'], row['interval'])}: "
                f"**{verdict(*row['interval'], words)}**"
            )
        parts.append("")
    return (
        "\n".join(parts) + f"\n{source}, one thread of a machine that was busy with other work.\n"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, help="folder of the authors' code")
    parser.add_argument("--datasets", nargs="+", default=list(DATASETS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--episodes", type=int, default=20, help="per seed, of the last policy")
    parser.add_argument("--updates", type=int, default=evidence.SCALES[False]["updates"])
    parser.add_argument("--hidden", type=int, default=evidence.SCALES[False]["hidden"])
    parser.add_argument("--compared", type=int, default=1000, help="updates of the first part")
    parser.add_argument("--size", type=int, help="transitions of each dataset (default 100 000)")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at the same time")
    parser.add_argument("--report", action="store_true", help="train nothing, report what there is")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder of the results")
    options = parser.parse_args(arguments)
    if not options.report and not (options.source and (options.source / "A2PR.py").is_file()):
        parser.error("--source must be a clone of https://github.com/ltlhuuu/A2PR")

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
        import torch

        torch.set_num_threads(1)
        cls, _ = authors(options.source)
        if not book.content.get("updates"):
            book.content["updates"] = [
                row
                for precision in ("float64", "float32")
                for row in same_updates(cls, options.size, options.compared, precision)
            ]
            book.save()
        failed = book.train(
            train_one, keys, (options.source, options.episodes), options.jobs,
            lambda key: f"{key['dataset']} seed {key['seed']}",
            lambda run: f"{np.mean(run['returns']):.0f} ({run['seconds']:.0f} s)",
        )  # fmt: skip
    rows = summarise(book, Book(common.RESULTS / "evidence.json"), keys)
    book.content["rows"] = rows
    text = report(book.content, rows, book.source())
    (options.out / "a2pr_authors.md").write_text(text)
    if not options.report:
        book.save()
    print(text, end="")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
