"""Guardians: is a state-action pair supported by the data? docs/guardians.md says which to take.

guardian = make_guardian("knn", n_actions=25)
guardian.fit(observations, actions, groups=episode_ids)
guardian.calibrate(other_observations, other_actions, alpha=0.1, groups=other_ids)
guardian.is_ood(s, a), guardian.cost(s, a, mode="soft"), guardian.explain(s, a, k=5)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from saferl.errors import unknown
from saferl.nn.features import FeatureMap
from saferl.safety.guardians.base import Composite, Explanation, Guardian
from saferl.safety.guardians.ellipsoids import GMM, Christoffel, Mahalanobis, PSoS
from saferl.safety.guardians.learned import VAE, Ensemble
from saferl.safety.guardians.neighbours import KDE, KNN, Count

GUARDIANS: dict[str, type[Guardian]] = {
    "count": Count,
    "knn": KNN,
    "kde": KDE,
    "psos": PSoS,
    "christoffel": Christoffel,
    "mahalanobis": Mahalanobis,
    "gmm": GMM,
    "ensemble": Ensemble,
    "vae": VAE,
}
PRESETS: dict[str, tuple[str, dict[str, Any]]] = {
    # OGSRL's experiments (arXiv 2505.16242); their level is calibrate's default alpha = 0.05.
    "ogsrl": ("kde", {"scaling": "minmax", "bandwidth": 0.535, "neighbours": None}),
}


def register_guardian(name: str) -> Callable[[type[Guardian]], type[Guardian]]:
    """Class decorator: makes ``name`` known to `make_guardian`."""

    def add(kind: type[Guardian]) -> type[Guardian]:
        GUARDIANS[name] = kind
        return kind

    return add


def guardian_names() -> list[str]:
    """All names that `make_guardian` takes, sorted."""
    return sorted([*GUARDIANS, *PRESETS, "composite"])


def make_guardian(name: str = "knn", **options: Any) -> Guardian:
    """A guardian by name; ``options`` are those of its class and of `FeatureMap`.

    ``"composite"`` takes ``parts``, names or guardians, and hands `FeatureMap`'s options to the
    parts given by name.

    Raises:
        SaferlError: an unknown name or option (naming the nearest); a value out of range.
    """
    if name == "composite":
        parts = options.pop("parts", ())
        parts = [make_guardian(p, **options) if isinstance(p, str) else p for p in parts]
        return Composite(parts)
    if name in PRESETS:
        name, preset = PRESETS[name]
        options = preset | options
    if name not in GUARDIANS:
        raise unknown("guardian", name, guardian_names())
    of_map = inspect.signature(FeatureMap).parameters
    own = [p for p in inspect.signature(GUARDIANS[name]).parameters if p != "features"]
    for option in options:
        if option not in of_map and option not in own:
            raise unknown(f"option of guardian {name}", option, [*own, *of_map])
    features = FeatureMap(**{k: v for k, v in options.items() if k in of_map})
    return GUARDIANS[name](features, **{k: v for k, v in options.items() if k in own})


__all__ = [
    "GUARDIANS",
    "PRESETS",
    "Composite",
    "Explanation",
    "FeatureMap",
    "Guardian",
    "guardian_names",
    "make_guardian",
    "register_guardian",
]
