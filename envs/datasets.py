"""Datasets under ``saferl/``, made from bundled policies, planners and tables on first use."""

from __future__ import annotations

from typing import Any

from saferl.data import Dataset
from saferl.errors import unknown


def ids() -> list[str]:
    """Names of the datasets, without their ``saferl/``."""
    from . import bundled, epicare_data, icu_sepsis, maze_data

    return [*bundled.ids(), *maze_data.ids(), *icu_sepsis.ids(), *epicare_data.ids()]


def load(name: str, **options: Any) -> Dataset:
    """The dataset of that name: see `load` of `bundled`, `maze_data`, `icu_sepsis`, `epicare_data`.

    Raises:
        SaferlError: an unknown name, and what these raise.
    """
    from . import bundled, epicare_data, icu_sepsis, maze_data

    known = list(bundled.names())
    for home in (maze_data, icu_sepsis, epicare_data):
        if name in home.ids():
            return home.load(name, **options)
        known += home.ids()
    if name not in bundled.names():
        raise unknown("saferl dataset", name, known)
    return bundled.load(name, **options)
