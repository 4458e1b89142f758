"""Constrained agents on DSRL by its protocol, beside published results.

    python -m benchmarks dsrl --suite velocity --agents caps cpq
    python -m benchmarks dsrl --data FOLDER --no-download

The last policy of three seeds at each of a task's three limits, 20 episodes each. Rewards and costs
are normalised as DSRL does. Settings are those of ``configs/``, mostly OSRL's; `docs/agents` says
where an agent departs from OSRL's code on purpose.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.report import interval, limit_verdict, shown, span, to_score
from benchmarks.runner import Finished, play
from benchmarks.store import Key
from benchmarks.studies.limits import by_limit, with_costs
from benchmarks.studies.public import Method, Public, Suite, published
from benchmarks.study import add

GROUPS = {"velocity": "velocity", "navigation": "navigation", "bullet": "bullet",
          "metadrive": "metadrive"}  # fmt: skip
PREFIX = {"navigation": "safety-gymnasium/", "velocity": "safety-gymnasium/", "bullet": "bullet/"}
OSRL = "OSRL's configurations and DSRL's tables: three limits, three seeds, 20 episodes"
# OSRL's setting of behaviour cloning, where ours for D4RL is CORL's.
CLONE = {"lr": 1e-3, "batch_size": 512, "normalize_observations": False}
METHODS = {
    "bc": Method("BC-All", "bc", CLONE),
    "bc_safe": Method("BC-Safe", "bc_safe"),
    "caps": Method("CAPS", "caps"),
    "bcq_lag": Method("BCQ-Lag", "bcq_lag"),
    "cpq": Method("CPQ", "cpq"),
    "coptidice": Method("COptiDICE", "coptidice"),
    "a2pr_limited": Method("A2PR under the limit", "a2pr"),
}
UNLIMITED = ("bc", "caps")  # trained without a limit; CAPS is told at run time


@cache
def tasks() -> dict[str, dict[str, Any]]:
    """DSRL's constants of each task by its short name, PointGoal1 for OfflinePointGoal1-v0."""
    from saferl.data.sources import dsrl

    found = {}
    for id in dsrl.ids():
        name = id.removeprefix("Offline").removeprefix("Metadrive-").split("-v")[0]
        found[name.removesuffix("Gymnasium")] = dsrl.task(id)
    return found


class DSRL(Public):
    name, methods = "dsrl", METHODS
    heading = "DSRL"
    about = (
        "*reward* and *cost* are normalised as DSRL does: (R − least) / (greatest − least) of the "
        "dataset's episodes, and C / limit; at each limit the mean over seeds and episodes with a "
        "95 % interval over both. *limit*: *met* if the interval of the cost ends at or below 1, "
        "*not met* if it begins above. *average* is over the limits, as published tables have it: "
        "a policy that breaks the lowest limit can look fine there."
    )

    @property
    def suites(self) -> dict[str, Suite]:  # type: ignore[override]
        return {
            suite: Suite(
                tuple(name for name, row in tasks().items() if row["group"] == group),
                200_000 if group == "metadrive" else 100_000, 3, 20, OSRL,
            )
            for suite, group in GROUPS.items()
        }  # fmt: skip

    def options(self, parser: ArgumentParser) -> None:
        super().options(parser)
        add(parser, "--limits", None, "instead of each task's three", nargs="+", type=float)

    def keys(self, options: Namespace) -> list[Key]:
        found = super().keys(options)
        for key in found:
            limits = options.limits or tasks()[key["dataset"].split("/")[1]]["limits"]
            key["limits"] = [float(limit) for limit in limits]
            if key["method"] not in UNLIMITED:
                key["settings"] |= {"cost_limit": key["limits"]}
        return found

    def like(self, dataset: str) -> str:
        return f"dsrl/{tasks()[dataset]['ids'][0]}"

    def file_of(self, dataset: str) -> str:
        return tasks()[dataset]["file"]

    def environment(self, key: Key, data: Any) -> str:
        from saferl.registry import make_env

        row = tasks()[key["dataset"].split("/")[1]]
        if data.card.env_id is not None or row["group"] not in PREFIX:
            return super().environment(key, data)
        env = PREFIX[row["group"]] + row["env"]
        make_env(env).close()
        return env

    def played(self, key: Key, run: Finished, env: str) -> dict[str, Any]:
        def reach(policy: Any) -> dict[str, Any]:
            return with_costs(play(policy, env, key["episodes"]))

        agent, limits = run.run.agent, key["limits"]
        if key["method"] == "caps":
            return {"played": {f"{limit:g}": reach(agent.policy_for(limit)) for limit in limits}}
        if key["method"] in UNLIMITED:
            return {"played": {"any": reach(run.policy)}}
        return {"played": by_limit(reach(run.policy), limits, key["members"])}

    def told(self, run: dict[str, Any]) -> str:
        rows = [f"@{limit} {np.mean(part['returns']):.1f}/{np.mean(part['costs']):.1f}"
                for limit, part in run["played"].items()]  # fmt: skip
        return f"return/cost {', '.join(rows)} ({run['seconds']:.0f} s)"

    def table(self, entries: Sequence[dict[str, Any]], facts: dict[str, Any]) -> str:
        columns = [c for c in self.references()
                   if any(applies(c, e) for e in entries)]  # fmt: skip
        lines = []
        for entry in (entry for entry in entries if entry["run"]):
            name = entry["dataset"].split("/", 1)[1]
            start, averages = [name, self.methods[entry["method"]].title], []
            for limit in entry["limits"]:
                played = entry["run"]["played"]
                part = played.get("any") or played[f"{limit:g}"]
                reward = to_score(part["returns"], facts[entry["dataset"]]["reference_returns"])
                reward, least = reward / 100, 1.0 if limit == 0 else 0.0
                cost = (np.array(part["costs"]) + least) / (limit + least)
                low, high = interval(cost)
                ends = max(low, 0.0), high
                averages.append((reward.mean(), cost.mean()))
                lines.append([
                    *start, f"{limit:g}", shown(reward, 2), span(cost.mean(), ends, 2),
                    limit_verdict(*ends, 1.0), *("" for _ in columns),
                ])  # fmt: skip
            reward, cost = np.mean(averages, 0)
            theirs = [published(c, entry["method"], entry["dataset"]) if applies(c, entry) else None
                      for c in columns]  # fmt: skip
            lines.append([*start, "average", f"{reward:.2f}", f"{cost:.2f}", "",
                          *(f"{x[0]:.2f} / {x[1]:.2f}" if x else "–" for x in theirs)])  # fmt: skip
        heads = ["dataset", "agent", "limit", "reward", "cost", "limit kept",
                 *(f"{column['name']}, reward / cost" for column in columns)]  # fmt: skip
        return report.table(heads, lines)


def applies(column: dict[str, Any], entry: dict[str, Any]) -> bool:
    """Whether a column of published numbers is of the entry's limits, and has it."""
    own = tasks()[entry["dataset"].split("/")[1]]["limits"]
    limits = own if column["limits"] == "all three" else column["limits"]
    found = published(column, entry["method"], entry["dataset"])
    return found is not None and [*map(float, limits)] == entry["limits"]


STUDY = DSRL()
