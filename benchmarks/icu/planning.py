"""Planning in a learned model of ICU-Sepsis, with and without a guard, evaluated exactly.

    python benchmarks/icu_sepsis.py            some minutes on one core

Clinicians' episodes are logged from the benchmark's tables; a model is learned from them (counts,
pairs never logged filled by the nearest logged one); the best policy of the model is planned with
γ = 0.999 among the pairs that a guard allows; and its survival, steps outside the true support and
cost are computed from the true tables, without sampling. What the model promises stands beside.

Writes results/icu_sepsis.json, .md and .png.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from scipy.spatial.distance import cdist
from scipy.special import logsumexp

from saferl.envs import icu_sepsis as icu
from saferl.errors import SaferlError
from saferl.rng import MemberRandom
from saferl.safety.guardians import FeatureMap, make_guardian
from saferl.safety.models import make_model
from saferl.safety.planning import plan, plan_constrained
from saferl.safety.tabular import exact_evaluate
from saferl.spec import Spec

DISCOUNT = 0.999
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
            common.table(
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
                    common.table(
                        heads,
                        [[r["guard"] + ("" if r["seeds"] == len(result["seeds"])
                                        else f" ({r['seeds']} seeds)"),
                          *(f"{r[x]:.3f}" for x in names)] for r in chosen],
                    )
                )  # fmt: skip
    return "\n".join(lines) + "\n"


def draw(result: dict[str, Any], path: Path) -> None:
    """True and promised survival of each guard at the largest number of episodes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    for axis, strategy in zip(axes, DATA):
        rows = [r for r in result["summary"]
                if (r["strategy"], r["doses"], r["episodes"])
                == (strategy, True, max(result["episodes"]))
                and "budget" not in r["guard"]]  # fmt: skip
        place = np.arange(len(rows))
        axis.errorbar(
            place,
            [r["survival"] for r in rows],
            [r["survival_sd"] for r in rows],
            fmt="o",
            color="#4477aa",
            capsize=3,
            label="true (± SD over seeds)",
        )
        axis.plot(place, [r["predicted"] for r in rows], "D", color="#cc3311", markersize=5,
                  label="promised by the model")  # fmt: skip
        for name, style in (("clinician-admissible", ":"), ("optimum", "--")):
            axis.axhline(result["references"][strategy][name]["survival"], color="black",
                         linestyle=style, linewidth=1, label=name)  # fmt: skip
        axis.set_xticks(place, [r["guard"] for r in rows], rotation=60, ha="right")
        axis.set_title(f"{strategy}, {max(result['episodes'])} episodes")
        axis.grid(axis="y", alpha=0.3)
        axis.set_ylabel("survival")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--episodes", type=int, nargs="+", default=[1000, 5000, 20_000])
    parser.add_argument("--out", type=Path, default=common.RESULTS / "icu_sepsis")
    parser.add_argument("--fresh", action="store_true", help="forget an interrupted run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    part = options.out.with_suffix(".part.json")  # so that an interrupted run goes on
    cells = json.loads(part.read_text()) if part.exists() and not options.fresh else []
    done = {(c["strategy"], c["episodes"], c["doses"], c["seed"]) for c in cells}
    plans = [
        (strategy, episodes, doses, seed)
        for strategy in DATA
        for doses in (True, False)
        for episodes in (options.episodes if doses else [max(options.episodes)])
        for seed in range(options.seeds)
    ]
    for key in plans:
        if key in done:
            continue
        strategy, episodes, doses, seed = key
        rows = cell(episodes, seed, strategy, doses)
        cells.append(dict(zip(("strategy", "episodes", "doses", "seed"), key)) | {"rows": rows})
        common.write_json(part, cells)
        none, best = rows["none"], max(rows, key=lambda name: rows[name]["survival"])
        print(
            f"{key}: unguarded {none['survival']:.3f} (promised {none['predicted']:.3f}), "
            f"best {best} {rows[best]['survival']:.3f}",
            flush=True,
        )
    cells = [c for c in cells
             if (c["strategy"], c["episodes"], c["doses"], c["seed"]) in plans]  # fmt: skip
    result = {
        **common.header("icu-sepsis", "scipy"),
        "seeds": list(range(options.seeds)),
        "episodes": options.episodes,
        "budget": BUDGET,
        "references": references(),
        "summary": summarise(cells),
        "cells": cells,
    }
    common.write_json(options.out.with_suffix(".json"), result)
    options.out.with_suffix(".md").write_text(markdown(result))
    draw(result, options.out.with_suffix(".png"))
    part.unlink(missing_ok=True)
    print(markdown(result))
    print(f"wrote {options.out}.json, .md and .png")


if __name__ == "__main__":
    main()
