"""`Card`: what a dataset is, beside its arrays."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from saferl.errors import SaferlError, unknown


@dataclass(frozen=True)
class Card:
    """What is known about a dataset besides its arrays. Plain values, JSON both ways."""

    id: str = "unnamed"
    env_id: str | None = None  # gymnasium id for evaluation; None: no matching environment
    action_low: tuple[float, ...] | None = None  # continuous bounds, one per component
    action_high: tuple[float, ...] | None = None
    n_actions: int | None = None  # discrete actions 0 … n-1
    horizon: int | None = None  # steps after which an episode times out
    reference_returns: tuple[float, float] | None = None  # score 0 (random) and 100 (expert)
    reference_source: str | None = None  # who published the reference: "D4RL", "DSRL", "Minari"
    licence: str = "unknown"
    origin: str = ""
    notes: tuple[str, ...] = ()
    action_start: int = 0  # what the user's own numbers of discrete actions begin at
    # Levels of each part of an action that is one integer here, first part slowest; None: no parts.
    action_levels: tuple[int, ...] | None = None
    columns: tuple[str, ...] = ()  # of a table, that observations come from
    encoding: str | None = None  # of its text columns: "onehot" or "ordinal"
    categories: dict[str, tuple] = dataclasses.field(default_factory=dict)  # column → its values

    def __post_init__(self):
        def floats(name: str, value: Any) -> tuple[float, ...]:
            try:
                return tuple(float(v) for v in np.ravel(value).tolist())
            except (TypeError, ValueError):
                raise SaferlError(f"{name} must be numbers, got {value!r}") from None

        for name in ("action_low", "action_high", "reference_returns"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, floats(name, getattr(self, name)))
        for name in ("notes", "columns"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        categories = {str(name): tuple(values) for name, values in self.categories.items()}
        object.__setattr__(self, "categories", categories)
        if self.action_levels is not None:
            levels = np.ravel(self.action_levels).tolist()
            if not levels or any(level != int(level) or level < 1 for level in levels):
                raise SaferlError(
                    "action_levels must be whole numbers of 1 or more, one for each part of an "
                    f"action, got {self.action_levels!r}"
                )
            object.__setattr__(self, "action_levels", tuple(map(int, levels)))
        if int(self.action_start) != self.action_start:
            raise SaferlError(f"action_start must be a whole number, got {self.action_start!r}")
        if self.reference_returns is not None and (
            len(self.reference_returns) != 2 or len(set(self.reference_returns)) != 2
        ):
            raise SaferlError(
                "reference_returns must be two different numbers (random, expert), "
                f"got {self.reference_returns}"
            )
        for name in ("horizon", "n_actions"):
            value = getattr(self, name)
            if value is not None and (int(value) != value or value < 1):
                raise SaferlError(f"{name} must be a whole number of 1 or more, got {value!r}")

    def replace(self, **fields: Any) -> Card:
        """A copy with other values; an unknown field is an error that names the nearest one."""
        valid = [field.name for field in dataclasses.fields(self)]
        for name in fields:
            if name not in valid:
                raise unknown("dataset option", name, valid)
        return dataclasses.replace(self, **fields)

    def noted(self, *notes: str) -> Card:
        """A copy with further notes."""
        return self.replace(notes=(*self.notes, *notes))

    @property
    def features(self) -> tuple[str, ...]:
        """A name for each number of an observation; () where none are known."""
        if self.encoding != "onehot":
            return self.columns
        return tuple(
            name
            for column in self.columns
            for name in [f"{column}={v}" for v in self.categories.get(column, ())] or [column]
        )

    @property
    def score_note(self) -> str | None:
        """Whose data and whose reference returns stand behind a score; None if neither is known."""
        parts = [f"data: {self.origin}"] if self.origin else []
        if self.reference_returns is not None:
            parts.append(f"reference returns: {self.reference_source or 'given by the user'}")
        return "; ".join(parts) or None

    def to_dict(self) -> dict[str, Any]:
        """Plain values that `json` can write."""
        values = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Card:
        """The inverse of `to_dict`; an unknown key is an error."""
        return cls().replace(**values)
