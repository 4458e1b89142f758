"""Logged decisions: `Dataset`, its card, and `load_dataset` for every source.

from saferl.data import load_dataset
dataset = load_dataset("d4rl/hopper-medium-v2")
dataset = load_dataset("patients.csv", columns={"observations": ["age", "bp"], ...})
"""

from __future__ import annotations

from typing import Any

import numpy as np

from saferl.data.card import Card
from saferl.data.dataset import Dataset
from saferl.data.sources import load_dataset, save_dataset

__all__ = [
    "Card",
    "Dataset",
    "encode_rows",
    "from_d4rl",
    "from_dataframe",
    "from_minari",
    "load_dataset",
    "save_dataset",
    "to_minari",
]


def from_dataframe(frame: Any, columns: dict[str, Any] | None = None, **options: Any) -> Dataset:
    """Rows of a pandas DataFrame; see `saferl.data.sources.tables.from_dataframe`."""
    from saferl.data.sources import tables

    return tables.from_dataframe(frame, columns, **options)


def encode_rows(frame: Any, card: Card) -> np.ndarray:
    """Observations of rows of a table; see `saferl.data.sources.tables.encode_rows`."""
    from saferl.data.sources import tables

    return tables.encode_rows(frame, card)


def from_d4rl(source: Any, **options: Any) -> Dataset:
    """The dictionary or environment of the ``d4rl`` package; see `saferl.data.sources.d4rl`."""
    from saferl.data.sources import d4rl

    return d4rl.from_d4rl(source, **options)


def from_minari(source: Any, **options: Any) -> Dataset:
    """A Minari id or ``MinariDataset``; see `saferl.data.sources.minari.load`."""
    from saferl.data.sources import minari

    return minari.load(source, **options)


def to_minari(dataset: Dataset, id: str, **options: Any) -> Any:
    """Write a local Minari dataset; see `saferl.data.sources.minari.export`."""
    from saferl.data.sources import minari

    return minari.export(dataset, id, **options)
