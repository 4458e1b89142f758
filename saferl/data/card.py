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

    def __post_init__(self):
        def floats(name: str, value: Any) -> tuple[float, ...]:
            try:
                return tuple(float(v) for v in np.ravel(value).tolist())
            except (TypeError, ValueError):
                raise SaferlError(f"{name} must be numbers, got {value!r}") from None

        for name in ("action_low", "action_high", "reference_returns"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, floats(name, getattr(self, name)))
        object.__setattr__(self, "notes", tuple(self.notes))
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
