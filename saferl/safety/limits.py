"""Cost limits in user units, and their one conversion to the units of a loss.

A user's limit L is the expected undiscounted cost of an episode of T steps. Losses see other
quantities, and comparing L with one of those is a different limit: a critic of discount γ holds
discounted costs, of which L spent evenly over T steps makes

    L (1 - γ^T) / ((1 - γ) T)                (L itself at γ = 1)

At L = 20, T = 1000 and γ = 0.99 that is 2, so a critic held to 20 would allow an episode to cost
200. A mean over steps is to be held to L / T, and a mean over the (1 - γ)-scaled discounted
occupancy to L (1 - γ^T) / T.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from saferl.errors import SaferlError, unknown

if TYPE_CHECKING:
    from torch import Tensor

Number = TypeVar("Number", float, "Tensor")

UNITS = ("episode", "discounted", "step", "occupancy")


def convert(
    cost: Number,
    to: str,
    *,
    horizon: int,
    discount: float | Tensor = 1.0,
    unit: str = "episode",
) -> Number:
    """A cost or limit in another unit, for a cost that is spent evenly over ``horizon`` steps.

    Args:
        cost: a float, or a tensor such as one limit per member ``[M]``.
        to, unit: the unit that is wanted and the one that ``cost`` is in: "episode" (undiscounted
            sum over an episode: the user's), "discounted" (what a critic estimates), "step" (mean
            over steps) or "occupancy" (mean over the (1 - γ)-scaled discounted occupancy).
        horizon: T, steps of an episode.
        discount: γ in [0, 1]; a tensor broadcasts with ``cost``. Matters for "discounted" and
            "occupancy".

    Raises:
        SaferlError: an unknown unit, no horizon, a discount outside [0, 1], or an occupancy at
            γ = 1, where it is 0 whatever the limit.

    Reads the values of tensors, so convert once, when an agent is built.
    """
    for name in (to, unit):
        if name not in UNITS:
            raise unknown("unit", name, UNITS)
    if not horizon >= 1:
        raise SaferlError(
            "a cost limit needs the number of steps of an episode: give the dataset its horizon, "
            "as in Dataset.with_card(horizon=1000), or the environment a gymnasium TimeLimit"
        )
    values = discount.tolist() if hasattr(discount, "tolist") else discount
    for value in np.ravel(values):
        if not 0 <= value <= 1:
            raise SaferlError(f"a discount lies between 0 and 1, got {value}")
        if value == 1 and "occupancy" in (to, unit):
            raise SaferlError("the (1 - γ)-scaled occupancy of a cost needs a discount below 1")
    factors: dict[str, Any] = {"episode": 1.0, "step": 1.0 / horizon}
    if {to, unit} & {"discounted", "occupancy"}:
        spent = _discounted_steps(horizon, discount)
        factors |= {"discounted": spent / horizon, "occupancy": spent * (1 - discount) / horizon}
    factor = factors[to] / factors[unit]
    converted: Any = cost * factor
    return converted.to(cost.dtype) if hasattr(cost, "dtype") else converted


def _discounted_steps(horizon: int, discount: float | Tensor) -> float | Tensor:
    """1 + γ + … + γ^(T-1), in float64."""
    if isinstance(discount, (int, float)):
        if discount in (0, 1):
            return 1.0 if discount == 0 else float(horizon)
        return -math.expm1(horizon * math.log(discount)) / (1 - discount)
    import torch

    discount = discount.double()
    spent = -torch.expm1(horizon * discount.log()) / (1 - discount)
    return torch.where(discount == 1, float(horizon), spent)


def relative_excess(cost: Tensor, budget: Tensor) -> Tensor:
    """(J - d) / (|J| + d) in [-1, 1], without a unit; 0 / 0 is 0, and -1 where d is infinite."""
    distance = (cost - budget) / (cost.abs() + budget)
    return distance.masked_fill(cost == budget, 0.0).masked_fill(budget.isinf(), -1.0)


def check_limit(limit: Any, infinite: bool = False) -> float:
    """A cost limit as a float.

    Args:
        infinite: whether infinity, which is no limit, may be given.

    Raises:
        SaferlError: negative, not a number, or infinite where that is not meant.
    """
    try:
        value = float(limit)
    except (TypeError, ValueError):
        value = math.nan
    if not 0 <= value or (value == math.inf and not infinite):
        no_limit = " (or inf for no limit)" if infinite else ""
        raise SaferlError(
            f"a cost limit is a number of 0 or more per episode{no_limit}, got {limit!r}"
        )
    return value


@dataclass(frozen=True)
class CostLimit:
    """A limit on the expected undiscounted cost of an episode, in the user's units.

    Raises:
        SaferlError: a limit that is negative, NaN or infinite, or a horizon below 1.
    """

    value: float  # per episode
    horizon: int  # T, steps of an episode

    def __post_init__(self):
        object.__setattr__(self, "value", check_limit(self.value))
        convert(self.value, "step", horizon=self.horizon)

    def to(self, unit: str, discount: float = 1.0) -> float:
        """The limit in the unit of a loss; see `convert`."""
        return convert(self.value, unit, horizon=self.horizon, discount=discount)

    def describe(self, discount: float) -> str:
        """One line with the user's number and what losses compare with."""
        return (
            f"{self.value:g} per episode of {self.horizon} steps = {self.to('step'):.4g} per step "
            f"= {self.to('discounted', discount):.4g} discounted with {discount:g}"
        )


def limit_warnings(dataset: Any, limits: Sequence[float]) -> list[str]:
    """Why a limit may not mean what was intended on a `Dataset`: at most one line per limit.

    Warns if the limit cannot bind because no episode can cost more, if every logged episode keeps
    it, or if none does. Infinite limits are skipped.

    Raises:
        SaferlError: the dataset has no costs, or a limit is negative or not a number.
    """
    limits = [check_limit(limit, infinite=True) for limit in limits]
    limits = [limit for limit in dict.fromkeys(limits) if limit < math.inf]
    if limits and dataset.costs is None:
        raise SaferlError(no_costs(dataset.card.id))
    lines = []
    for limit in limits:
        episodes = dataset.episode_costs()
        steps = dataset.horizon
        largest = float(dataset.costs.max())
        if steps and limit >= largest * steps:
            lines.append(
                f"the cost limit {limit:g} can never bind: {steps} steps of at most {largest:g} "
                f"cost at most {largest * steps:g}; is it in the unit of an episode?"
            )
        elif len(episodes) and limit >= episodes.max():
            lines.append(
                f"the cost limit {limit:g} binds on no logged episode: the largest cost of one is "
                f"{episodes.max():g}"
            )
        elif len(episodes) and limit < episodes.min():
            lines.append(
                f"no logged episode meets the cost limit {limit:g}: the lowest cost of one is "
                f"{episodes.min():g}, so keeping it takes behaviour that the data do not show"
            )
    return lines


def no_costs(dataset_id: str, what: str = "a cost limit") -> str:
    """What to tell a user who sets a limit, or ``what``, on data without costs."""
    return (
        f"{what} is set but {dataset_id} has no costs: attach them with "
        "Dataset.with_costs(function), or map a cost column"
    )
