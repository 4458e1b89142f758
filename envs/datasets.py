"""Datasets under ``saferl/``, made from bundled policies, planners and tables on first use."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from saferl.data import Card, Dataset
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

    for home in (bundled, maze_data, icu_sepsis, epicare_data):
        if name in (home.names() if home is bundled else home.ids()):
            _check(options, home)
            return home.load(name, **options)
    homes = maze_data, icu_sepsis, epicare_data
    raise unknown("saferl dataset", name, [*bundled.names(), *(i for h in homes for i in h.ids())])


def _check(options: dict[str, Any], home: Any) -> None:
    """Before anything is made: is each option one of the data's or of a card's?"""
    makers = home.load, getattr(home, "make_dataset", home.load)
    own = {name for maker in makers for name in inspect.signature(maker).parameters}
    own -= {"name", "behaviour", "options", "overrides", "card_fields"}
    valid = own | {field.name for field in dataclasses.fields(Card)} | {"clip_actions"}
    for option in options:
        if option not in valid:
            raise unknown("dataset option", option, valid)
