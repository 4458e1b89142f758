"""Trust-region steps for M members at once: TRPO, CPO, and the line search after them.

Vectors are flat, ``[M, P]``: all parameters of a member side by side. Nothing here reads a value,
so all members take the same operations and masks decide which result is whose.

A step x solves, for each member,

    maximise gᵀx   subject to   c + bᵀx ≤ 0,   ½ xᵀHx ≤ δ

with g the gradient of the reward, b that of the cost, c by how much the cost exceeds its budget and
H the curvature of the mean KL divergence (Achiam et al. 2017, arXiv 1705.10528, section 6). Their
solution, with q = gᵀH⁻¹g, r = -gᵀH⁻¹b, s = bᵀH⁻¹b, A = q - r²/s and B = 2δ - c²/s, goes through the
dual of two multipliers in two regions. In the metric of H the same problem is a disc of radius √2δ
and a half-plane, both in the plane of H⁻¹g and H⁻¹b. So there are three cases:

- `FREE`: the best point of the disc, √(2δ/q) H⁻¹g, which is TRPO's step, keeps the constraint;
- `CORNER`: it does not, and the half-plane cuts the disc: the best point is on both boundaries,
  √(B/A) H⁻¹(g + (r/s) b) - (c/s) H⁻¹b;
- `RECOVERY`: no point of the disc keeps the constraint: -√(2δ/s) H⁻¹b lowers the cost the most.

It is exact for c of either sign. Beware when comparing with other texts that g here is *ascended*:
the published dual is of a minimisation, and with an ascent's g the sign of r turns around.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

FREE, CORNER, RECOVERY = 0, 1, 2
SHRINK = 0.8
"""Factor of the step between two tries of the line search."""


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """Stacked tensors ``[M, …]`` as vectors ``[M, P]``."""
    return torch.cat([tensor.flatten(1) for tensor in tensors], 1)


def gradient(
    values: Tensor,
    parameters: Sequence[Tensor],
    retain_graph: bool | None = None,
    create_graph: bool = False,
) -> Tensor:
    """∇ of each member's value ``[M]``, ``[M, P]``; members do not share parameters."""
    found = torch.autograd.grad(
        values.sum(), parameters, retain_graph=retain_graph, create_graph=create_graph
    )
    return flatten(found)


def curvature(
    divergence: Tensor, parameters: Sequence[Tensor], damping: float
) -> Callable[[Tensor], Tensor]:
    """v ↦ (∇²divergence + damping · I) v, both ``[M, P]``, from a divergence ``[M]``."""
    slope = gradient(divergence, parameters, create_graph=True)

    def product(vector: Tensor) -> Tensor:
        return gradient((slope * vector).sum(1), parameters, retain_graph=True) + damping * vector

    return product


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(1, keepdim=True)


def conjugate_gradient(
    product: Callable[[Tensor], Tensor], right: Tensor, iterations: int
) -> Tensor:
    """About H⁻¹ ``right`` ``[M, P]``, for positive definite H given by its product."""
    tiny = torch.finfo(right.dtype).tiny
    x, residual, direction = torch.zeros_like(right), right, right
    size = _dot(right, right)
    for _ in range(iterations):
        image = product(direction)
        rate = size / _dot(direction, image).clamp_min(tiny)
        x = x + rate * direction
        residual = residual - rate * image
        next_size = _dot(residual, residual)
        direction = residual + next_size / size.clamp_min(tiny) * direction
        size = next_size
    return x


def trpo_step(g: Tensor, inverse_g: Tensor, delta: float) -> Tensor:
    """√(2δ / gᵀH⁻¹g) H⁻¹g, ``[M, P]``; 0 where g is 0."""
    q = _dot(g, inverse_g).clamp_min(torch.finfo(g.dtype).tiny)
    return (2 * delta / q).sqrt() * inverse_g


class Step(NamedTuple):
    """What `cpo_step` returns."""

    step: Tensor  # [M, P]
    case: Tensor  # [M] int64: FREE, CORNER or RECOVERY


def cpo_step(
    g: Tensor, b: Tensor, c: Tensor, inverse_g: Tensor, inverse_b: Tensor, delta: float
) -> Step:
    """CPO's step; the module's docstring has the problem and its cases.

    Args:
        g, b: gradients of reward and cost, ``[M, P]``.
        c: excess of the cost over its budget ``[M]``; -inf where there is no budget.
        inverse_g, inverse_b: H⁻¹g and H⁻¹b, ``[M, P]``.
        delta: δ.
    """
    limits = torch.finfo(g.dtype)
    c = c[:, None]
    q, r, s = _dot(g, inverse_g), -_dot(g, inverse_b), _dot(b, inverse_b)
    positive = s.clamp_min(limits.tiny)
    root = positive.sqrt()  # change of the cost along the unit vector H⁻¹b / √s
    free = trpo_step(g, inverse_g, delta)
    keeps = c + _dot(b, free) <= 0
    cut = c <= (2 * delta) ** 0.5 * root  # the half-plane reaches into the disc
    # Across b: the part of H⁻¹g that does not change the cost, of squared length A. Where g is a
    # multiple of b, A is rounding and there is nothing to gain across.
    across = inverse_g + r / positive * inverse_b
    a = q - r.square() / positive
    room = (2 * delta - c.square() / positive).clamp_min(0)  # B
    gain = torch.where(a > 8 * limits.eps * q, room / a.clamp_min(limits.tiny), 0.0).sqrt()
    corner = gain * across - c / positive * inverse_b
    recovery = -((2 * delta) ** 0.5) / root * inverse_b
    step = torch.where(keeps, free, torch.where(cut, corner, recovery))
    case = torch.where(keeps, FREE, torch.where(cut, CORNER, RECOVERY))
    return Step(step, case.squeeze(1))


class Surrogates(NamedTuple):
    """What the line search judges a try by."""

    reward: Tensor  # [M]
    costs: Tensor  # [M, C]
    divergence: Tensor  # [M], from the policy before the step


class Search(NamedTuple):
    """What `line_search` returns, each ``[M]``."""

    scale: Tensor  # share of the step that was taken, 0 where no try was accepted
    divergence: Tensor  # after it


@torch.no_grad()
def line_search(
    evaluate: Callable[[], Surrogates],
    parameters: Sequence[Tensor],
    step: Tensor,
    allowed: Tensor,
    gains: Tensor,
    delta: float,
    tries: int,
) -> Search:
    """Move parameters by the longest of step · 0.8^i that each member accepts, or not at all.

    Args:
        evaluate: surrogates at the parameters as they are when it is called.
        parameters: moved in place. step: ``[M, P]``.
        allowed: by how much each cost may rise, ``[M, C]``.
        gains: ``[M]`` bool, whether the reward has to rise.
        delta: the largest divergence.
        tries: evaluations; all are made, as nothing is read.
    """
    before = [parameter.clone() for parameter in parameters]
    start = evaluate()

    def move(scale: Tensor) -> None:
        parts = (scale[:, None] * step).split([p[0].numel() for p in parameters], 1)
        for parameter, old, part in zip(parameters, before, parts):
            parameter.copy_(old + part.view_as(old))

    accepted = torch.zeros_like(gains)
    taken, divergence = torch.zeros_like(start.reward), torch.zeros_like(start.reward)
    for i in range(tries):
        move(torch.full_like(taken, SHRINK**i))
        found = evaluate()
        good = (found.divergence <= delta) & (found.costs - start.costs <= allowed).all(1)
        good &= (found.reward > start.reward) | ~gains
        first = good & ~accepted
        taken = torch.where(first, SHRINK**i, taken)
        divergence = torch.where(first, found.divergence, divergence)
        accepted |= good
    move(taken)
    return Search(taken, divergence)
