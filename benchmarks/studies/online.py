"""Offline data and an environment together: what each method gains.

A training is one task and one method with all its seeds. docs/benchmarks/online.md says what is
compared. No data are published ones: cartpole's are made here, the others saferl's.
"""

from __future__ import annotations

import csv
import tempfile
from argparse import ArgumentParser, Namespace
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.report import Series, interval, judged, shown, span, verdict
from benchmarks.runner import play, trained
from benchmarks.store import Key, Record, Store
from benchmarks.studies import online_tasks as tasks
from benchmarks.studies.online_tasks import LIMIT, METHODS, TASKS
from benchmarks.study import Trained, add

Row = dict[str, Any]
PROBES = 512  # logged states at which Q(s, π(s)) is followed
CURVE_EPISODES = 2
LEVEL = 0.1  # share of its mean that a level return may differ by
SAME = {"cartpole, random data": "cartpole"}  # where SAC alone is trained
ONLINE, UNLIMITED = ("online", ""), ("limits", "cost_limit=inf")
# What is set against what, on each task that has both; of final return and area.
PAIRS = (
    *((one, ONLINE) for one in (
        ("mixed_norm", ""), UNLIMITED, ("mixed_meta", "eta=1"), ("meta", "eta=1"), ("mixed", ""),
        ("one_buffer", ""), ("blocks", ""), ("meta_fast", ""), ("meta", "eta=0.5"), ("moorl", ""),
        ("moorl_norm", ""), ("iql", ""), ("rlpd", ""), ("cal_ql", ""), ("wsrl", ""),
    )),
    (("rlpd_20", ""), ("rlpd", "")),
    (("blocks", ""), ("mixed", "")),
    (("moorl", ""), ("blocks", "")),
    (("mixed_norm", ""), ("mixed", "")),
    (UNLIMITED, ("mixed", "")),
    (("meta_fast", ""), ("meta", "eta=1")),
    (("meta", "eta=0.5"), ("meta", "eta=1")),
    (("meta_norm", "eta=0.9"), ("meta_norm", "eta=1")),
    (("meta_20", "eta=0.5"), ("meta_20", "eta=1")),
    (("meta", "eta=1"), ("mixed_meta", "eta=1")),
    (("mixed_meta", "eta=0.5"), ("mixed_meta", "eta=1")),
    (("meta", "eta=0.5"), ("mixed_meta", "eta=0.5")),
    (("mixed_norm", ""), ("mixed_meta", "eta=1")),
    (("moorl_norm", ""), ("moorl", "")),
    (("moorl_norm", ""), ("mixed_norm", "")),
    (("moorl_norm", ""), UNLIMITED),
)  # fmt: skip


class Online(Trained):
    name = "online"

    def options(self, parser: ArgumentParser) -> None:
        add(parser, "--tasks", tuple(TASKS), choices=TASKS)
        add(parser, "--methods", None, nargs="+", choices=METHODS)
        add(parser, "--members", 5, "seeds, side by side")
        add(parser, "--steps", None, "environment steps, instead of each task's", type=int)
        add(parser, "--episodes", 5, "per seed, of the last policy")
        add(parser, "--size", None, "transitions of each dataset", type=int)
        add(parser, "--hidden", 0, "one layer of so many units, for a try")

    def keys(self, options: Namespace) -> list[Key]:
        found = []
        for task, method in tasks.schedule(options.tasks, options.methods):
            facts, how = TASKS[task], METHODS[method]
            settings = tasks.settings_of(facts, how)
            if options.hidden:
                sizes = [k for k in ("hidden", "critic_hidden") if k in settings]
                settings |= {size: [options.hidden] for size in sizes}
            found.append({
                "task": task,
                "method": method,
                "dataset": facts.data,
                "agent": how.agent,
                "steps": options.steps or facts.steps,
                "members": options.members,
                "size": options.size,
                "guard": how.guard,
                "settings": settings,
            })  # fmt: skip
        return found

    def dataset(self, key: Key, options: Namespace) -> Any:
        return tasks.dataset_of(key["dataset"], key["size"])

    def train(self, key: Key, data: Any, options: Namespace) -> Record:
        import saferl

        task, episodes = TASKS[key["task"]], options.episodes
        first, env = key["settings"].get("offline_steps", 0), tasks.environment(task.env)
        every, total = key["steps"] // task.evaluations, first + key["steps"]
        plan: dict[str, Any] = {
            "eval_interval": every, "eval_episodes": min(CURVE_EPISODES, episodes),
            "keep_checkpoints": total // every + 1, "log_interval": max(1, every // 20),
        }  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            source, before = data, 0.0
            if key["agent"] == "wsrl":
                source, plan["start_from"] = None, Path(folder) / "before"
                before = pretrain(data, key, plan["start_from"], task)
            guard = tasks.guard if key["guard"] else None
            with trained(key, source, steps=total, env=env, guard=guard, **plan) as run:
                steps, config = run.evaluated, run.run.agent.config
                probes = [probe_values(saferl.load_agent(run.path, s), data) for s in steps]
                played = {"bare": play(run.policy, env, episodes)}
                if key["guard"]:
                    played["guarded"] = guarded(run.policy, env, episodes)
                counts = updates_of(run.run.agent, task, key)
                costs = tasks.passes(key["agent"], config)
                return run.summary() | {
                    "played": played,
                    "curve": {"steps": [s - first for s in steps], "returns": run.curve()},
                    "probe": {
                        "mean": [np.round(mean, 3).tolist() for mean, _ in probes],
                        "largest": [np.round(largest, 3).tolist() for _, largest in probes],
                    },
                    "metrics": metrics_of(run.path / "metrics.csv", first),
                    "updates": counts,
                    "passes": sum(counts[part] * costs[part] for part in ("critic", "actor")),
                    "seconds": {
                        "cpu": round(before + run.cpu_seconds, 1), "wall": round(run.seconds, 1),
                    },
                }  # fmt: skip

    def label(self, key: Key) -> str:
        return f"{key['task']}: {key['method']}"

    def told(self, run: Record) -> str:
        curve, last = (
            ", ".join(f"{np.mean(row):.0f}" for row in rows)
            for rows in (run["curve"]["returns"], run["played"]["bare"]["returns"])
        )
        return f"{curve}; last policies {last} ({run['seconds']['cpu']:.0f} s)"

    def results(self, store: Store, entries: list[dict[str, Any]], path: Path) -> str:
        finished = [entry for entry in entries if entry["run"]]
        finished.sort(key=lambda entry: list(METHODS).index(entry["method"]))
        rows = [row for entry in finished for row in rows_of(entry)]
        missing = [self.label(entry) for entry in entries if not entry["run"]]
        draw(rows, path.with_suffix(".png"))
        return (
            "# Offline data and an environment together\n\n![return over steps](online.png)\n\n"
            + markdown(rows, store.datasets, missing)
            + f"\n{store.source()}, one thread of a machine that was busy with other work.\n"
        )


STUDY = Online()


# Training ----------------------------------------------------------------------------------------


def pretrain(data: Any, key: Key, out: Path, task: tasks.Task) -> float:
    """Cal-QL on the data alone, as WSRL begins, kept at ``out``; its seconds of the processor."""
    import shutil

    method = tasks.Method("", "cal_ql", tasks.BEFORE_WSRL)
    sizes = key["settings"]["hidden"]
    settings = tasks.settings_of(task, method) | {"hidden": sizes, "critic_hidden": sizes}
    own = key | {"agent": "cal_ql", "settings": settings}
    with trained(own, data, steps=settings["offline_steps"], env=tasks.environment(task.env),
                 eval_interval=0, eval_episodes=1) as run:  # fmt: skip
        shutil.copytree(run.path, out)
        return run.cpu_seconds


def probe_values(agent: Any, data: Any) -> tuple[np.ndarray, np.ndarray]:
    """Mean and largest of Q(s, π(s)) ``[M]`` over fixed logged states; Q: mean of the ensemble."""
    import torch

    rows = np.random.default_rng(0).integers(len(data), size=PROBES)
    observations = torch.from_numpy(agent.spec.observations(data.observations[np.sort(rows)]))
    observations = observations.expand(agent.members, -1, -1)
    with torch.no_grad():
        q = agent.critic(observations, agent.actor.mode(observations)).mean(1)
    return q.mean(1).double().numpy(), q.amax(1).double().numpy()


def guarded(policy: Any, env: Any, episodes: int) -> dict[str, Any]:
    """Episodes of each member under the guard that stood between it and the environment."""
    parts = [play(tasks.guard(policy.member(m)), env, episodes) for m in range(policy.members)]
    return {name: [row for part in parts for row in part[name]] for name in parts[0]}


def metrics_of(path: Path, first: int) -> dict[str, Any]:
    """From metrics.csv while acting: largest mean Q of a batch, and what exploring cost.

    ``first``: step after which the members act. Each ``[M]``; the cost also as a curve.
    """
    series: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if int(row["step"]) > first:
                for name in ("q", "exploration_cost", "multiplier", "guard_changed", "step"):
                    if row.get(name):
                        series[name][int(row["member"])].append(float(row[name]))
    found: dict[str, Any] = {}
    values = {name: [own[m] for m in sorted(own)] for name, own in series.items()}
    if "q" in values:
        found |= {"q_largest": [max(v) for v in values["q"]],
                  "q_last": [v[-1] for v in values["q"]]}  # fmt: skip
    for name in ("multiplier", "guard_changed"):
        if name in values:
            found[name] = [float(np.mean(v[-max(1, len(v) // 10) :])) for v in values[name]]
    if "exploration_cost" in values:
        found["exploration_cost"] = [v[-1] for v in values["exploration_cost"]]
        found["spent"] = {"steps": [s - first for s in values["step"][0]],
                          "cost": np.mean(values["exploration_cost"], 0).tolist()}  # fmt: skip
    return found


def updates_of(agent: Any, task: tasks.Task, key: Key) -> dict[str, int]:
    """Gradient steps of critics and of the policy, pre-training included."""
    config, n = agent.config, agent.updates
    k = config.critic_steps
    own = k if getattr(config, "actor_steps", "each") == "each" else 1
    before = task.pretraining if key["agent"] == "wsrl" else 0
    return {"critic": n * k + before, "actor": n * own + before}


# Report ------------------------------------------------------------------------------------------


def rows_of(entry: Row) -> list[Row]:
    """A row per group of seeds of a finished training, with arrays of its seeds first."""
    run = entry["run"]
    variants = [" ".join(n.split(" ")[:-1]) for n in run["names"]]
    every, metrics = run["played"]["bare"], run["metrics"]
    steps = np.array(run["curve"]["steps"])
    acting, rows = steps > 0, []
    for variant in dict.fromkeys(variants):
        own = [m for m, name in enumerate(variants) if name == variant]

        def of(values: Any, own: list[int] = own) -> np.ndarray | None:
            return None if values is None else np.array(values, np.float64)[own]

        curve = of(np.array(run["curve"]["returns"]).T)  # [seeds, evaluations]
        guard = run["played"].get("guarded")
        rows.append({
            "task": entry["task"],
            "of": (entry["method"], variant),
            "title": tasks.title_of(entry["method"], variant),
            "seeds": len(own),
            "returns": of(every["returns"]),
            "costs": of(every["costs"]),
            "steps": steps,
            "curve": curve,
            "area": curve[:, acting].mean(1),
            "probe": of(np.array(run["probe"]["mean"]).T)[:, acting],
            "probe_largest": of(np.array(run["probe"]["largest"]).T)[:, acting],
            "q_largest": of(metrics.get("q_largest")),
            "updates": run["updates"]["critic"],
            "passes": run["passes"],
            "seconds": run["seconds"]["cpu"] / len(run["names"]),
            "explored": of(metrics.get("exploration_cost")),
            "multiplier": of(metrics.get("multiplier")),
            "guarded": guard and {name: of(guard[name]) for name in ("returns", "costs")},
            "changed": of(metrics["guard_changed"]) if guard else None,
        })  # fmt: skip
    return rows


def table(rows: Sequence[Row]) -> str:
    """Markdown of one task."""
    costs = any(row["costs"] is not None for row in rows)
    lines = [
        [
            row["title"],
            shown(row["returns"]),
            shown(row["area"]),
            *([shown(row["costs"], 0, 0.0)] if costs else []),
            shown(row["probe"][:, -1], 1),
            f"{row['probe_largest'].max():.1f}",
            "–" if row["q_largest"] is None else f"{row['q_largest'].max():.1f}",
            f"{row['updates'] / 1000:.1f}",
            f"{row['passes'] / 1000:.0f}",
            f"{row['seconds']:.0f}",
        ]
        for row in rows
    ]
    heads = ["method", "final", "area", *(["final cost"] if costs else []), "Q on probes",
             "largest on probes", "largest of a batch", "critic steps / 1000", "passes / 1000",
             "CPU s per seed"]  # fmt: skip
    return report.table(heads, lines)


def explored(rows: Sequence[Row]) -> str:
    """Markdown of what exploring cost under a guard and a limit; empty where nothing did."""
    base = next((row for row in rows if row["of"] == UNLIMITED), None)
    if base is None:
        return ""
    lines = []
    for row in rows:
        if row["explored"] is None:
            continue
        played = row["guarded"] or {"returns": row["returns"], "costs": row["costs"]}
        lines.append([
            row["title"],
            shown(row["explored"], 0, 0.0),
            f"{row['explored'].mean() / base['explored'].mean():.2f}",
            shown(played["returns"]),
            shown(played["costs"], 0, 0.0),
            f"{int((played['costs'].mean(1) <= LIMIT).sum())} of {row['seeds']}",
            "–" if row is base else judged(played["returns"], base["returns"]),
            "–" if row["guarded"] is None else f"{100 * row['changed'].mean():.0f} %",
            "–" if row["multiplier"] is None else f"{row['multiplier'].mean():.1f}",
        ])  # fmt: skip
    heads = ["method", "cost of exploring", "share", "return as run", "cost as run",
             f"within {LIMIT:g}", "return against no limit", "guard changed", "ρ"]  # fmt: skip
    return report.table(heads, lines)


def level_from(means: np.ndarray) -> int | None:
    """The first evaluation from which none is further than `LEVEL` from the mean of all of those.

    Four evaluations or more; None where there are no such.
    """
    for start in range(len(means) - 3):
        rest = means[start:]
        if rest.mean() > 0 and (abs(rest - rest.mean()) <= LEVEL * rest.mean()).all():
            return start
    return None


def settled(rows: Sequence[Row]) -> str:
    """Markdown: what Q at the probes does once the return is level; empty where none is."""
    lines = []
    for row in rows:
        acting = row["steps"] > 0
        steps, means = row["steps"][acting], row["curve"][:, acting].mean(0)
        start = level_from(means)
        if start is None:
            continue
        first, last = row["probe"][:, start], row["probe"][:, -1]
        ends = interval(last - first)
        change = span((last - first).mean(), ends, 1)
        lines.append([
            row["task"], row["title"], f"{steps[start]} to {steps[-1]}",
            f"{means[start:].mean():.0f}", f"{first.mean():.1f}", f"{last.mean():.1f}",
            f"{change}, {verdict(*ends, ('rising', 'falling', 'level'))}",
        ])  # fmt: skip
    heads = ["task", "method", "steps", "return", "Q at first", "at last", "change"]
    return report.table(heads, lines) if lines else ""


def comparisons(rows: Sequence[Row]) -> str:
    """Markdown: differences of final return and of area, with 95 % intervals."""
    found = {(row["task"], row["of"]): row for row in rows}
    lines = []
    for task in dict.fromkeys(row["task"] for row in rows):
        for one, other in PAIRS:
            a = found.get((task, one))
            b = found.get((SAME.get(task, task) if other == ONLINE else task, other))
            if a is not None and b is not None:
                cells = [judged(a[name], b[name]) for name in ("returns", "area")]
                lines.append([task, a["title"], b["title"], *cells])
    return report.table(["task", "this", "against", "final", "area"], lines) if lines else ""


def markdown(rows: Sequence[Row], datasets: dict[str, Any], missing: Sequence[str]) -> str:
    parts = [
        "**Scores come from generated data**: cartpole's sets are made by the command, the others "
        "are saferl's own. None compares with a published score, and none is MOORL's.\n",
        "Mean over seeds and episodes of the last policy (*final*), mean of the evaluations while "
        "acting (*area*), each with a 95 % interval over seeds (and episodes). Q on probes: mean "
        "of Q(s, π(s)) over 512 fixed logged states at the end; its largest value at any of them "
        "and any evaluation and seed; and the largest mean Q of a batch of any seed. Critic steps "
        "and passes through one network (forward 1, with gradient 3) are a seed's, pre-training "
        "included.\n",
    ]
    for task in (name for name in TASKS if any(row["task"] == name for row in rows)):
        own, facts = [row for row in rows if row["task"] == task], TASKS[task]
        data = datasets[facts.data]
        spent = data.get("mean_cost")
        cost = "" if spent is None else f" and a cost of {spent:.0f}"
        parts.append(
            f"## {task}\n\n`{facts.env}`, {own[0]['steps'][-1]} environment steps, "
            f"{facts.utd} critic step(s) each, {own[0]['seeds']} seeds. Data: `{facts.data}`, "
            f"{data['transitions']} transitions, episodes with a mean return of "
            f"{data['mean_return']:.0f}{cost} ({data['origin']}).\n\n{table(own)}\n"
        )
        if text := explored(own):
            parts.append(
                f"What exploring cost, and what the last policy does as it was trained (under its "
                f"guard, if any); limit {LIMIT:g} per episode.\n\n{text}\n"
            )
    if text := comparisons(rows):
        parts.append(
            "## Comparisons\n\nDifferences, with 95 % intervals; *above* or *below* if the "
            f"interval excludes 0.\n\n{text}\n"
        )
    if text := settled(rows):
        parts.append(
            "## Q once the return is level\n\nFrom the first evaluation after which the mean "
            f"return of the seeds stays within {100 * LEVEL:.0f} % of its mean over the rest (four "
            "evaluations or more): mean Q on the probes there and at the end, and the change with "
            f"its 95 % interval over seeds.\n\n{text}\n"
        )
    if missing:
        parts.append(f"## Not trained: {len(missing)}\n\n{report.bullets(missing)}")
    return "\n".join(parts)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Return over environment steps; the band is the range of the seeds.

    A panel per task, and one more for what learns under a limit or acts under a guard.
    """
    panels: dict[str, list[Series]] = {}
    shades = report.colours(list(dict.fromkeys(row["title"] for row in rows)))
    for row in sorted(rows, key=lambda row: list(TASKS).index(row["task"])):
        bound = "limit" in row["title"] or "guard" in row["title"]
        name = f"{row['task']}, under a limit or a guard" if bound else row["task"]
        mark = "os"[list(shades).index(row["title"]) // 20]
        curve = row["curve"]
        panels.setdefault(name, []).append(
            Series(row["title"], row["steps"], curve.mean(0), shades[row["title"]], f"{mark}-",
                   band=(curve.min(0), curve.max(0)))
        )  # fmt: skip
    report.plot(panels, path, x="environment steps", y="return per episode")
