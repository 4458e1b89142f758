"""OGSRL's variants on ICU-Sepsis, learned from logged episodes and evaluated exactly.

20 000 episodes of clinicians; a cost of 1 per step with a SOFA score of 10 or more, and a budget of
0.592 per patient, 0.8 of the clinicians'. Each method trains five members from a clone of the
clinicians, with the dose columns among the observations and without. Settings were chosen on the
data of seed 0; what is reported comes from those of --data-seed, 1. The learned policies are
stochastic, and their survival, cost and share of inadmissible steps follow from the benchmark's
tables without sampling; so does what their own model promises of them.

Interrupted, it goes on at the last checkpoint of the cell that it was in; cells that are done are
kept (--fresh starts over).
"""

from __future__ import annotations

import json
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import report
from benchmarks.report import Series
from benchmarks.store import now, write_json
from benchmarks.study import Study, add
from saferl.agents.bc import DiscreteBC
from saferl.agents.ogsrl import DiscreteOGSRL
from saferl.envs import icu_sepsis as icu
from saferl.models.mdp import exact_evaluate
from saferl.models.planning import plan_constrained
from saferl.replay import ReplayBuffer

BUDGET = 0.592
CLINICIAN = 0.782
OPTIMUM = 0.8711  # best survival within the budget
CLONE = 3000  # updates, of the clone that all begin with and of BC
EVERY = 25  # iterations between two points of a curve, and between checkpoints
PROMISE = 0.99999  # discount of the model's own values: its episodes may last long
SETTINGS: dict[str, Any] = {
    "hidden": [64, 64],
    "clone_updates": CLONE,
    "model": "tabular",
    "model_options": "prior=3",  # else pairs of few rows can lead back to themselves for good
    "levels": [icu.LEVELS, icu.LEVELS],
    "guardian": "kde",
    "guardian_options": "bandwidth=0.15 scaling=minmax neighbours=none",
    "alpha": 0.15,
    "calibration": 0.25,
    "episodes": 1024,
    "horizon": 30,
    "kl": 0.05,
    "damping": 0.3,
    "smoothing": 0.5,
    "discount": 0.999,  # the reward, survival, comes last: a patient in a hurry is no better off
    "cost_discount": 1.0,
    "ood_probability": 0.2,  # 0.06 of the episodes meet a state without a supported action
}
LIMIT = {"cost_limit": BUDGET}
METHODS: dict[str, dict[str, Any] | None] = {
    "BC": None,
    "MB-TRPO": {"optimiser": "trpo", "guardian": "none"},
    "MB-CPO": {"guardian": "none"} | LIMIT,
    "GMB-CPO": LIMIT,
    "GMB-PPO-Lag": {"optimiser": "ppo_lag"} | LIMIT,
}
DOSES = {"both": (True, False), "with": (True,), "without": (False,)}
NAMES = ("survival", "cost", "ood_rate", "promised", "promised_cost")


def policies(agent: Any, observations: torch.Tensor) -> np.ndarray:
    """Probabilities ``[M, S, 25]`` in states ``[S, O]``."""
    spec = agent.spec
    seen = torch.from_numpy(spec.observations(observations.numpy()))
    with torch.no_grad():
        table = agent.actor(seen.expand(agent.members, -1, -1)).double().exp()
    return (table / table.sum(-1, keepdim=True)).numpy()


def evaluate(agent: Any, doses: bool) -> list[dict[str, float]]:
    """Of each member the exact values, and what its model promises where it has one."""
    table = policies(agent, torch.from_numpy(icu.observations(doses=doses)))
    rows = []
    for policy in table:
        truth = exact_evaluate(icu.mdp("mean"), policy)
        rows.append({"survival": truth.value, "cost": truth.costs["sofa10"],
                     "ood_rate": truth.ood_rate, "length": truth.length})  # fmt: skip
    if isinstance(agent, DiscreteOGSRL):
        model = agent.models[0]
        mdp = model.mdp(["sofa10"] if model.costs else [])
        for row, policy in zip(rows, policies(agent, model.states)):
            ends = np.full((mdp.states - len(policy), icu.ACTIONS), 1 / icu.ACTIONS)
            own = exact_evaluate(mdp, np.concatenate([policy, ends]), PROMISE)
            row["promised"] = own.value
    return rows


def train_bc(dataset: Any, members: int, updates: int) -> DiscreteBC:
    config = DiscreteBC.make_config({"hidden": SETTINGS["hidden"], "lr": 1e-3,
                                     "normalize_observations": False})  # fmt: skip
    spec = dataset.spec(config)
    agent = DiscreteBC(spec, config, members)
    buffer = ReplayBuffer.from_dataset(dataset, spec, agent.seeds)
    for _ in range(updates):
        agent.update(buffer.sample(config.batch_size))
    return agent


def train(
    name: str, dataset: Any, doses: bool, options: Namespace, checkpoint: Path
) -> dict[str, Any]:
    """One cell: the curve of exact values, the last ones, and the last metrics."""
    began = time.perf_counter()
    updates = min(CLONE, options.clone)
    if METHODS[name] is None:
        agent = train_bc(dataset, options.members, updates)
        return {"members": evaluate(agent, doses), "curve": [],
                "seconds": time.perf_counter() - began}  # fmt: skip
    settings = SETTINGS | METHODS[name] | {"clone_updates": updates, "episodes": options.played}
    config = DiscreteOGSRL.make_config(settings)
    agent = DiscreteOGSRL(dataset.spec(config), config, options.members)
    curve: list[dict[str, Any]] = []
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        agent.load_state_dict(saved["state"])
        curve, began = saved["curve"], began - saved["seconds"]
        print(f"  continued at iteration {agent.updates}", flush=True)
    else:
        agent.fit(dataset, lambda line: print(f"  {line}", flush=True))
        curve.append({"iteration": 0, "rows": evaluate(agent, doses), "metrics": {}})
    sums: dict[str, torch.Tensor] = {}
    while agent.updates < options.iterations:
        for key, value in agent.update(None).items():
            sums[key] = sums.get(key, 0) + value
        if agent.updates % EVERY == 0 or agent.updates == options.iterations:
            since = agent.updates - curve[-1]["iteration"]
            metrics = {key: (value / since).tolist() for key, value in sums.items()}
            rows, sums = evaluate(agent, doses), {}
            for row, cost in zip(rows, metrics.get("predicted_cost", ())):
                row["promised_cost"] = cost  # what the limit was compared with
            curve.append({"iteration": agent.updates, "rows": rows, "metrics": metrics})
            seconds = time.perf_counter() - began
            torch.save({"state": agent.state_dict(), "curve": curve, "seconds": seconds},
                       checkpoint)  # fmt: skip
            shown = [f"{x} {np.mean([row[x] for row in rows]):.3f}" for x in NAMES[:3]]
            print(f"  {agent.updates:5d} {seconds:6.0f} s  {'  '.join(shown)}", flush=True)
    return {"members": curve[-1]["rows"], "curve": curve, "seconds": time.perf_counter() - began}


def summarise(cell: dict[str, Any]) -> dict[str, Any]:
    """Means over members, the spread of the survival, and how many keep the budget in truth."""
    rows = cell["members"]
    found = {x: float(np.mean([r[x] for r in rows])) for x in NAMES if x in rows[0]}
    return found | {
        "survival_sd": float(np.std([r["survival"] for r in rows])),
        "within": sum(r["cost"] <= BUDGET for r in rows),
        "above_clinician": sum(r["survival"] > CLINICIAN for r in rows),
    }


def markdown(result: dict[str, Any]) -> str:
    lines = [
        "# OGSRL's variants on ICU-Sepsis",
        "",
        f"`{result['command']}`, {result['date']}; {result['machine']['cpu']}; "
        f"{result['members']} members, {result['iterations']} iterations of {result['played']} "
        "episodes in the model.",
        "",
        f"{result['episodes']} logged episodes of clinicians (data of seed "
        f"{result['data_seed']}); budget {BUDGET} steps with SOFA ≥ 10 per patient. Survival (mean "
        "and standard deviation over members), cost and inadmissible steps are exact for the "
        "learned stochastic policy; *promised* is the survival in its own model, *too high by* "
        "promised minus true; *promised cost* is what training compared with the budget less the "
        "*margin* for what the model flatters the policy by, both over the last iterations; *to "
        f"optimum* is {OPTIMUM} less the survival; *within* counts members whose true cost is "
        f"within the budget, *better* those whose survival is above {CLINICIAN}. Clinicians: "
        f"{result['clinician']['survival']:.3f}, cost {result['clinician']['cost']:.3f}, "
        f"inadmissible {result['clinician']['ood_rate']:.3f}.",
    ]
    heads = ["method", "survival", "±", "to optimum", "cost", "within", "better", "inadmissible",
             "promised", "too high by", "promised cost", "margin", "minutes"]  # fmt: skip
    for doses in (True, False):
        rows = []
        for name in METHODS:
            cell = result["cells"].get(key(name, doses))
            if cell is None:
                continue
            s = summarise(cell)

            def number(value: float | None) -> str:
                return "" if value is None else f"{value:.3f}"

            excess = s["promised"] - s["survival"] if "promised" in s else None
            rows.append([
                name, number(s["survival"]), number(s["survival_sd"]),
                number(OPTIMUM - s["survival"]), number(s["cost"]),
                f"{s['within']} of {len(cell['members'])}",
                f"{s['above_clinician']} of {len(cell['members'])}", number(s["ood_rate"]),
                number(s.get("promised")), number(excess), number(s.get("promised_cost")),
                number(np.mean(cell["curve"][-1]["metrics"]["margin"])) if "promised_cost" in s
                else "",
                f"{cell['seconds'] / 60:.0f}",
            ])  # fmt: skip
        if rows:
            lines += ["", f"## {'With' if doses else 'Without'} the dose columns", ""]
            lines.append(report.table(heads, rows))
    return "\n".join(lines) + "\n"


def draw(result: dict[str, Any], path: Path) -> None:
    """True survival against true cost of every member."""
    clinician, panels = result["clinician"], {}
    budgets, survival = zip(*result["frontier"])
    shades = dict(zip(METHODS, ("#777777", "#cc3311", "#ee7733", "#4477aa", "#228833")))
    for doses in (True, False):
        series = [
            Series(name, *([r[x] for r in cell["members"]] for x in ("cost", "survival")),
                   shades[name], "o")
            for name in METHODS
            if (cell := result["cells"].get(key(name, doses)))
        ]  # fmt: skip
        series.append(Series("best possible", budgets, survival, "black", "-"))
        series.append(Series("clinicians", [clinician["cost"]], [clinician["survival"]], "black",
                             "*"))  # fmt: skip
        panels[f"{'with' if doses else 'without'} the dose columns"] = series

    def budget(_: str, axes: Any) -> None:
        axes.axvline(BUDGET, color="black", linestyle=":", linewidth=1, label="budget")
        axes.grid(alpha=0.3)

    report.plot(panels, path, x="steps with SOFA ≥ 10 per patient", y="survival", each=budget,
                size=(4.8, 4), share={"sharey": True})  # fmt: skip


def references() -> dict[str, Any]:
    """The clinicians, and the best survival at budgets around ours."""
    mdp = icu.mdp("mean")
    found = exact_evaluate(mdp, icu.policy())
    frontier = []
    for budget in (0.44, 0.5, BUDGET, 0.7, 0.8, 0.88):
        best = plan_constrained(mdp, {"sofa10": budget}, mdp.supported, tolerance=1e-4)
        frontier.append([best.evaluation.costs["sofa10"], best.evaluation.value])
    clinician = {"survival": found.value, "cost": found.costs["sofa10"], "ood_rate": found.ood_rate}
    return {"clinician": clinician, "frontier": frontier}


def key(name: str, doses: bool) -> str:
    return f"{name}, {'with' if doses else 'without'} doses"


class Ogsrl(Study):
    name, packages = "ogsrl", ("icu-sepsis", "scipy")
    report = staticmethod(markdown)
    draw = staticmethod(draw)

    def options(self, parser: ArgumentParser) -> None:
        add(parser, "--iterations", 200)
        add(parser, "--members", 5)
        add(parser, "--episodes", 20_000, "logged")
        add(parser, "--data-seed", 1)
        add(parser, "--played", SETTINGS["episodes"], "per iteration")
        add(parser, "--clone", CLONE, "updates of cloning")
        add(parser, "--methods", tuple(METHODS), choices=list(METHODS))
        add(parser, "--doses", "both", choices=DOSES)
        add(parser, "--threads", 1)

    def measure(self, options: Namespace) -> dict[str, Any]:
        torch.set_num_threads(options.threads)
        file = self.file(options)
        names = ("iterations", "members", "episodes", "data_seed", "played", "clone")
        plan = {name: getattr(options, name) for name in names}
        cells: dict[str, Any] = {}
        if file.exists() and not options.fresh:
            earlier = json.loads(file.read_text())
            if any(earlier[name] != value for name, value in plan.items()):
                raise SystemExit(f"{file} has other options: pass --fresh or another --out")
            cells = earlier["cells"]
        result = plan | self.header(options)
        result |= {"settings": SETTINGS, "budget": BUDGET, "cells": cells, **references()}
        for doses in DOSES[options.doses]:
            made = "clinician", options.episodes, options.data_seed
            dataset = icu.make_dataset(*made, doses=doses)
            for name in options.methods:
                if key(name, doses) in cells:
                    continue
                print(key(name, doses), flush=True)
                mine = file.with_name(f"{file.stem}.{name}-{int(doses)}.part.pt")
                if options.fresh:
                    mine.unlink(missing_ok=True)
                mine.parent.mkdir(parents=True, exist_ok=True)
                cells[key(name, doses)] = train(name, dataset, doses, options, mine)
                write_json(file, result | {"date": now()})
                mine.unlink(missing_ok=True)
        return result | {"date": now()}


STUDY = Ogsrl()
