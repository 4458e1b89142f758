"""What the studies on public datasets share: protocol, resumption, published numbers, the report.

A study names suites of datasets, agents, and a protocol per suite. Settings are what ``configs/``
has for the dataset. A training is one dataset and one agent with all its seeds; its run folder is
kept under ``--runs`` until it is done, so that it goes on at its last checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.report import interval, span, to_score, verdict
from benchmarks.runner import Finished, play, trained
from benchmarks.store import Key, Record, Store
from benchmarks.study import NOTHING, Trained, add

CHECKPOINTS = 50  # of a training, from which it goes on


@dataclass(frozen=True)
class Suite:
    """Datasets with one protocol.

    Attributes:
        datasets: ids without the family in front.
        updates, seeds, episodes: of the last policy of each seed. source: who did it like that.
    """

    datasets: tuple[str, ...]
    updates: int
    seeds: int
    episodes: int
    source: str


@dataclass(frozen=True)
class Method:
    """A row of the report: an agent and what is set besides its published values."""

    title: str
    agent: str
    own: dict[str, Any] = field(default_factory=dict)


class Public(Trained):
    """A study on a family of public datasets.

    Attributes:
        suites, methods: by name on the command line.
        heading, about: title and first lines of the report.
    """

    suites: dict[str, Suite]
    methods: dict[str, Method]
    heading: str
    about: str
    parallel = True

    def options(self, parser: ArgumentParser) -> None:
        add(parser, "--suite", tuple(self.suites), "default: all", choices=self.suites)
        add(parser, "--datasets", None, "patterns such as 'hopper-*'; default: all", nargs="+")
        add(parser, "--agents", tuple(self.methods), choices=self.methods)
        add(parser, "--updates", None, "default: the suite's protocol", type=int)
        add(parser, "--seeds", None, "default: the suite's protocol", type=int)
        add(parser, "--episodes", None, "per seed; default: the suite's protocol", type=int)
        add(parser, "--data", None, "folder with the published files; default: caches, downloads",
            type=Path)  # fmt: skip
        add(parser, "--no-download", False, "refuse to use the network")
        add(parser, "--device", "auto", "cpu, cuda or auto")
        add(parser, "--runs", Path("runs/benchmarks"), "where unfinished trainings are kept")

    def check(self, parser: ArgumentParser, options: Namespace) -> None:
        if not self.keys(options):
            parser.error("no dataset of these suites matches --datasets")

    def like(self, dataset: str) -> str:
        """The id whose settings in ``configs/`` hold for a dataset."""
        return f"{self.name}/{dataset}"

    def keys(self, options: Namespace) -> list[Key]:
        asked = options.datasets or ["*"]
        return [
            {
                "suite": name,
                "dataset": f"{self.name}/{dataset}",
                "method": method,
                "agent": self.methods[method].agent,
                "updates": options.updates or self.updates(suite, dataset),
                "members": options.seeds or suite.seeds,
                "episodes": options.episodes or suite.episodes,
                "settings": self.settings(dataset, method),
            }
            for name in options.suite
            for suite in [self.suites[name]]
            for dataset in suite.datasets
            if any(fnmatchcase(dataset, pattern) for pattern in asked)
            for method in options.agents
        ]

    def updates(self, suite: Suite, dataset: str) -> int:
        return suite.updates

    def settings(self, dataset: str, method: str) -> dict[str, Any]:
        from saferl.runs.settings import published

        how = self.methods[method]
        return published(how.agent, self.like(dataset)) | how.own

    def dataset(self, key: Key, options: Namespace) -> Any:
        import saferl

        where = {} if options.data is None else self.local(key["dataset"], options.data)
        return saferl.load_dataset(key["dataset"], download=not options.no_download, **where)

    def local(self, dataset: str, folder: Path) -> dict[str, Any]:
        """Options of `load_dataset` for a dataset whose published file is in a folder."""
        from saferl.errors import SaferlError

        path = folder / self.file_of(dataset.split("/", 1)[1])
        if not path.is_file():
            raise SaferlError(f"{path.name} is not in the folder of --data")
        return {"path": path}

    def file_of(self, dataset: str) -> str:
        """The name under which a dataset is published."""
        raise NotImplementedError

    def environment(self, key: Key, data: Any) -> str:
        """Where policies are played.

        Raises:
            SaferlError: nowhere, and why.
        """
        from saferl.errors import SaferlError
        from saferl.registry import make_env

        if data.card.env_id is None:
            notes = [note for note in data.card.notes if "evaluation" in note]
            raise SaferlError("; ".join(notes) or "no environment is known")
        make_env(data.card.env_id).close()  # before hours of training
        return data.card.env_id

    def train(self, key: Key, data: Any, options: Namespace) -> Record:
        env = self.environment(key, data)
        digest = hashlib.sha256(repr((key, data.fingerprint)).encode()).hexdigest()[:12]
        folder = options.runs / f"{self.name}-{digest}"
        every = max(1, key["updates"] // CHECKPOINTS)
        with trained(key, data, env=env, steps=key["updates"], folder=folder,
                     device=options.device, eval_interval=0, eval_episodes=1,
                     checkpoint_interval=every) as run:  # fmt: skip
            found = run.summary() | self.played(key, run, env)
            found["seconds"] = round(run.seconds, 1)
        shutil.rmtree(folder)
        return found

    def played(self, key: Key, run: Finished, env: str) -> dict[str, Any]:
        """What the last policies reach."""
        return play(run.policy, env, key["episodes"])

    def label(self, key: Key) -> str:
        return f"{key['dataset']}: {key['method']}"

    def references(self) -> list[dict[str, Any]]:
        """Columns of published numbers, each with its source."""
        file = Path(__file__).with_name("published") / f"{self.name}.json"
        return json.loads(file.read_text())["columns"] if file.exists() else []

    def results(self, store: Store, entries: list[dict[str, Any]], path: Path) -> str:
        parts = [f"# {self.heading}\n", self.about + "\n"]
        for name in self.suites:
            own = [entry for entry in entries if entry["suite"] == name]
            if any(entry["run"] for entry in own):
                parts.append(f"## {name}\n\n{self.table(own, store.datasets)}\n")
        parts.append(f"## Protocol\n\n{self.protocol(entries)}")
        if columns := used(self.references(), entries):
            said = (f"{column['name']}: {column['source']}" for column in columns)
            parts.append(f"## Published numbers\n\n{report.bullets(said)}")
        parts.append(f"## Hyper-parameters\n\n{self.sources(entries)}")
        if missing := self.missing(store, entries):
            parts.append(missing)
        return "\n".join([*parts, f"{store.source()}.\n"])

    def missing(self, store: Store, entries: list[dict[str, Any]]) -> str:
        """What was not run, and why."""
        failed = store.content.get("failed", {})
        reasons: dict[tuple[str, str], list[str]] = {}
        for entry in (entry for entry in entries if not entry["run"]):
            reason = failed.get(self.label(entry), "not trained")
            reasons.setdefault((entry["dataset"], reason), []).append(entry["method"])
        count = sum(map(len, reasons.values()))
        lines = (f"{dataset}, {', '.join(methods)}: {reason}"
                 for (dataset, reason), methods in reasons.items())  # fmt: skip
        head = f"## Not run: {count} of {len(entries)}\n\n"
        return head + report.bullets(lines) if reasons else ""

    def nothing(self, store: Store, entries: list[dict[str, Any]]) -> str:
        return f"{NOTHING}\n{self.missing(store, entries)}"

    def table(self, entries: Sequence[dict[str, Any]], facts: dict[str, Any]) -> str:
        """Markdown: our scores, the published ones, and what the difference says."""
        columns = used(self.references(), entries)
        lines = []
        for entry in (entry for entry in entries if entry["run"]):
            reference = facts[entry["dataset"]]["reference_returns"]
            returns = np.array(entry["run"]["returns"])
            scores = to_score(returns, reference) if reference else returns
            theirs = [published(c, entry["method"], entry["dataset"]) for c in columns]
            said = [
                f"{column['name']}: {against(scores, column, *value)}"
                for column, value in zip(columns, theirs)
                if value and value[1] is not None
            ]
            lines.append([
                entry["dataset"].split("/", 1)[1],
                self.methods[entry["method"]].title,
                span(float(scores.mean()), interval(scores)) + ("" if reference else " (return)"),
                ", ".join(f"{value:.1f}" for value in scores.mean(1)),
                *(words(value) for value in theirs),
                "; ".join(said) or "–",
            ])  # fmt: skip
        heads = ["dataset", "agent", "score", "seeds", *(c["name"] for c in columns), "difference"]
        return report.table(heads, lines)

    def protocol(self, entries: Sequence[dict[str, Any]]) -> str:
        """A line per suite: the published one, and what was done where it is another."""
        lines = []
        for name in dict.fromkeys(entry["suite"] for entry in entries):
            suite = self.suites[name]
            of = {(e["updates"], e["members"], e["episodes"])
                  for e in entries if e["suite"] == name and e["run"]}  # fmt: skip
            told = " and ".join(f"{u} updates, {m} seeds, {n} episodes" for u, m, n in sorted(of))
            wanted = {(e["updates"], suite.seeds, suite.episodes) for e in entries
                      if e["suite"] == name and e["updates"] == suite.updates}  # fmt: skip
            told += "" if of <= wanted else " (**not the published protocol**)"
            lines.append(
                f"{name}: {suite.updates} updates, {suite.seeds} seeds, the last policy of each in "
                f"{suite.episodes} episodes ({suite.source}). Here: {told or 'nothing yet'}"
            )
        return report.bullets(lines)

    def sources(self, entries: Sequence[dict[str, Any]]) -> str:
        """A line per agent: where its settings come from."""
        from saferl.runs.settings import published_with_sources

        lines = []
        for method in dict.fromkeys(entry["method"] for entry in entries):
            how, found = self.methods[method], []
            for entry in (e for e in entries if e["method"] == method):
                dataset = entry["dataset"].split("/", 1)[1]
                values = published_with_sources(how.agent, self.like(dataset))
                found += [source for _, source in values.values()]
            own = "".join(f"; {name} {value}" for name, value in how.own.items())
            said = "; ".join(dict.fromkeys(found)) or f"defaults of docs/agents/{how.agent}.md"
            lines.append(f"{how.title}: {said}{own}")
        return report.bullets(lines)


def published(column: dict[str, Any], method: str, dataset: str) -> list[float | None] | None:
    return column["scores"].get(method, {}).get(dataset.split("/", 1)[1])


def used(
    columns: Sequence[dict[str, Any]], entries: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Those that have a number for a training."""
    return [c for c in columns if any(published(c, e["method"], e["dataset"]) for e in entries)]


def words(value: Sequence[float | None] | None) -> str:
    if value is None:
        return "–"
    mean, deviation = value
    return f"{mean:.1f}" + ("" if deviation is None else f" ± {deviation:.1f}")


def against(scores: np.ndarray, column: dict[str, Any], mean: float, deviation: float) -> str:
    """Our scores ``[seeds, episodes]`` minus published ones, with a 95 % interval and a verdict.

    A published mean of n seeds has Student's interval; both are put together as in
    `report.compare`.
    """
    from scipy.special import stdtrit

    n = column["seeds"]
    freedom = n if column["sd"] == "sample" else n - 1  # a population deviation divides by n
    half = stdtrit(n - 1, 0.975) * deviation / np.sqrt(freedom)
    ours, (low, high) = float(scores.mean()), interval(scores)
    ends = (ours - mean - np.hypot(ours - low, half), ours - mean + np.hypot(high - ours, half))
    return f"{span(ours - mean, ends)}, {verdict(*ends)}"
