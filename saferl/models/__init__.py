"""Dynamics models, and finite Markov decision processes with planning in them.

model = make_model("knn", init, spec, k=1)
model.fit(dataset, random)
step = model.step(observations, actions, random)
"""

from __future__ import annotations

import inspect
from typing import Any

from saferl.errors import unknown
from saferl.models.base import Model, Step
from saferl.models.ensemble import EnsembleModel
from saferl.models.logged import KNNModel, TabularModel
from saferl.rng import MemberRandom
from saferl.spec import Spec

MODELS: dict[str, type[Model]] = {
    "tabular": TabularModel,
    "knn": KNNModel,
    "ensemble": EnsembleModel,
}

__all__ = ["MODELS", "EnsembleModel", "KNNModel", "Model", "Step", "TabularModel", "make_model"]


def make_model(name: str, init: MemberRandom, spec: Spec, **options: Any) -> Model:
    """A model that is not fitted yet: ``"tabular"``, ``"knn"`` or ``"ensemble"``.

    Args:
        init: one random stream per member. spec: sizes of the task.
        options: arguments of `saferl.models.logged.TabularModel`, `KNNModel` or
            `saferl.models.ensemble.EnsembleModel`.

    Raises:
        SaferlError: an unknown model or option, or a value that is out of range.
    """
    if name not in MODELS:
        raise unknown("model", name, MODELS)
    valid = list(inspect.signature(MODELS[name]).parameters)[2:]
    for option in options:
        if option not in valid:
            raise unknown(f"option of the model {name}", option, valid)
    return MODELS[name](init, spec, **options)
