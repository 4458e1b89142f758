"""Datasets under ``saferl/``, made from bundled policies and tables on first use."""

from __future__ import annotations

from typing import Any

from saferl.data import Dataset
from saferl.errors import unknown


def ids() -> list[str]:
    """Names of the datasets, without their ``saferl/``."""
    from . import bundled, epicare_data, icu_sepsis

    return [*bundled.ids(), *icu_sepsis.ids(), *epicare_data.ids()]


def load(name: str, **options: Any) -> Dataset:
    """The dataset of that name: see `bundled.load`, `icu_sepsis.load` and `epicare_data.load`.

    Raises:
        SaferlError: an unknown name, and what these raise.
    """
    from . import bundled, epicare_data, icu_sepsis

    for home in (icu_sepsis, epicare_data):
        if name in home.ids():
            return home.load(name, **options)
    known = [*bundled.names(), *icu_sepsis.ids(), *epicare_data.ids()]
    if name not in bundled.names():
        raise unknown("saferl dataset", name, known)
    return bundled.load(name, **options)
