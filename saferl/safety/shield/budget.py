"""Episodes and budgets of one or many environments that run side by side."""

from __future__ import annotations

from typing import Any

import numpy as np

from saferl.errors import SaferlError
from saferl.safety.shield.adapters import to_numpy


class BudgetTracker:
    """What each of N environments has spent of its limit, and where in its episode it is.

    ``turn`` before the actions of a step, ``acted`` after them, ``observe`` when the environments
    have made the step; ``reset`` when episodes begin. A step left out or told twice is an error
    where there is a limit, for the sum would be wrong.

    Attributes, all ``[N]``: ``spent``; ``step`` and ``episode``, from 0; ``running``.
    """

    def __init__(self, limit: float | None):
        self.limit, self._started = limit, False
        self._begin(1)

    def _begin(self, count: int) -> None:
        self.spent = np.zeros(count)
        self.step, self.episode = np.zeros(count, np.int64), np.zeros(count, np.int64)
        self.running, self._awaiting = np.ones(count, bool), np.zeros(count, bool)

    KEPT = ("spent", "step", "episode", "running", "_awaiting", "_started")

    def state(self) -> dict[str, np.ndarray]:
        return {name.strip("_"): np.array(getattr(self, name)) for name in self.KEPT}

    def load(self, state: dict[str, np.ndarray]) -> None:
        for name in self.KEPT:
            setattr(self, name, state[name.strip("_")].copy())

    def __len__(self) -> int:
        """Environments; 0 before the first reset."""
        return len(self.spent) if self._started else 0

    @property
    def remaining(self) -> np.ndarray | None:
        return None if self.limit is None else self.limit - self.spent

    def reset(self, mask: Any = None) -> None:
        """See `saferl.safety.shield.Shield.reset`."""
        mask = np.ones(max(len(self), 1), bool) if mask is None else np.atleast_1d(to_numpy(mask))
        if mask.dtype != bool or mask.ndim != 1 or not mask.size:
            raise SaferlError(
                "reset takes one boolean per environment, such as np.ones(64, bool), or None"
            )
        if len(mask) == len(self):
            self.episode[mask] += self.step[mask] > 0
            self.spent[mask], self.step[mask] = 0.0, 0
            self.running[mask], self._awaiting[mask] = True, False
        elif mask.all():
            self._begin(len(mask))
            self._started = True
        else:
            raise SaferlError(
                f"reset of some of {len(mask)} environments while the shield tracks {len(self)}: "
                "reset all of them first"
            )

    def turn(self, count: int) -> None:
        """Check that ``count`` environments may act now."""
        if count == len(self):
            if self.limit is not None and self._awaiting.any():
                raise SaferlError(
                    "the cost of the last step is missing: call observe(cost, ended) after every "
                    "step, and reset() when episodes begin"
                )
        elif self.limit is None:  # nothing is carried from step to step, so an episode just begins
            self._begin(count)
            self._started = True
        else:
            raise SaferlError(
                f"observations of {count} environments, but {len(self)} were reset: call reset(), "
                f"or reset(np.ones({count}, bool)), when episodes begin"
            )

    def acted(self) -> None:
        self.step += 1
        self._awaiting |= self.running

    def observe(self, cost: Any, ended: Any = False) -> None:
        """See `saferl.safety.shield.Shield.observe`."""
        if not self._started:
            raise SaferlError("observe() came before reset(): call reset() when episodes begin")
        running, ended = self.running, self._spread(ended, bool)
        if not (alive := running | ended).all():
            raise SaferlError(
                f"the episode of environment {_first(~alive)} has ended: call reset(mask) before "
                "its next one"
            )
        if self.limit is not None:
            if cost is None:
                raise SaferlError(
                    "the shield has a cost limit, but there is no cost: pass info['cost'] to "
                    "observe(), or attach one with saferl.envs.wrappers.CostWrapper"
                )
            cost = self._spread(cost, np.float64)
            fine = (cost >= 0) & (cost < np.inf) & self._awaiting  # false for NaN
            if not (fine | ~running).all():
                i = _first(running & ~fine)
                if self._awaiting[i]:
                    raise SaferlError(
                        f"the cost of a step is a number of 0 or more, got {cost[i]:g} from "
                        f"environment {i}"
                    )
                raise SaferlError(
                    f"observe() without an action before it, environment {i}: its cost would count "
                    "twice"
                )
            self.spent[running] += cost[running]
        self._awaiting[:] = False
        self.running = running & ~ended

    def _spread(self, values: Any, dtype: Any) -> np.ndarray:
        spread = np.empty(self.running.shape, dtype)
        try:
            spread[...] = to_numpy(values)
            return spread
        except (TypeError, ValueError):
            raise SaferlError(
                f"observe() takes one value for each of {len(self)} environments, got {values!r}"
            ) from None


def _first(flags: np.ndarray) -> int:
    return int(np.argmax(flags))
