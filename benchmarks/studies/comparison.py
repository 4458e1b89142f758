"""A2PR beside TD3+BC, IQL, CQL and BC on medium, mixed and mixture datasets.

    python -m benchmarks comparison                 # small networks, for a CPU: hours
    python -m benchmarks comparison --full          # the published scale, for a GPU

A training is one dataset and one agent, all members at once. The last policy of each member plays
episodes from the same initial states. docs/benchmarks/comparison.md says what is compared and at
which scale. None of the data are D4RL's.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import data as datasets
from benchmarks import report
from benchmarks.report import Series, compare, interval, pooled, span, to_score, verdict
from benchmarks.runner import narrowed, play, trained
from benchmarks.store import Key, Record, Store
from benchmarks.study import NOT_D4RL, Trained, add
from saferl.evaluation.statistics import interquartile_mean

NAMES = {"a2pr": "A2PR", "td3_bc": "TD3+BC", "bc": "BC", "iql": "IQL", "cql": "CQL"}
SUBJECT, *PEERS = NAMES
COLOURS = {"a2pr": "#c0392b", "td3_bc": "#1f6fb2", "bc": "#7f8c8d", "iql": "#27864a",
           "cql": "#8e5bb5"}  # fmt: skip
TIERS = (("a2pr", "td3_bc", "bc"), ("iql",), ("cql",))  # order of work: the main question first
MIXTURES = {
    robot: [f"saferl/{robot}-expert-random-{percent}-v0" for percent in (1, 5, 10, 25, 50)]
    for robot in ("halfcheetah", "hopper", "walker2d")
}
SHARED = [f"shared/{robot}-{kind}" for kind in ("medium", "medium-replay") for robot in MIXTURES]
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
GROUPS = (  # order of work
    MIXTURES["halfcheetah"],
    [f"saferl/{r}-velocity-{k}-v0" for k in ("mixed", "medium") for r in ("halfcheetah", "hopper")],
    [f"saferl/walker2d-velocity-{k}-v0" for k in ("mixed", "medium")],
    SHARED,
    MIXTURES["hopper"],
    MIXTURES["walker2d"],
)
SCALES = {  # by --full
    False: {"updates": 100_000, "hidden": 64, "batch_size": 64, "cql_samples": 4, "device": "cpu"},
    True: {"updates": 1_000_000, "hidden": 0, "batch_size": 256, "cql_samples": 10,
           "device": "auto"},
}  # fmt: skip
CURVE_POINTS, CURVE_EPISODES = 10, 5


class Comparison(Trained):
    name, stem, parallel = "comparison", "comparison", True

    def options(self, parser: ArgumentParser) -> None:
        add(parser, "--datasets", None, "ids or patterns such as 'saferl/hopper-*'", nargs="+")
        add(parser, "--agents", tuple(NAMES), choices=NAMES)
        add(parser, "--updates", None, type=int)
        add(parser, "--members", 3, "seeds, trained side by side")
        add(parser, "--episodes", 20, "per member, of the last policy")
        add(parser, "--size", None, "transitions of each dataset (default 100 000)", type=int)
        add(parser, "--hidden", None, "units per layer (VAE: twice); 0: as published", type=int)
        add(parser, "--batch-size", None, type=int)
        add(parser, "--cql-samples", None, "CQL's N", type=int)
        add(parser, "--device", None, "cpu, cuda or auto")
        add(parser, "--full", False, "the published scale, for a GPU")

    def check(self, parser: ArgumentParser, options: Namespace) -> None:
        for name, value in SCALES[options.full].items():
            if getattr(options, name) is None:
                setattr(options, name, value)
        if not self.keys(options):
            parser.error("no dataset matches --datasets")

    def file(self, options: Namespace) -> Path:
        return options.out / f"{self.stem}{'_full' if options.full else ''}.json"

    def keys(self, options: Namespace) -> list[Key]:
        names = [name for group in GROUPS for name in group]
        asked = options.datasets
        others = [n for n in asked or [] if not any(fnmatchcase(k, n) for k in names)]
        tasks, waiting = [], dict(SENSITIVITY)
        for group in (*GROUPS, others):
            chosen = [n for n in group if not asked or any(fnmatchcase(n, p) for p in asked)]
            if not options.report and not datasets.SHARED_DATA.is_dir():
                chosen = [name for name in chosen if name not in SHARED]
            tasks += [(name, agent, None) for tier in TIERS for name in chosen for agent in tier
                      if agent in options.agents]  # fmt: skip
            if group is not GROUPS[0] and SUBJECT in options.agents:  # once two groups are done
                done = {name for name, *_ in tasks}
                for name in [name for name in waiting if name in done]:
                    tasks += [(name, SUBJECT, {field: values})
                              for field, values in waiting.pop(name).items()]  # fmt: skip
        return [
            {
                "dataset": name,
                "agent": agent,
                "varied": varied,
                "updates": options.updates,
                "members": options.members,
                "size": options.size,
                "settings": settings_of(agent, name, options) | (varied or {}),
            }
            for name, agent, varied in tasks
        ]

    def train(self, key: Key, data: Any, options: Namespace) -> Record:
        steps = key["updates"]
        evaluations = {"eval_interval": max(1, steps // CURVE_POINTS),
                       "eval_episodes": CURVE_EPISODES, "checkpoint_interval": steps}  # fmt: skip
        with trained(key, data, steps=steps, device=options.device, **evaluations) as run:
            played = play(run.policy, data.card.env_id, options.episodes)
            return run.summary() | {
                "returns": played["returns"],  # [members, episodes]
                "costs": played["costs"],
                "curve": {"updates": run.evaluated, "returns": run.curve()},
                "seconds": round(run.seconds, 1),
            }

    def label(self, key: Key) -> str:
        varied = f", {next(iter(key['varied']))} varied" if key["varied"] else ""
        return f"{key['dataset']}: {NAMES[key['agent']]}{varied}"

    def results(self, store: Store, entries: list[dict[str, Any]], path: Path) -> str:
        facts, finished = store.datasets, [e for e in entries if e["run"]]
        rows = [summary(e, facts[e["dataset"]]) for e in finished if e["varied"] is None]
        differences, varied = comparisons(entries, facts, MIXTURES), sensitivity(entries, facts)
        missing = [self.label(e) for e in entries if not e["run"]]
        store.content |= {"note": NOT_D4RL, "rows": rows, "comparisons": differences,
                          "sensitivity": varied, "missing": missing}  # fmt: skip
        stem = path.stem
        panels = mixture_panels(rows, facts)
        draw(panels, path.with_suffix(".png"))
        draw_curves(entries, facts, path.with_name(f"{stem}_curves.png"))
        picture = f"![score against the expert's share]({stem}.png)\n\n" if panels else ""
        return (
            "# A2PR beside other agents\n\n"
            + picture
            + markdown(rows, differences, varied, missing, facts)
            + f"\n![scores during training]({stem}_curves.png)\n\n## Scale\n\n"
            + scale([e["run"] for e in finished])
            + f"\n{store.source()}.\n"
        )


STUDY = Comparison()


def published_values(agent: str, dataset: str) -> dict[str, Any]:
    """What configs/ has for the dataset, or for the D4RL dataset that it is most like.

    Rollouts of ../shared/data take the values of the D4RL dataset whose name they bear. Where
    configs/ has no value for one of ours, those of the robot's locomotion data hold, if any.
    """
    from saferl.runs.settings import published

    name = dataset.split("/")[-1]
    if dataset in SHARED:
        return published(agent, f"d4rl/{name}-v2")
    return published(agent, dataset) or published(agent, f"d4rl/{name.split('-')[0]}-random-v2")


def settings_of(agent: str, dataset: str, options: Namespace) -> dict[str, Any]:
    """Published values, then the scale: widths, batch, CQL's N, and IQL's decay to the end."""
    settings = published_values(agent, dataset) | {"batch_size": options.batch_size}
    settings |= narrowed(agent, options.hidden)
    if agent == "cql":
        settings["samples"] = options.cql_samples
    if agent == "iql":
        settings["actor_decay_steps"] = options.updates
    return settings


# Summaries ---------------------------------------------------------------------------------------


def summary(entry: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """Mean return and scores of a training's last policies, with 95 % intervals."""
    returns, reference = np.array(entry["run"]["returns"]), facts["reference_returns"]
    ends, scores = interval(returns), to_score(returns, reference)
    return {
        "dataset": entry["dataset"],
        "agent": entry["agent"],
        "members": returns.shape[0],
        "episodes": returns.shape[1],
        "return": float(returns.mean()),
        "return_interval": list(ends),
        "score": float(scores.mean()),
        "score_interval": to_score(ends, reference).tolist(),
        "iqm_score": float(interquartile_mean(scores.reshape(-1))),
        "iqm_interval": list(interval(scores, interquartile_mean)),
    }


def comparisons(
    entries: Sequence[dict[str, Any]], facts: dict[str, Any], mixtures: dict[str, list[str]]
) -> list[dict[str, Any]]:
    """A2PR's score minus each other agent's: per dataset, and mean over a robot's mixtures."""
    scores = {
        (e["dataset"], e["agent"]): to_score(
            e["run"]["returns"], facts[e["dataset"]]["reference_returns"]
        )
        for e in entries
        if e["run"] and e["varied"] is None
    }
    found = []
    for peer in PEERS:
        of = {
            name: compare(scores[name, SUBJECT], scores[name, peer])
            for name in dict.fromkeys(e["dataset"] for e in entries)
            if (name, SUBJECT) in scores and (name, peer) in scores
        }
        for robot, names in mixtures.items():
            there = [of[name] for name in names if name in of]
            if len(there) > 1:
                of[f"mean of {len(there)} of {len(names)} mixtures of {robot}"] = pooled(there)
        found += [
            {"where": where, "peer": peer, "difference": difference, "interval": [low, high],
             "verdict": verdict(low, high)}
            for where, (difference, low, high) in of.items()
        ]  # fmt: skip
    return found


def sensitivity(entries: Sequence[dict[str, Any]], facts: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per varied value: score over its own members, and whether it is the one in use."""
    plain = {(e["dataset"], e["agent"]): e["settings"] for e in entries if e["varied"] is None}
    rows = []
    for entry in entries:
        if not entry["run"] or not entry["varied"]:
            continue
        ((field, values),) = entry["varied"].items()
        returns = np.array(entry["run"]["returns"]).reshape(len(values), entry["members"], -1)
        reference = facts[entry["dataset"]]["reference_returns"]
        in_use = plain.get((entry["dataset"], entry["agent"]), {})
        rows += [
            {
                "dataset": entry["dataset"],
                "field": field,
                "value": value,
                "in_use": value == in_use.get(field),
                "score": float(to_score(block, reference).mean()),
                "score_interval": to_score(interval(block), reference).tolist(),
            }
            for value, block in zip(values, returns)
        ]
    return rows


def markdown(
    rows: Sequence[dict[str, Any]],
    differences: Sequence[dict[str, Any]],
    varied: Sequence[dict[str, Any]],
    missing: Sequence[str],
    facts: dict[str, Any],
) -> str:
    """Scores side by side, verdicts, sensitivity, every training in full, the missing."""
    agents = [agent for agent in NAMES if any(r["agent"] == agent for r in rows)]
    cells = {(r["dataset"], r["agent"]): span(r["score"], r["score_interval"]) for r in rows}
    names = list(dict.fromkeys(r["dataset"] for r in rows))
    body = []
    for name in names:
        score = to_score(facts[name]["mean_return"], facts[name]["reference_returns"])
        body.append([name, f"{score:.1f}", *(cells.get((name, a), "missing") for a in agents)])
    parts = [
        f"**{NOT_D4RL}**\n",
        "## Scores\n\nD4RL's reference returns are 0 and 100; mean over members and episodes of "
        "the last policy, 95 % interval over both. *data*: mean score of the dataset's episodes.\n",
        report.table(["dataset", "data", *(NAMES[a] for a in agents)], body) + "\n",
        "## Is A2PR above?\n\nDifference of scores, A2PR minus the other, with a 95 % interval. "
        "*above* and *below*: the interval lies on one side of 0.\n",
    ]
    for peer in PEERS:
        lines = [d for d in differences if d["peer"] == peer]
        if not lines:
            parts.append(f"- {NAMES[peer]}: missing\n")
            continue
        single = [d["verdict"] for d in lines if "/" in d["where"]]
        count = ", ".join(f"{single.count(word)} {word}" for word in report.WORDS)
        said = report.bullets(
            f"{d['where']}: {span(d['difference'], d['interval'])}: **{d['verdict']}**"
            for d in lines
        )
        parts.append(f"### against {NAMES[peer]}\n\nDatasets: {count}.\n\n{said}")
    if varied:
        body = [
            [r["dataset"], r["field"], f"{r['value']:g}" + (" (in use)" if r["in_use"] else ""),
             span(r["score"], r["score_interval"])]
            for r in varied
        ]  # fmt: skip
        parts.append(
            "## Sensitivity of A2PR\n\nOne coefficient varied at a time, the others as in use. All "
            "values of a coefficient are members of one run.\n\n"
            + report.table(["dataset", "coefficient", "value", "score"], body) + "\n"
        )  # fmt: skip
    body = [
        [
            r["dataset"],
            NAMES[r["agent"]],
            span(r["return"], r["return_interval"], 0),
            span(r["score"], r["score_interval"]),
            span(r["iqm_score"], r["iqm_interval"]),
            f"{r['members']} × {r['episodes']}",
        ]
        for r in sorted(rows, key=lambda r: names.index(r["dataset"]))
    ]
    heads = ["dataset", "agent", "return", "score", "IQM of scores", "members × episodes"]
    parts.append(f"## Every training\n\n{report.table(heads, body)}\n")
    if missing:
        parts.append(f"## Missing: {len(missing)} trainings\n\n{report.bullets(missing)}")
    return "\n".join(parts)


def scale(runs: Sequence[Record]) -> str:
    """One line per agent on what was trained, from the records themselves."""
    first = {run["agent"]: run for run in reversed(runs)}
    lines = []
    for agent in dict.fromkeys(run["agent"] for run in runs):
        run = first[agent]
        extra = f", N {run['config']['samples']}" if agent == "cql" else ""
        lines.append(
            f"{NAMES[agent]}: {run['updates']} updates of {run['settings']['batch_size']} "
            f"transitions, {report.layers(run['config'])}{extra}"
        )
    return report.bullets(lines)


def mixture_panels(
    rows: Sequence[dict[str, Any]], facts: dict[str, Any]
) -> dict[str, list[Series]]:
    """Score against the expert's share, one panel per robot."""
    cells = {(r["dataset"], r["agent"]): r for r in rows}
    panels = {}
    for robot, names in MIXTURES.items():
        known = [name for name in names if name in facts]
        if not any((name, agent) in cells for name in known for agent in NAMES):
            continue
        share = {name: int(name.split("-")[-2]) for name in names}
        scores = [to_score(facts[n]["mean_return"], facts[n]["reference_returns"]) for n in known]
        series = [Series("mean of the data", [share[n] for n in known], scores, "#444444", "--")]
        for number, agent in enumerate(NAMES):
            if there := [cells[n, agent] for n in names if (n, agent) in cells]:
                x = np.array([share[r["dataset"]] for r in there]) * 1.03 ** (number - 2)
                ends = np.array([r["score_interval"] for r in there]).T
                series.append(Series(NAMES[agent], x, [r["score"] for r in there], COLOURS[agent],
                                     y_ends=ends))  # fmt: skip
        panels[f"{robot}, expert and random"] = series
    return panels


def draw(panels: dict[str, list[Series]], path: Path) -> None:
    def shares(_: str, axes: Any) -> None:
        axes.set(xscale="log")
        axes.set_xticks([1, 5, 10, 25, 50], ["1", "5", "10", "25", "50"])
        axes.minorticks_off()

    report.plot(
        panels, path, x="expert's share of the rows, %", y="score", size=(5, 3.6), each=shares,
        title="Mean and 95 % interval over members and episodes. Not D4RL's data.",
    )  # fmt: skip


def draw_curves(entries: Sequence[dict[str, Any]], facts: dict[str, Any], path: Path) -> None:
    """Scores during training, one panel per dataset: mean of the members, and their range."""
    panels: dict[str, list[Series]] = {}
    for e in (e for e in entries if e["run"] and e["varied"] is None):
        curve, agent = e["run"]["curve"], e["agent"]
        scores = to_score(curve["returns"], facts[e["dataset"]]["reference_returns"])
        panels.setdefault(e["dataset"], []).append(
            Series(NAMES[agent], curve["updates"], scores.mean(1), COLOURS[agent], "-",
                   band=(scores.min(1), scores.max(1)))
        )  # fmt: skip
    report.plot(panels, path, x="updates", y="score", columns=5, size=(3, 2.4))
