"""Do agents keep a cost limit? Velocity tasks at limits 20, 40 and 80 per episode.

A training is one dataset and one agent with all its members: five seeds, at each limit where the
agent is trained for one. The last policy of each member plays episodes from the same initial
states. docs/benchmarks/limits.md says what is compared. The data are saferl's own.
"""

from __future__ import annotations

import functools
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.report import Series, compare, interval, span
from benchmarks.runner import fields_of, narrowed, play, trained
from benchmarks.store import Key, Record, Store
from benchmarks.study import Trained, add

LIMITS = (20.0, 40.0, 80.0)
DATASETS = tuple(f"saferl/{r}-velocity-mixed-v0" for r in ("hopper", "halfcheetah", "walker2d"))
FOR_EACH_LIMIT = {"cost_limit": list(LIMITS)}
# By training: the agent and what is set besides its published values and the scale.
TRAININGS: dict[str, tuple[str, dict[str, Any]]] = {
    "bc_safe": ("bc_safe", {}),
    "caps": ("caps", {}),
    "bc": ("bc", {"lr": 1e-3}),  # as BC-Safe has it
    "td3_bc": ("td3_bc", {}),
    "a2pr": ("a2pr", {}),
    "coptidice": ("coptidice", FOR_EACH_LIMIT),
    "a2pr_limited": ("a2pr", FOR_EACH_LIMIT),
    "cpq": ("cpq", FOR_EACH_LIMIT),
    "bcq_lag": ("bcq_lag", FOR_EACH_LIMIT),
    # Cheap to ask: nearly all of the time goes into neighbours.
    "ogsrl": ("ogsrl", FOR_EACH_LIMIT | {"guardian": "gmm", "model_options": "rows=10000"}),
}
EXPENSIVE = ("coptidice", "a2pr_limited", "cpq", "bcq_lag", "ogsrl")
PLAYING = {"ogsrl": 0.01}  # updates that play episodes in a model: so many instead of one
CLONING = ("bc", "bc_safe")
# What a target of rate τ learns of costs with discount γ takes 1 / (τ (1 - γ)) updates to arrive,
# 20 000 at the published τ. Runs that short in comparison are given faster rates, all alike.
RATES = {"tau": 0.005, "multiplier_lr": 1e-3, "alpha_lr": 1e-4}
# Of what keeps a limit BC-Safe clones all, or the best tenth; members go in this order.
MEMBERS = {"bc_safe": {"best_fraction": [1.0, 0.1], "cost_limit": list(LIMITS)}}
RESERVE = 0.5  # of the limit, kept back by the shield for what stopping costs
# Rows of the report, and whether they are held to the limit.
BASE = "bc_safe"
NAMES: dict[str, tuple[str, bool]] = {
    "bc": ("BC", False),
    "td3_bc": ("TD3+BC", False),
    "a2pr": ("A2PR", False),
    "bc_safe": ("BC-Safe", True),
    "bc_safe_best": ("BC-Safe, best tenth", True),
    "bc_safe_best_shield": ("the same, shielded", True),
    "caps": ("CAPS", True),
    "caps_tracked": ("CAPS, budget tracked", True),
    "a2pr_limited": ("A2PR under the limit", True),
    "coptidice": ("COptiDICE", True),
    "cpq": ("CPQ", True),
    "bcq_lag": ("BCQ-Lag", True),
    "ogsrl": ("OGSRL", True),
}
MARKS = "osD^v<>Pphd*X"
SHARE = 0.8  # of the seeds that must keep the limit

Played = dict[str, dict[str, Any]]  # by limit, "any" where there is none: an array per quantity


class Limits(Trained):
    name, parallel = "limits", True

    def options(self, parser: ArgumentParser) -> None:
        add(parser, "--datasets", DATASETS)
        add(parser, "--trainings", tuple(TRAININGS), choices=TRAININGS)
        add(parser, "--updates", 10_000)
        add(parser, "--members", 5, "seeds, trained side by side")
        add(parser, "--episodes", 20, "per member, of the last policy")
        add(parser, "--size", None, "transitions of each dataset (default 100 000)", type=int)
        add(parser, "--hidden", 64, "units per layer; 0: as published")
        add(parser, "--batch-size", 64)
        add(parser, "--clone-batch-size", 256, "of BC and BC-Safe")
        add(parser, "--faster", 4.0, "factor of the rates of targets")
        add(parser, "--device", "cpu", "cpu, cuda or auto")

    def keys(self, options: Namespace) -> list[Key]:
        """Cheap trainings on all data, then all others, data by data."""
        cheap = [t for t in options.trainings if t not in EXPENSIVE]
        others = [t for t in options.trainings if t in EXPENSIVE]
        order = [(t, d) for t in cheap for d in options.datasets]
        order += [(t, d) for d in options.datasets for t in others]
        return [
            {
                "dataset": dataset,
                "training": training,
                "agent": TRAININGS[training][0],
                "updates": max(1, round(options.updates * PLAYING.get(training, 1))),
                "members": options.members,
                "size": options.size,
                "settings": settings_of(training, dataset, options),
            }
            for training, dataset in order
        ]

    def facts(self, data: Any) -> dict[str, Any]:
        cost = data.episode_costs()
        within = {f"{limit:g}": float((cost <= limit).mean()) for limit in LIMITS}
        return super().facts(data) | {"within": within}

    def train(self, key: Key, data: Any, options: Namespace) -> Record:
        start = time.perf_counter()
        varied = key | {"settings": key["settings"] | MEMBERS.get(key["training"], {})}
        with trained(varied, data, steps=key["updates"], device=options.device, eval_interval=0,
                     eval_episodes=1) as run:  # fmt: skip
            played = dict(rows_of(key, run.run.agent, data.card.env_id, options.episodes))
            return run.summary() | {
                "played": played,
                "seconds": {
                    "training": round(run.seconds, 1),
                    "evaluation": round(time.perf_counter() - start - run.seconds, 1),
                },
            }

    def label(self, key: Key) -> str:
        return f"{key['dataset']}: {key['training']}"

    def told(self, run: Record) -> str:
        rows = [
            f"{row}@{limit} {np.mean(part['returns']):.0f}/{np.mean(part['costs']):.0f}"
            for row, played in run["played"].items()
            for limit, part in played.items()
        ]
        return f"return/cost {', '.join(rows)} ({sum(run['seconds'].values()):.0f} s)"

    def results(self, store: Store, entries: list[dict[str, Any]], path: Path) -> str:
        rows = summaries(entries)
        missing = [self.label(entry) for entry in entries if not entry["run"]]
        store.content |= {"rows": rows, "missing": missing}
        draw(rows, path.with_suffix(".png"))
        finished = [entry["run"] for entry in entries if entry["run"]]
        return (
            "# Do agents keep a cost limit?\n\n![return against cost](limits.png)\n\n"
            + markdown(rows, store.datasets, missing)
            + f"\n## Scale\n\n{scale(finished)}\nSeconds are of the wall on a machine that was "
            + f"busy with other work.\n\n{store.source()}.\n"
        )


STUDY = Limits()


# Training ----------------------------------------------------------------------------------------


def settings_of(training: str, dataset: str, options: Namespace) -> dict[str, Any]:
    """Published values, the scale, what all have alike, and what the training varies."""
    from saferl.runs.settings import published

    agent, own = TRAININGS[training]
    settings = published(agent, dataset) | narrowed(agent, options.hidden)
    settings["normalize_observations"] = True
    if training not in PLAYING:
        cloning = agent in CLONING
        settings["batch_size"] = options.clone_batch_size if cloning else options.batch_size
    fields = fields_of(agent)
    if "tau" in fields:
        settings |= {name: options.faster * rate for name, rate in RATES.items() if name in fields}
    if agent == "caps":
        settings["actor_decay_steps"] = options.updates
    return settings | own


def rows_of(key: Key, agent: Any, env: str, episodes: int) -> Iterator[tuple[str, Played]]:
    """Each row of the report that the training yields, with what its policies reached."""
    from saferl.safety import Shield

    def run(policy: Any) -> dict[str, Any]:
        return with_costs(play(policy, env, episodes, digits=1))

    def each(policy_of: Callable[[int], Any]) -> dict[str, Any]:
        """Policies of one member, seed by seed."""
        parts = [run(policy_of(seed)) for seed in range(seeds)]
        return {name: [row for part in parts for row in part[name]] for name in parts[0]}

    def at_limits(policies: Callable[[float], Any], each_of: Callable = run) -> Played:
        return {f"{limit:g}": each_of(policies(limit)) for limit in LIMITS}

    training, policy, seeds = key["training"], agent.policy(), key["members"]
    if training == "caps":
        from saferl.agents.caps import tracked

        def spending(limit: float, seed: int) -> Any:
            return tracked(policy.member(seed), limit)

        yield training, at_limits(agent.policy_for)
        spent = at_limits(lambda limit: functools.partial(spending, limit), each)
        yield "caps_tracked", spent
    elif training == "bc_safe":
        played, best = run(policy), len(LIMITS) * seeds
        yield training, by_limit(played, LIMITS, seeds)
        yield "bc_safe_best", by_limit(played, LIMITS, seeds, best)

        def guarded(limit: float, seed: int) -> Any:
            number = LIMITS.index(limit) * seeds + seed
            return Shield(policy.member(best + number), fallback=policy.member(number),
                          cost_limit=limit, reserve=RESERVE * limit)  # fmt: skip

        shielded = at_limits(lambda limit: functools.partial(guarded, limit), each)
        yield "bc_safe_best_shield", shielded
    elif "cost_limit" in key["settings"]:
        yield training, by_limit(run(policy), LIMITS, seeds)
    else:
        yield training, {"any": run(policy)}


def with_costs(played: dict[str, Any]) -> dict[str, Any]:
    """Of an environment without costs they are 0."""
    return played | {"costs": played["costs"] or np.zeros_like(played["returns"]).tolist()}


def by_limit(played: dict[str, Any], limits: Sequence[float], seeds: int, first: int = 0) -> Played:
    """Members from number ``first`` on go limit by limit, within one by seed."""
    starts = [first + i * seeds for i in range(len(limits))]
    return {f"{limit:g}": {k: v[start : start + seeds] for k, v in played.items()}
            for limit, start in zip(limits, starts)}  # fmt: skip


# Summaries ---------------------------------------------------------------------------------------


def summary(
    dataset: str, row: str, limit: float, part: dict[str, Any], base: dict[str, Any] | None
) -> dict[str, Any]:
    """Return, cost and verdicts of one row at one limit; intervals at 95 %.

    ``part`` and ``base`` (BC-Safe's at that limit) have arrays ``[seeds, episodes]``.
    """
    returns, costs = np.array(part["returns"]), np.array(part["costs"])
    low, high = interval(costs)
    low = max(low, 0.0)
    within = int((costs.mean(1) <= limit).sum())
    found = {
        "dataset": dataset,
        "row": row,
        "limit": limit,
        "seeds": len(returns),
        "episodes": returns.shape[1],
        "return": float(returns.mean()),
        "return_interval": list(interval(returns)),
        "cost": float(costs.mean()),
        "cost_interval": [low, high],
        "cost_ratio": float(costs.mean() / limit),
        "within": within,
        "limit_verdict": report.limit_verdict(low, high, limit),
        "length": float(np.mean(part["lengths"])),
        "against": None,
        "passes": False,
    }
    if base is not None and row != BASE:
        difference, least, most = compare(returns, np.array(base["returns"]))
        found["against"] = {"difference": difference, "interval": [least, most],
                            "verdict": report.verdict(least, most)}  # fmt: skip
        found["passes"] = within >= SHARE * len(returns) and difference > 0
    return found


def summaries(entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A summary per dataset, limit and row, in the order of `NAMES`."""
    played: dict[tuple[str, str], dict[str, Any]] = {}
    for entry in entries:
        for row, parts in (entry["run"]["played"] if entry["run"] else {}).items():
            played[entry["dataset"], row] = parts
    found = []
    for dataset in dict.fromkeys(entry["dataset"] for entry in entries):
        for limit in LIMITS:
            base = played.get((dataset, BASE), {}).get(f"{limit:g}")
            for row in NAMES:
                if parts := played.get((dataset, row)):
                    part = parts.get("any") or parts[f"{limit:g}"]
                    found.append(summary(dataset, row, limit, part, base))
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown for one task and limit."""
    lines = []
    for row in rows:
        name, limited = NAMES[row["row"]]
        against = row["against"]
        lines.append([
            f"**{name}**" if row["passes"] and limited else name if limited else f"*{name}*",
            span(row["return"], row["return_interval"], 0),
            span(row["cost"], row["cost_interval"]),
            f"{row['cost_ratio']:.2f}",
            f"{row['within']} of {row['seeds']}",
            row["limit_verdict"],
            f"{row['length']:.0f}",
            f"{against['difference']:+.0f}, {against['verdict']}" if against else "–",
        ])  # fmt: skip
    heads = ["agent", "return", "cost", "cost / limit", "seeds within", "limit", "length",
             "return against BC-Safe"]  # fmt: skip
    return report.table(heads, lines)


def keepers(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: how often each constrained row passes, and where it does not and why."""
    lines = []
    for row in NAMES:
        own = [r for r in rows if r["row"] == row]
        if not own or row == BASE or not NAMES[row][1]:
            continue
        failed = []
        for r in own:
            reasons = []
            if r["within"] < SHARE * r["seeds"]:
                reasons.append(f"cost {r['cost']:.0f}, {r['within']} of {r['seeds']} within")
            if r["against"] and r["against"]["difference"] <= 0:
                reasons.append(f"{r['against']['difference']:.0f} against BC-Safe")
            if reasons:
                failed.append(f"{robot(r['dataset'])} at {r['limit']:g} ({'; '.join(reasons)})")
        text = f"{NAMES[row][0]}: {len(own) - len(failed)} of {len(own)}"
        lines.append(f"{text}. Not: {', '.join(failed)}." if failed else f"{text}.")
    return report.bullets(lines)


def robot(dataset: str) -> str:
    return dataset.split("/")[-1].split("-")[0]


def markdown(
    rows: Sequence[dict[str, Any]], datasets: dict[str, Any], missing: Sequence[str]
) -> str:
    names = list(dict.fromkeys(row["dataset"] for row in rows))
    facts = [
        [name, f"{datasets[name]['mean_return']:.0f}", f"{datasets[name]['mean_cost']:.0f}",
         *(f"{100 * datasets[name]['within'][f'{limit:g}']:.0f} %" for limit in LIMITS)]
        for name in names
    ]  # fmt: skip
    heads = ["data", "return", "cost", *(f"episodes within {limit:g}" for limit in LIMITS)]
    parts = [
        "**The data are generated by saferl; none of these numbers compare with DSRL's.** Costs "
        "are undiscounted sums per episode, 1 for each of at most 1000 steps that is too fast.\n",
        report.table(heads, facts) + "\n",
        "## Who keeps the limits\n\nOf the tasks and limits below, how many an agent passes: at "
        f"least {SHARE:.0%} of its seeds cost no more than the limit, each by the mean of its "
        "episodes, and its mean return is above BC-Safe's.\n",
        keepers(rows),
        "## Tables\n\nMean over seeds and episodes of the last policy, with a 95 % interval over "
        "both. *In italics*: not held to any limit. **In bold**: passes. Limit: *met* if the "
        "interval of the cost ends at or below it, *not met* if it begins above. Last column: "
        "difference of mean returns; *above* or *below* if its 95 % interval excludes 0.\n",
    ]
    for name in names:
        for limit in LIMITS:
            own = [r for r in rows if r["dataset"] == name and r["limit"] == limit]
            parts.append(f"### {name}, limit {limit:g}\n\n{table(own)}\n")
    if missing:
        parts.append(f"## Not trained: {len(missing)}\n\n{report.bullets(missing)}")
    return "\n".join(parts)


def scale(runs: Sequence[Record]) -> str:
    """A line per training on what was trained, from the records themselves."""
    lines = []
    for training in dict.fromkeys(run["training"] for run in runs):
        own = [run for run in runs if run["training"] == training]
        run, seconds = own[0], [sum(r["seconds"].values()) for r in own]
        config = run["config"]
        each = f"{config['batch_size']} transitions"
        if "episodes" in config:
            each = f"{config['episodes']} episodes of {config['horizon']} steps in a model"
        lines.append(
            f"{training}: {len(run['names'])} members, {run['updates']} updates of {each}, "
            f"{report.layers(config)}; {min(seconds):.0f} to {max(seconds):.0f} s"
        )
    return report.bullets(lines)


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Return against cost: a panel per task and limit, the limit drawn."""
    shades = report.colours(list(NAMES))
    panels: dict[str, list[Series]] = {}
    for row in rows:
        label, limited = NAMES[row["row"]]
        panels.setdefault(f"{robot(row['dataset'])}, limit {row['limit']:g}", []).append(
            Series(
                label, [row["cost"]], [row["return"]], shades[row["row"]],
                MARKS[list(NAMES).index(row["row"])], x_ends=row["cost_interval"],
                y_ends=row["return_interval"], hollow=not limited,
            )
        )  # fmt: skip

    def limit(name: str, axes: Any) -> None:
        axes.axvspan(0, float(name.split()[-1]), color="#2e8b57", alpha=0.08, lw=0)
        axes.set_xscale("symlog", linthresh=10)
        axes.set_xlim(-1, 1100)
        axes.set_xticks([0, 10, 100, 1000], ["0", "10", "100", "1000"])

    report.plot(panels, path, x="cost per episode (linear below 10); hollow: not held to a limit",
                y="return per episode", columns=len(LIMITS), each=limit,
                share={"sharex": True, "sharey": "row"})  # fmt: skip
