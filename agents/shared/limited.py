"""What BCQ-Lag, CPQ and COptiDICE share: data with costs, and one finite limit for each member."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from saferl.data.dataset import Dataset
from saferl.errors import SaferlError
from saferl.safety.limits import CostLimit, check_limit, convert

from .agent import Agent
from .config import AgentConfig


@dataclass(frozen=True)
class LimitedConfig(AgentConfig):
    """Fields of agents that are made for a limit. Defaults: OSRL's."""

    batch_size: int = 512
    reward_scale: float = 0.1
    cost_limit: float = 10.0  # expected undiscounted cost per episode


LimitedConfigT = TypeVar("LimitedConfigT", bound=LimitedConfig)


class Limited(Agent[LimitedConfigT]):
    """An agent that needs a ``cost_limit``."""

    needs_costs: ClassVar[bool] = True
    discount_of_costs: ClassVar[str] = "cost_discount"  # the field that holds it

    def fit(self, dataset: Dataset, say: Callable[[str], None]) -> None:
        """Say what each limit is to the losses."""
        for limit, discount in dict.fromkeys(self._limits()):
            told = CostLimit(limit, self.spec.horizon).describe(discount)
            say(f"cost limit: {told}")

    def _limits(self) -> list[tuple[float, float]]:
        """(limit, discount of costs) of each member, the limit checked."""
        discounts = self.column(self.discount_of_costs)
        for discount in discounts:
            if not 0 <= discount < 1:
                raise SaferlError(
                    f"{self.discount_of_costs} lies between 0 and below 1, got {discount:g}"
                )
        return [(check_limit(limit), g) for limit, g in zip(self.column("cost_limit"), discounts)]

    def limits(self, unit: str) -> tuple[Tensor, Tensor]:
        """Each member's limit in a unit of `saferl.safety.limits.convert`, and a cost of 1 there.

        Returns:
            Two ``[M]``.

        Raises:
            SaferlError: a limit that is no number of 0 or more, a bad discount, no horizon.
        """
        pairs = self._limits()
        units = [convert(1.0, unit, horizon=self.spec.horizon, discount=g) for _, g in pairs]
        values = [limit * one for (limit, _), one in zip(pairs, units)]
        return torch.tensor(values, device=self.device), torch.tensor(units, device=self.device)
