"""What a dataset of a source must be: ``saferl check FAMILY/NAME`` runs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from saferl.data import Card, Dataset, load_dataset
from saferl.registry import make_env
from saferl.rollout import check_spaces


def it_loads(id: str) -> None:
    """`load_dataset` returns a `Dataset` with at least one complete episode."""
    dataset = load_dataset(id)
    assert isinstance(dataset, Dataset), f"the loader returned a {type(dataset).__name__}"
    assert len(dataset.episodes), "no episode ends: mark ends with terminals or timeouts"


def it_is_the_same_each_time(id: str) -> None:
    """Loaded twice, the arrays are equal: a run that resumes compares their fingerprint."""
    assert load_dataset(id).fingerprint == load_dataset(id).fingerprint, "the arrays differ"


def its_card_says_what_it_is(id: str) -> None:
    """The card has an id, an origin, and survives JSON."""
    card = load_dataset(id).card
    assert card.id not in ("", "unnamed", "arrays"), "the card has no id"
    assert card.origin, "the card does not say where the data come from (origin=)"
    assert Card.from_dict(card.to_dict()) == card, "the card does not survive to_dict"


def its_next_observations_follow(id: str) -> None:
    """Within an episode the next observation is the following row's observation."""
    dataset = load_dataset(id)
    now, after = dataset.observations, dataset.next_observations
    ends = dataset.terminals | dataset.timeouts
    inside = np.flatnonzero(~ends[:-1])[:1000]
    same = [np.array_equal(after[i], now[i + 1]) for i in inside]
    share = float(np.mean(same)) if same else 1.0
    assert share > 0.99, f"only {share:.0%} of rows are followed by their next observation"


def its_environment_fits(id: str) -> None:
    """The environment that the card names, if it can be made, has the spaces of the data."""
    dataset = load_dataset(id)
    if dataset.card.env_id is not None:
        make_env(dataset.card.env_id).close()
        check_spaces(dataset.card.env_id, dataset)


def its_costs_are_costs(id: str) -> None:
    """Costs, where there are any, are 0 or more."""
    costs: Any = load_dataset(id).costs
    assert costs is None or (costs >= 0).all(), "a cost is negative"


DATASET_CHECKS: tuple[Callable[[str], None], ...] = (
    it_loads,
    it_is_the_same_each_time,
    its_card_says_what_it_is,
    its_next_observations_follow,
    its_environment_fits,
    its_costs_are_costs,
)
