"""What a run-time guard did: counters, the latest interventions, and a JSON-lines file."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import warnings
from collections import Counter, deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from saferl.errors import SaferlError

REASONS = ("budget", "invalid", "ood", "critic")
"""Why a proposed action was not accepted; where several hold, the first counts."""


@dataclass(frozen=True, slots=True)
class Intervention:
    """One step at which the proposed action was not accepted.

    - ``step`` and ``episode`` count from 0 within the environment; ``reason``: one of `REASONS`;
    - ``proposed`` and ``taken``: lists of floats, or ints when discrete; ``changed``: they differ;
    - ``score`` and ``threshold``: the guardian's, of the proposed action; for the reason "critic"
      its Qc and what the budget allows; None where nothing was scored;
    - ``supported``: the guardian supports the action taken (None without a guardian);
    - ``remaining``: budget before the step in units of cost (None without a limit).
    """

    environment: int
    episode: int
    step: int
    reason: str
    proposed: Any
    taken: Any
    changed: bool
    score: float | None
    threshold: float | None
    supported: bool | None
    remaining: float | None

    def to_json(self) -> str:
        """One line of JSON; numbers that are not finite become null, as JSON has none."""
        fields = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return json.dumps({name: _plain(value) for name, value in fields}, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class InterventionLog:
    """Counts every intervention, keeps the latest ``bound`` and appends each to the file ``path``.

    A line is written by one call to the operating system, in append mode: several processes may
    share the file, and a crash leaves whole lines. If writing fails later on, a warning says so
    once and acting goes on; `summary` counts the lines that are missing.

    Raises:
        SaferlError: ``bound`` is negative or the file cannot be opened.
    """

    COUNTED, BY_REASON = ("steps", "unsupported", "unlogged"), ("flagged", "changed")

    def __init__(self, bound: int, path: str | Path | None = None):
        if bound < 0:
            raise SaferlError(f"records must be 0 or more interventions, got {bound}")
        self.latest: deque[Intervention] = deque(maxlen=bound)
        self.steps = self.unsupported = self.unlogged = 0
        self.flagged: Counter[str] = Counter()
        self.changed: Counter[str] = Counter()
        self.path, self._file = path, None
        if path is not None:
            try:
                self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            except OSError as error:
                raise SaferlError(
                    f"cannot write the log {path}: {error.strerror}; choose a file that can be "
                    "written to"
                ) from error

    def add(self, event: Intervention) -> None:
        self.flagged[event.reason] += 1
        self.changed[event.reason] += event.changed
        self.unsupported += event.supported is False
        self.latest.append(event)
        if self.path is not None:
            self._append((event.to_json() + "\n").encode())

    def _append(self, line: bytes) -> None:
        try:
            if self._file is None:
                raise OSError("it is closed")
            if os.write(self._file, line) != len(line):
                raise OSError("the disk is full")
        except OSError as error:
            if not self.unlogged:
                warnings.warn(f"interventions are no longer logged to {self.path}: {error}",
                              RuntimeWarning, stacklevel=2)  # fmt: skip
            self.unlogged += 1

    def state(self) -> dict[str, np.ndarray]:
        """The counters, without the interventions themselves."""
        state = {name: np.array(getattr(self, name)) for name in self.COUNTED}
        for name in self.BY_REASON:
            state[name] = np.array([getattr(self, name)[reason] for reason in REASONS])
        return state

    def load(self, state: dict[str, np.ndarray]) -> None:
        for name in self.COUNTED:
            setattr(self, name, int(state[name]))
        for name in self.BY_REASON:
            setattr(self, name, Counter(dict(zip(REASONS, state[name].tolist()))))

    def summary(self) -> dict[str, Any]:
        """``steps``; ``flagged``: share of steps whose proposed action was not accepted;
        ``changed``: share at which another was taken, and ``by_reason`` how it splits;
        ``unsupported``: share at which an action outside the guardian's support was taken in its
        place; ``records`` kept in memory; ``unlogged``: lines that could not be written.
        """
        per_step = 1 / max(self.steps, 1)
        return {
            "steps": self.steps,
            "flagged": self.flagged.total() * per_step,
            "changed": self.changed.total() * per_step,
            "by_reason": {reason: self.changed[reason] * per_step for reason in REASONS},
            "unsupported": self.unsupported * per_step,
            "records": len(self.latest),
            "unlogged": self.unlogged,
        }

    def close(self) -> None:
        """Close the file; later interventions are counted and kept, no longer logged."""
        if self._file is not None:
            os.close(self._file)
            self._file = None
