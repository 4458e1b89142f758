"""CQL, GCQL, CCQL and GCCQL on ICU-Sepsis: learned from logged episodes, evaluated exactly.

20 000 episodes of clinicians. `discrete_cql` with a guardian in its backup (GCQL), with episodes
re-sampled by their most frequent action (CCQL) and with both (GCCQL), for several weights of the
penalty and three seeds each, all with the guardian of the study `ogsrl`. Survival, cost and share
of inadmissible steps of the learned greedy policies follow from the benchmark's tables, without
sampling.
"""

from __future__ import annotations

import time
from argparse import ArgumentParser, Namespace
from typing import Any

import numpy as np
import torch

from benchmarks import report
from benchmarks.icu.ogsrl import SETTINGS as OGSRL
from benchmarks.runner import one_thread
from benchmarks.study import Study, add
from saferl.agents.discrete_cql import DiscreteCQL
from saferl.envs import icu_sepsis as icu
from saferl.evaluation.exact import TabularTask, exact_values
from saferl.models.mdp import exact_evaluate
from saferl.replay import ReplayBuffer

WEIGHTS = (0.01, 0.1, 1.0)
GUARD = {key: OGSRL[key] for key in ("guardian", "guardian_options", "levels", "alpha",
                                     "calibration")}  # fmt: skip
WORST = {"ood_value": -1.0}  # returns, chances to survive, lie between 0 and 1
VARIANTS: dict[str, dict[str, Any]] = {
    "CQL": {},
    "GCQL": GUARD | WORST,
    "CCQL": {"balance": True},
    "GCCQL": GUARD | WORST | {"balance": True},
}
NAMES = ("return", "cost", "ood_rate")


def train(
    dataset: Any, settings: dict[str, Any], options: Namespace
) -> tuple[Any, dict[str, list]]:
    """Members are weights × seeds; returns the agent and means of its metrics at the end."""
    weights = [w for w in WEIGHTS for _ in range(options.seeds)]
    seeds = [seed for _ in WEIGHTS for seed in range(options.seeds)]
    config = DiscreteCQL.make_config(
        {"hidden": OGSRL["hidden"], "discount": OGSRL["discount"], "weight": weights} | settings
    )
    rows = DiscreteCQL.prepare(dataset, config)
    agent = DiscreteCQL(rows.spec(config), config, seeds)
    agent.fit(rows, lambda line: print(f"  {line}", flush=True))
    buffer = ReplayBuffer.from_dataset(rows, agent.spec, agent.seeds)
    last: dict[str, torch.Tensor] = {}
    share = max(1, options.updates // 10)
    for update in range(options.updates):
        metrics = agent.update(buffer.sample(config.batch_size))
        if update >= options.updates - share:
            last = {k: last.get(k, 0) + v / share for k, v in metrics.items()}
    return agent, {key: value.tolist() for key, value in last.items()}


def markdown(result: dict[str, Any]) -> str:
    clinician = result["clinician"]
    lines = [
        "# CQL with a guardian in its backup, on ICU-Sepsis",
        "",
        f"`{result['command']}`, {result['date']}; {result['machine']['cpu']}; {result['seeds']} "
        f"seeds, {result['updates']} updates.",
        "",
        f"{result['episodes']} logged episodes of clinicians. Survival (mean and standard "
        "deviation over seeds), cost (steps with SOFA ≥ 10 per patient) and inadmissible steps are "
        "exact for the greedy policy. *refused*: share of backups in which the guardian refused "
        "the greedy pair, over the last tenth of the updates. Clinicians: "
        f"{clinician['return']:.3f}, cost {clinician['cost']:.3f}, inadmissible "
        f"{clinician['ood_rate']:.3f}; best possible .875.",
        "",
    ]
    rows = []
    for row in result["rows"]:
        found = [np.array(row[name]) for name in NAMES]
        refused = row.get("refused")
        rows.append([
            row["variant"], f"{row['weight']:g}", f"{found[0].mean():.3f}", f"{found[0].std():.3f}",
            f"{found[1].mean():.3f}", f"{found[2].mean():.3f}",
            "" if refused is None else f"{np.mean(refused):.3f}",
        ])  # fmt: skip
    heads = ["variant", "weight", "survival", "±", "cost", "inadmissible", "refused"]
    return "\n".join([*lines, report.table(heads, rows)]) + "\n"


class GuardedCQL(Study):
    name, packages = "guarded_cql", ("icu-sepsis",)
    report = staticmethod(markdown)

    def options(self, parser: ArgumentParser) -> None:
        add(parser, "--updates", 5_000)
        add(parser, "--seeds", 3)
        add(parser, "--episodes", 20_000, "logged")

    def measure(self, options: Namespace) -> dict[str, Any]:
        one_thread()
        dataset = icu.make_dataset("clinician", options.episodes)
        task = TabularTask(icu.mdp("mean"), icu.observations(), "sofa10")
        rows = []
        for name, settings in VARIANTS.items():
            began = time.process_time()
            agent, metrics = train(dataset, settings, options)
            values = exact_values(task, agent.policy())
            for i, weight in enumerate(WEIGHTS):
                part = slice(i * options.seeds, (i + 1) * options.seeds)
                row = {"variant": name, "weight": weight} | {k: values[k][part] for k in NAMES}
                if "ood_rate" in metrics:
                    row["refused"] = metrics["ood_rate"][part]
                rows.append(row)
                shown = "  ".join(f"{k} {np.mean(row[k]):.3f}" for k in NAMES)
                print(f"{name}, weight {weight:g}: {shown}", flush=True)
            print(f"{name}: {time.process_time() - began:.0f} s of processor time", flush=True)
        found = exact_evaluate(icu.mdp("mean"), icu.policy())
        clinician = {"return": found.value, "cost": found.costs["sofa10"],
                     "ood_rate": found.ood_rate}  # fmt: skip
        scale = {name: getattr(options, name) for name in ("updates", "seeds", "episodes")}
        return self.header(options) | scale | {
            "variants": VARIANTS, "clinician": clinician, "rows": rows,
        }  # fmt: skip


STUDY = GuardedCQL()
