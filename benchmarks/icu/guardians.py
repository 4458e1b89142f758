"""How well guardians tell inadmissible pairs of ICU-Sepsis, where the truth is known.

Each guardian is fitted to the steps of 5 000 logged episodes of clinicians and scores all 713 × 25
pairs of state and action; the AUROC is the chance that an inadmissible pair scores higher than an
admissible one. Columns of states and the two dose levels are scaled to [-1, 1].
"""

from __future__ import annotations

import time
from argparse import ArgumentParser, Namespace
from typing import Any

import numpy as np
from scipy.stats import rankdata

from benchmarks import report
from benchmarks.runner import one_thread
from benchmarks.study import Study, add
from saferl.envs import icu_sepsis as icu
from saferl.safety.guardians import make_guardian

GUARDIANS: dict[str, tuple[str, dict[str, Any]]] = {
    "count": ("count", {}),
    "knn, 10 neighbours": ("knn", {"neighbours": 10}),
    "knn, 50 neighbours": ("knn", {"neighbours": 50}),
    "kde, σ by likelihood": ("kde", {}),
    "kde, σ = 0.15": ("kde", {"bandwidth": 0.15, "neighbours": None}),
    "kde, σ = 0.30": ("kde", {"bandwidth": 0.3, "neighbours": None}),
    "ogsrl (kde, σ = 0.535)": ("ogsrl", {}),
    "gmm": ("gmm", {}),
    "mahalanobis": ("mahalanobis", {}),
    "christoffel, degree 2": ("christoffel", {"degree": 2}),
    "psos, degree 1": ("psos", {"degree": 1}),
}
STATES = {  # heading → observation, whether the dose columns are among it
    "13 features": ("ogsrl13", True),
    "13 without doses": ("ogsrl13", False),
    "47 features": ("features", True),
}
SMALL = ("gmm", "christoffel, degree 2", "psos, degree 1")  # of 13 features; they take long of 47


def auroc(scores: np.ndarray, outside: np.ndarray) -> float:
    """Area under the ROC of scores ``[N]`` for ``outside`` ``[N]`` bool; ties count one half."""
    ranks, positive = rankdata(scores), int(outside.sum())
    above = ranks[outside].sum() - positive * (positive + 1) / 2
    return float(above / (positive * (len(scores) - positive)))


def cell(heading: str, episodes: int, seed: int) -> dict[str, dict[str, float]]:
    """Guardian → AUROC, seconds, and the bandwidth where there is one."""
    observation, doses = STATES[heading]
    data = icu.make_dataset("clinician", episodes, seed, observation=observation, doses=doses)
    states = icu.observations(observation, doses)[: icu.DEATH]
    outside = ~icu.tables().admissible[: icu.DEATH]
    found = {}
    for name, (kind, options) in GUARDIANS.items():
        if observation == "features" and name in SMALL:
            continue
        began = time.process_time()
        guardian = make_guardian(
            kind, **{"scaling": "minmax", "n_actions": (icu.LEVELS, icu.LEVELS)} | options
        )
        guardian.fit(data.observations, data.actions, groups=data.episode_ids())
        scores = guardian.score(states[:, None], np.arange(icu.ACTIONS)[None])
        found[name] = {"auroc": auroc(scores.ravel(), outside.ravel()),
                       "seconds": time.process_time() - began}  # fmt: skip
        if kind == "kde":
            found[name]["bandwidth"] = float(guardian.bandwidth)
    return found


def markdown(result: dict[str, Any]) -> str:
    lines = [
        "# Guardians on ICU-Sepsis",
        "",
        f"`{result['command']}`, {result['date']}; {result['machine']['cpu']}.",
        "",
        f"AUROC of the inadmissible pairs, mean over {len(result['seeds'])} seeds of the data "
        f"(± standard deviation); {result['episodes']} logged episodes of clinicians, generated "
        "from the benchmark's tables. *σ by likelihood*: the bandwidth that the guardian chooses, "
        "with its 100 nearest kernels. States are centres of clusters here, which favours very "
        "local kernels.",
        "",
    ]
    rows = []
    for name in GUARDIANS:
        row = [name]
        for heading in STATES:
            found = [c[name] for c in result["cells"][heading] if name in c]
            values = [f["auroc"] for f in found]
            text = f"{np.mean(values):.3f} ± {np.std(values):.3f}" if values else ""
            if found and name.endswith("likelihood"):
                text += f" (σ {np.mean([f['bandwidth'] for f in found]):.2f})"
            row.append(text)
        rows.append(row)
    return "\n".join([*lines, report.table(["guardian", *STATES], rows)]) + "\n"


class Guardians(Study):
    name, packages = "guardians", ("icu-sepsis", "scipy")
    report = staticmethod(markdown)

    def options(self, parser: ArgumentParser) -> None:
        add(parser, "--seeds", 3)
        add(parser, "--episodes", 5000)

    def measure(self, options: Namespace) -> dict[str, Any]:
        one_thread()
        cells: dict[str, list[Any]] = {heading: [] for heading in STATES}
        for heading in STATES:
            for seed in range(options.seeds):
                found = cell(heading, options.episodes, seed)
                cells[heading].append(found)
                best, of = max(found.items(), key=lambda item: item[1]["auroc"])
                print(f"{heading}, seed {seed}: best {best} {of['auroc']:.3f}", flush=True)
        return self.header(options) | {
            "seeds": list(range(options.seeds)),
            "episodes": options.episodes,
            "cells": cells,
        }


STUDY = Guardians()
