"""Lagrange multipliers λ of C constraints for M members, moved by how far each is exceeded."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saferl.errors import SaferlError, unknown

KINDS = ("gradient", "softplus", "pid")


class Multipliers(nn.Module):
    """λ ``[M, C]`` ≥ 0, one per member and constraint, none of which depends on another.

    With e the excess of an update, positive where the constraint is broken:

    - ``gradient``: λ ← min(relu(λ + lr e), maximum), projected gradient ascent of λ e;
    - ``softplus``: λ = softplus(z), z ← z + lr σ(z) e, plain ascent of λ e in z. Not Adam, which
      steps by the sign of e more than by its size, and so does not slow down near the limit;
    - ``pid``: Stooke, Achiam and Abbeel 2020 (arXiv 2007.03964), with lr as the integral's gain:
      I ← relu(I + e); λ = min(relu(kp relu(e) + lr I + kd relu(e - e_before)), maximum), e_before
      = 0 at first. I is held to maximum / lr, so that it does not wind up beyond the bound. With
      kp = kd = 0 it is ``gradient``.

    All state is in buffers, moved in place by arithmetic that never reads a value, so a CUDA graph
    can record it and a checkpoint holds it.

    Args:
        lr: rate per update; a float, or one per member ``[M]``, as are the gains and the bound.
        kp, kd: gains of ``pid``.
        maximum: upper bound of λ.
        start: first λ; None: 0, and log 2 (z = 0) or the maximum for ``softplus``, whose λ is
            never 0.

    Raises:
        SaferlError: an unknown kind, a gain that is negative or not finite, a maximum that is not
            above 0, or a start outside [0, maximum] (``softplus``: 0; ``pid``: any but 0).
    """

    lr: Tensor
    kp: Tensor
    kd: Tensor
    maximum: Tensor
    level: Tensor
    integral: Tensor
    before: Tensor

    def __init__(
        self,
        members: int,
        constraints: int = 1,
        kind: str = "gradient",
        lr: float | Tensor = 1e-3,
        kp: float | Tensor = 0.1,
        kd: float | Tensor = 0.001,
        maximum: float | Tensor = math.inf,
        start: float | None = None,
    ):
        super().__init__()
        if kind not in KINDS:
            raise unknown("kind of multiplier", kind, KINDS)
        self.kind = kind
        for name, value in {"lr": lr, "kp": kp, "kd": kd, "maximum": maximum}.items():
            column = torch.as_tensor(value, dtype=torch.get_default_dtype()).reshape(-1, 1)
            if name == "maximum":
                if not (column > 0).all():
                    raise SaferlError(f"a multiplier's maximum is a number above 0, got {value}")
            elif not ((column >= 0) & (column < math.inf)).all():
                raise SaferlError(f"{name} of a multiplier is a number of 0 or more, got {value}")
            self.register_buffer(name, column.expand(members, 1).clone(), persistent=False)
        if start is None:
            first = math.log(2) if kind == "softplus" else 0.0
            level = torch.full((members, constraints), first).minimum(self.maximum)
        else:
            if not 0 <= start < math.inf or (start == 0 and kind == "softplus"):
                bound = "above 0" if kind == "softplus" else "of 0 or more"
                raise SaferlError(f"a {kind} multiplier starts at a number {bound}, got {start}")
            if start and kind == "pid":
                raise SaferlError("a pid multiplier starts at 0: its integral is what it remembers")
            if bool((self.maximum < start).any()):
                raise SaferlError(f"a multiplier that starts at {start:g} is above its maximum")
            level = torch.full((members, constraints), float(start))
        self.register_buffer("level", _inverse_softplus(level) if kind == "softplus" else level)
        if kind == "pid":
            self.register_buffer("integral", torch.zeros_like(level))
            self.register_buffer("before", torch.zeros_like(level))

    def value(self) -> Tensor:
        """λ ``[M, C]``, a tensor of its own that later updates do not change."""
        return F.softplus(self.level) if self.kind == "softplus" else self.level.clone()

    @torch.no_grad()
    def update(self, excess: Tensor) -> None:
        """One step on the excess e ``[M, C]``, in place."""
        if self.kind == "softplus":
            self.level.add_(self.lr * self.level.sigmoid() * excess)
            self.level.copy_(torch.minimum(self.level, _inverse_softplus(self.maximum)))
            return
        if self.kind == "gradient":
            self.level.add_(self.lr * excess)
        else:
            self.integral.add_(excess).clamp_(min=0)
            self.integral.copy_(torch.minimum(self.integral, self.maximum / self.lr))
            rise = (excess - self.before).relu()
            self.level.copy_(self.kp * excess.relu() + self.lr * self.integral + self.kd * rise)
            self.before.copy_(excess)
        self.level.copy_(torch.minimum(self.level.relu(), self.maximum))


def _inverse_softplus(x: Tensor) -> Tensor:
    return x + torch.log(-torch.expm1(-x))
