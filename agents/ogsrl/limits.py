"""Budgets of guarded model-based agents: their units, the margin, and the integral term."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

MARGIN_QUANTILE = 0.9
MARGIN_RATE = 0.2
"""Least weight of the latest value in the running mean of a resampled model's excess cost."""


class Limits(nn.Module):
    """Budgets of C constraints in the units of their estimates, and the margin ε̄ of the cost."""

    budget: Tensor
    unit: Tensor
    spent: Tensor
    updates: Tensor
    integral: Tensor
    gaps: Tensor
    seen: Tensor

    def __init__(self, members: int, names: tuple[str, ...], models: int):
        super().__init__()
        self.names = names
        self.register_buffer("budget", torch.zeros(members, len(names)))
        self.register_buffer("unit", torch.ones(members))  # of a user's unit of cost
        self.register_buffer("spent", torch.zeros(members, len(names)))  # running means of J
        self.register_buffer("updates", torch.zeros(members, 1))
        self.register_buffer("integral", torch.zeros(members, len(names)))
        self.register_buffer("gaps", torch.zeros(members, models))  # excess in resampled models
        self.register_buffer("seen", torch.zeros(members, models))

    def excess(self, totals: Tensor, smoothing: float) -> Tensor:
        """c ``[M, C]`` of estimates J ``[M, C]``: running mean - budget + integral term."""
        self.updates += 1
        self.spent += (1 / self.updates).clamp_min(smoothing) * (totals - self.spent)
        return self.spent - self.tightened() + self.integral

    def integrate(self, rate: float, acted: Tensor) -> None:
        """Integral term with anti-windup: add ``rate`` times the excess, within [0, budget].

        A step that removes the excess by its own estimate may leave some of it, because the
        gradient is estimated from few episodes. The integral term grows until none is left.

        Args:
            acted: ``[M, C]`` bool, limits that this update's step was able to act on. Only these
                take a positive excess; without that the term would grow during recovery steps,
                which cannot go any faster, and delay what comes after them.
        """
        if not rate:
            return
        budget = self.tightened()
        over = self.spent - budget
        self.integral += rate * torch.where(acted, over, over.clamp_max(0))
        self.integral.clamp_(min=0)
        self.integral.copy_(torch.minimum(self.integral, budget))

    def observe(self, model: int, gap: Tensor) -> None:
        """Take the excess cost ``[M]`` in one of the resampled models into its running mean."""
        self.seen[:, model] += 1
        rate = (1 / self.seen[:, model]).clamp_min(MARGIN_RATE)
        self.gaps[:, model] += rate * (gap - self.gaps[:, model])

    def margin(self) -> Tensor:
        """ε̄ ``[M]``, 0 or more."""
        if not self.gaps.shape[1]:
            return torch.zeros_like(self.unit)
        return torch.quantile(self.gaps, MARGIN_QUANTILE, dim=1).clamp_min(0)

    def tightened(self) -> Tensor:
        """Budgets ``[M, C]``, that of the cost less ε̄."""
        margin = [
            self.margin() if name == "cost" else torch.zeros_like(self.unit) for name in self.names
        ]
        return (self.budget - torch.stack(margin, 1)).clamp_min(0) if margin else self.budget


def ood_budget(probability: float, discount: Any, horizon: int) -> Any:
    """β γ^H, to which the discounted number of unsupported steps V is to be held.

    Of the first H steps none is discounted by more than γ^H, so by the union bound
    Pr(an unsupported step before H) ≤ Σ_{h<H} E o_h ≤ γ^{-H} V ≤ β.
    """
    return probability * discount**horizon


def share_leaving(flagged: np.ndarray, episodes: np.ndarray, horizon: int, starts: str) -> float:
    """Share of stretches of ``horizon`` logged steps, or less at an episode's end, with a flag.

    Args:
        flagged: ``[N]`` bool, of logged steps. episodes: ``[E, 2]``, first row and the one behind
            the last. starts: whether stretches begin with episodes (``initial``) or at any step.
    """
    count = np.concatenate([[0], flagged.cumsum()])
    first = episodes[:, 0] if starts == "initial" else np.concatenate([
        np.arange(*span) for span in episodes
    ])  # fmt: skip
    last = episodes[np.searchsorted(episodes[:, 0], first, "right") - 1, 1]
    return float((count[np.minimum(first + horizon, last)] > count[first]).mean())
