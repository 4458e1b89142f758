"""Planning in a learned model of ICU-Sepsis, with and without a guard, evaluated exactly.

Clinicians' episodes are logged from the benchmark's tables; a model is learned from them (counts,
pairs never logged filled by the nearest logged one); the best policy of the model is planned with
γ = 0.999 among the pairs that a guard allows; and its survival, steps outside the true support and
cost are computed from the true tables, without sampling. What the model promises stands beside.
"""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial.distance import cdist
from scipy.special import logsumexp

from benchmarks import report
from benchmarks.report import Series
from benchmarks.runner import one_thread
from benchmarks.store import write_json
from benchmarks.study import Study, add
from saferl.envs import icu_sepsis as icu
from saferl.errors import SaferlError
from saferl.models import make_model
from saferl.models.mdp import exact_evaluate
from saferl.models.planning import plan, plan_constrained
from saferl.rng import MemberRandom
from saferl.safety.guardians import FeatureMap, make_guardian
from saferl.spec import Spec

DISCOUNT = 0.999
KEYS = ("strategy", "episodes", "doses", "seed")
BUDGET = {"sofa10": 0.592}  # 0.8 of the clinicians' cost
LIVE = icu.DEATH  # states that are not terminal
COUNTS = (1, 5, 10, 20)
ALPHAS = (0.01, 0.05, 0.10, 0.15, 0.20)
KDES = {  # name → observation, σ, levels α
    "kde 47": ("features", 0.15, ALPHAS),
    "kde 13": ("ogsrl13", 0.15, ALPHAS),
    "OGSRL": ("ogsrl13", 0.535, (0.05,)),  # as in its experiments
}
DATA = {  # strategy → behaviour of the data
    "mean": "clinician",
    "terminate": "clinician-admissible",
}


def learn(episodes: int, seed: int, strategy: str, doses: bool):
    """A tabular model of logged episodes, with one state per state of the benchmark."""
    dataset = icu.make_dataset(
        DATA[strategy], episodes, seed, strategy=strategy, doses=doses, cost="sofa10"
    )
    spec = Spec(dataset.observation_dim, icu.ACTIONS, discrete=True)
    model = make_model(
        "tabular",
        MemberRandom([seed]),
        spec,
        outcomes=2,
        states=icu.observations(doses=doses)[:LIVE],
        features=FeatureMap(n_actions=(icu.LEVELS, icu.LEVELS)),
    )
    return model.fit(dataset, MemberRandom([seed]), outcomes=icu.outcomes(dataset))


def kde_scores(counts: np.ndarray, observation: str, sigma: float, doses: bool) -> np.ndarray:
    """Score of each pair ``[S, A]``; the data are the logged pairs, each as often as logged.

    What ``make_guardian("kde")`` scores, but the kernel of a pair is that of the state times that
    of the action, so that one table of each does. The guardian checks a sample of the result.
    """
    logged = counts.any(1)
    seen = icu.observations(observation, doses)[:LIVE].astype(np.float64)
    low, high = seen[logged].min(0), seen[logged].max(0)
    x, levels = 2 * (seen - low) / (high - low) - 1, icu.dose_levels().astype(np.float64)

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Logarithm, normalised."""
        return -cdist(a, b, "sqeuclidean") / (2 * sigma**2) - a.shape[1] * np.log(
            sigma * np.sqrt(2 * np.pi)
        )

    mass = np.log(counts[logged] @ np.exp(kernel(levels, levels)) / counts.sum())
    near = kernel(x, x[logged])
    scores = np.stack([-logsumexp(near + column, axis=1) for column in mass.T], 1)

    states, actions = np.nonzero(counts)
    guardian = make_guardian("kde", scaling="minmax", n_actions=(icu.LEVELS, icu.LEVELS),
                             bandwidth=sigma, neighbours=None)  # fmt: skip
    weights = counts[states, actions].astype(np.float64)
    guardian.fit(seen[states].astype(np.float32), actions, weights=weights)
    sample = np.random.default_rng(0).choice(LIVE, 5, replace=False)
    asked = seen[sample, None].astype(np.float32), np.arange(icu.ACTIONS)[None]
    np.testing.assert_allclose(guardian.score(*asked), scores[sample], rtol=1e-3, atol=0.05)
    return scores


def accept(scores: np.ndarray, threshold: float) -> np.ndarray:
    """Pairs at or below a threshold; where a state has none, its best supported one."""
    allowed = scores <= threshold
    empty = ~allowed.any(1)
    allowed[empty, scores[empty].argmin(1)] = True
    return allowed


def guards(counts: np.ndarray, doses: bool) -> dict[str, np.ndarray]:
    """Name → allowed pairs ``[S, A]``."""
    found = {"none": np.ones(counts.shape, bool)}
    found |= {f"count ≥ {n}": accept(-counts, -n) for n in COUNTS}
    for name, (observation, sigma, alphas) in KDES.items():
        scores = kde_scores(counts, observation, sigma, doses)
        logged = scores[counts > 0]
        order = logged.argsort()
        share = counts[counts > 0][order].cumsum() / counts.sum()
        for alpha in alphas:  # the share of logged steps that the guard calls unsupported
            threshold = logged[order][np.searchsorted(share, 1 - alpha)]
            found[f"{name} α {alpha:.2f}"] = accept(scores, threshold)
    return found


def truly(strategy: str, policy: np.ndarray) -> dict[str, float]:
    """Exact survival, share of inadmissible steps and cost of a policy ``[S, …]``."""
    policy = policy[:LIVE]
    rest = np.zeros((icu.STATES - LIVE, *policy.shape[1:]), policy.dtype)
    found = exact_evaluate(icu.mdp(strategy), np.concatenate([policy, rest]))
    return {"survival": found.value, "ood_rate": found.ood_rate, "cost": found.costs["sofa10"]}


def cell(episodes: int, seed: int, strategy: str, doses: bool) -> dict[str, dict[str, float]]:
    """Guard → results, for one dataset."""
    model = learn(episodes, seed, strategy, doses)
    mdp, counts = model.mdp(["sofa10"]), model.counts
    rows: dict[str, dict[str, float]] = {}

    def add(name: str, policy: np.ndarray) -> None:
        promised = exact_evaluate(mdp, policy, DISCOUNT)
        rows[name] = truly(strategy, policy) | {
            "predicted": promised.value,
            "predicted_cost": promised.costs["sofa10"],
        }

    ends = np.ones((mdp.states - LIVE, icu.ACTIONS), bool)
    for name, allowed in guards(counts, doses).items():
        allowed = np.concatenate([allowed, ends])
        add(name, plan(mdp, allowed=allowed, discount=DISCOUNT).policy)
        if name in ("count ≥ 20", "kde 13 α 0.15"):
            try:
                best = plan_constrained(mdp, BUDGET, allowed, DISCOUNT, tolerance=1e-5)
                add(f"{name}, budget", best.policy)
            except SaferlError:
                pass  # no policy of the model keeps the budget
    clone = np.where(counts.sum(1, keepdims=True) > 0, counts, 1.0)
    clone = np.concatenate([clone, ends])
    add("clone", clone / clone.sum(1, keepdims=True))
    return rows


def references() -> dict[str, dict[str, dict[str, float]]]:
    """Exact values of what data-driven policies are compared with, per strategy."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for strategy in DATA:
        mdp = icu.mdp(strategy)
        best = plan(mdp, allowed=mdp.supported)
        constrained = plan_constrained(mdp, BUDGET, mdp.supported)
        policies = {name: icu.policy(name) for name in icu.BEHAVIOURS}
        policies |= {"optimum": best.policy, "optimum within budget": constrained.policy}
        found[strategy] = {name: truly(strategy, policy) for name, policy in policies.items()}
    return found


def summarise(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and spread over seeds of each (strategy, doses, episodes, guard)."""
    groups: dict[tuple, list[dict[str, float]]] = {}
    for one in cells:
        for guard, values in one["rows"].items():
            key = (one["strategy"], one["doses"], one["episodes"], guard)
            groups.setdefault(key, []).append(values)
    return [
        dict(zip(("strategy", "doses", "episodes", "guard"), key))
        | {"seeds": len(rows), "survival_sd": float(np.std([r["survival"] for r in rows]))}
        | {name: float(np.mean([r[name] for r in rows])) for name in rows[0]}
        for key, rows in groups.items()
    ]


def markdown(result: dict[str, Any]) -> str:
    """The tables that results/icu_sepsis.md shows."""
    lines = [
        "# Planning in a learned model of ICU-Sepsis",
        "",
        f"`{result['command']}`, {result['date']}; {result['machine']['cpu']}; "
        f"{len(result['seeds'])} seeds, mean over seeds and standard deviation of the survival.",
        "",
        "Survival, inadmissible steps and cost (steps with SOFA ≥ 10 per patient) are exact, from "
        "the true tables; *promised* is the model's own survival and cost. *budget*: the plan's "
        f"promised cost is held at {BUDGET['sofa10']}. The data are the clinicians' episodes, for "
        "`terminate` those of clinicians who keep to admissible actions. A guard that leaves a "
        "state no action allows its best supported one. *count ≥ n*: pairs logged n times; *kde*: "
        "kernel density of σ = 0.15 over 47 or OGSRL's 13 features and the dose levels, all in "
        "-1 … 1, whose threshold calls a share α of the logged steps unsupported; *OGSRL*: the "
        "same at its σ = 0.535. A promised cost of several steps comes from states that the logged "
        "episodes of the allowed pairs never left. Where a budget's row has fewer seeds, no policy "
        "of the other seeds' models keeps it.",
    ]
    for strategy, rows in result["references"].items():
        lines += ["", f"## `{strategy}`: references", ""]
        lines.append(
            report.table(
                ["policy", "survival", "inadmissible", "cost"],
                [[k, *(f"{r[x]:.3f}" for x in ("survival", "ood_rate", "cost"))]
                 for k, r in rows.items()],
            )
        )  # fmt: skip
        for doses in (True, False):
            for episodes in result["episodes"]:
                chosen = [r for r in result["summary"]
                          if (r["strategy"], r["doses"], r["episodes"])
                          == (strategy, doses, episodes)]  # fmt: skip
                if not chosen:
                    continue
                what = "with" if doses else "without"
                lines += ["", f"### `{strategy}`, {episodes} episodes, {what} dose columns", ""]
                heads = ["guard", "survival", "±", "promised", "inadmissible", "cost",
                         "promised cost"]  # fmt: skip
                names = ("survival", "survival_sd", "predicted", "ood_rate", "cost",
                         "predicted_cost")  # fmt: skip
                lines.append(
                    report.table(
                        heads,
                        [[r["guard"] + ("" if r["seeds"] == len(result["seeds"])
                                        else f" ({r['seeds']} seeds)"),
                          *(f"{r[x]:.3f}" for x in names)] for r in chosen],
                    )
                )  # fmt: skip
    return "\n".join(lines) + "\n"


def draw(result: dict[str, Any], path: Path) -> None:
    """True and promised survival of each guard at the largest number of episodes."""
    panels, guards, most = {}, {}, max(result["episodes"])
    for strategy in DATA:
        rows = [r for r in result["summary"]
                if (r["strategy"], r["doses"], r["episodes"]) == (strategy, True, most)
                and "budget" not in r["guard"]]  # fmt: skip
        place, true = np.arange(len(rows)), np.array([r["survival"] for r in rows])
        spread = np.array([r["survival_sd"] for r in rows])
        name = f"{strategy}, {most} episodes"
        guards[name] = [r["guard"] for r in rows]
        panels[name] = [
            Series("true (± SD over seeds)", place, true, "#4477aa", "o",
                   y_ends=(true - spread, true + spread)),
            Series("promised by the model", place, [r["predicted"] for r in rows], "#cc3311", "D"),
            *(
                Series(name, [0, len(rows) - 1],
                       [result["references"][strategy][name]["survival"]] * 2, "black", style)
                for name, style in (("clinician-admissible", ":"), ("optimum", "--"))
            ),
        ]  # fmt: skip

    def names(name: str, axes: Any) -> None:
        axes.set_xticks(range(len(guards[name])), guards[name], rotation=60, ha="right")
        axes.grid(axis="y", alpha=0.3)

    report.plot(panels, path, y="survival", size=(5, 4.4), each=names)


class Planning(Study):
    name, stem, packages = "icu", "icu_sepsis", ("icu-sepsis", "scipy")
    report = staticmethod(markdown)
    draw = staticmethod(draw)

    def options(self, parser: ArgumentParser) -> None:
        add(parser, "--seeds", 5)
        add(parser, "--episodes", (1000, 5000, 20_000))

    def measure(self, options: Namespace) -> dict[str, Any]:
        one_thread()
        part = self.file(options).with_suffix(".part.json")  # so that an interrupted run goes on
        cells = json.loads(part.read_text()) if part.exists() and not options.fresh else []
        plans = [
            (strategy, episodes, doses, seed)
            for strategy in DATA
            for doses in (True, False)
            for episodes in (options.episodes if doses else [max(options.episodes)])
            for seed in range(options.seeds)
        ]
        done = {tuple(one[name] for name in KEYS) for one in cells}
        for key in (key for key in plans if key not in done):
            strategy, episodes, doses, seed = key
            rows = cell(episodes, seed, strategy, doses)
            cells.append(dict(zip(KEYS, key)) | {"rows": rows})
            write_json(part, cells)
            none, best = rows["none"], max(rows, key=lambda name: rows[name]["survival"])
            print(
                f"{key}: unguarded {none['survival']:.3f} (promised {none['predicted']:.3f}), "
                f"best {best} {rows[best]['survival']:.3f}",
                flush=True,
            )
        cells = [one for one in cells if tuple(one[name] for name in KEYS) in plans]
        found = self.header(options) | {
            "seeds": list(range(options.seeds)),
            "episodes": options.episodes,
            "budget": BUDGET,
            "references": references(),
            "summary": summarise(cells),
            "cells": cells,
        }
        write_json(self.file(options), found)
        part.unlink(missing_ok=True)
        return found


STUDY = Planning()
