"""The trust-region algebra against brute force, and each member against itself alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from saferl.agents.ogsrl.trust_region import (
    CORNER,
    FREE,
    RECOVERY,
    SHRINK,
    Surrogates,
    conjugate_gradient,
    cpo_step,
    curvature,
    flatten,
    gradient,
    line_search,
    trpo_step,
)

DELTA, P, PROBLEMS = 0.01, 6, 400


def problems(seed: int = 0, count: int = PROBLEMS):
    """H, g, b, c of random problems; among them b ≈ 0, c = 0, g along b, and no feasible point."""
    random = np.random.default_rng(seed)
    root = random.normal(size=(count, P, P))
    h = root @ root.swapaxes(1, 2) / P + 0.05 * np.eye(P)
    g, b = random.normal(size=(2, count, P)) * 10 ** random.uniform(-2, 2, (2, count, 1))
    s = np.einsum("mi,mij,mj->m", b, np.linalg.inv(h), b)
    # Most budgets lie where the disc is cut, some far on either side of it.
    c = np.sqrt(2 * DELTA * s) * random.uniform(-1.6, 1.6, count)
    c[:20], b[20:40], c[40:60] = 0, b[20:40] * 1e-9, c[40:60] * 100
    b[60:80] = g[60:80] * random.uniform(0.5, 2, (20, 1)) * random.choice([-1, 1], (20, 1))
    return h, g, b, c


def brute(h: np.ndarray, g: np.ndarray, b: np.ndarray, c: np.ndarray):
    """Best objective within the constraint (NaN: there is no such point), and the least cost bᵀx.

    With H = LLᵀ and y = Lᵀx the problem is a circle and a half-plane, in the plane of L⁻¹g and
    L⁻¹b. Angles on the circle are searched on grids that narrow around the best feasible one.
    """
    root = np.linalg.cholesky(h)
    g, b = (np.linalg.solve(root, v[..., None])[..., 0] for v in (g, b))
    basis = np.linalg.qr(np.stack([g, b], 2))[0]
    flat_g, flat_b = (np.einsum("mi,mik->mk", v, basis) for v in (g, b))
    radius = math.sqrt(2 * DELTA)

    def search(objective: np.ndarray, allowed: bool) -> np.ndarray:
        low, high = np.zeros(len(c)), np.full(len(c), 2 * math.pi)
        for _ in range(6):
            angle = np.linspace(low, high, 2001, axis=1)
            y = radius * np.stack([np.cos(angle), np.sin(angle)], -1)
            value = np.einsum("mk,mnk->mn", objective, y)
            if allowed:
                inside = c[:, None] + np.einsum("mk,mnk->mn", flat_b, y) <= 0
                value = np.where(inside, value, -np.inf)
            best, width = value.argmax(1), (high - low) / 2000
            middle = angle[np.arange(len(c)), best]
            low, high = middle - width, middle + width
        return value.max(1)

    found = search(flat_g, True)
    return np.where(np.isfinite(found), found, np.nan), -search(-flat_b, False)


def solve(h, g, b, c):
    h, g, b, c = (torch.from_numpy(np.ascontiguousarray(x)) for x in (h, g, b, c))
    inverse = [torch.linalg.solve(h, v[..., None])[..., 0] for v in (g, b)]
    return cpo_step(g, b, c, *inverse, DELTA)


def test_cpo_step_is_the_brute_force_optimum():
    h, g, b, c = problems()
    best, least = brute(h, g, b, c)
    step, case = (x.numpy() for x in solve(h, g, b, c))
    radius = np.einsum("mi,mij,mj->m", step, h, step) / 2
    assert (radius <= DELTA * (1 + 1e-9)).all()
    gain, cost = (step * g).sum(1), (step * b).sum(1)
    feasible = ~np.isnan(best)
    scale = np.abs(g).max(1)
    # The grid's last width is 1e-18 of the circle, so what differs is an error of the step.
    np.testing.assert_allclose((gain / scale)[feasible], (best / scale)[feasible], atol=1e-6)
    assert (c + cost <= 1e-9 * np.abs(c) + 1e-12)[feasible].all()
    size = np.abs(b).max(1)
    np.testing.assert_allclose((cost / size)[~feasible], (least / size)[~feasible], atol=1e-6)
    assert (feasible == (case != RECOVERY)).all()
    for kind in (FREE, CORNER, RECOVERY):
        assert (case == kind).sum() > 40
    assert (case[c > 0] == CORNER).any() and (case[c < 0] == CORNER).any()


def dual(q: float, r: float, s: float, c: float) -> tuple[float, float]:
    """λ* and ν* by the two regions of CPO's dual, for an ascent's gradient: r = -gᵀH⁻¹b."""
    a, b = q - r * r / s, 2 * DELTA - c * c / s
    best = (-math.inf, 0.0)
    for region in "ab":
        price = math.sqrt(a / b) if region == "a" else math.sqrt(q / (2 * DELTA))
        above = (region == "a") == (c > 0)  # the region lies above r / c
        if c == 0:
            if (r < 0) != (region == "a"):
                continue
        elif above:
            price = max(price, r / c, 0.0)
        elif r / c <= 0:
            continue
        else:
            price = min(price, r / c)
        if region == "a":
            value = (r * r / s - q) / (2 * price) + price / 2 * (c * c / s - 2 * DELTA) - r * c / s
        else:
            value = -(q / price + 2 * price * DELTA) / 2
        best = max(best, (value, price))
    return best[1], max(0.0, (best[1] * c - r) / s)


def test_cpo_step_is_the_published_dual():
    h, g, b, c = problems(seed=1, count=200)
    step, case = (x.numpy() for x in solve(h, g, b, c))
    checked = 0
    for m in range(len(c)):
        inverse_g, inverse_b = np.linalg.solve(h[m], g[m]), np.linalg.solve(h[m], b[m])
        q, r, s = g[m] @ inverse_g, -g[m] @ inverse_b, b[m] @ inverse_b
        if c[m] ** 2 / s >= 2 * DELTA or q - r * r / s < 1e-9 * q:
            continue  # the dual has no such region, or divides by 0
        price, penalty = dual(q, r, s, c[m])
        np.testing.assert_allclose(step[m], (inverse_g - penalty * inverse_b) / price, rtol=1e-6,
                                   atol=1e-9 * np.abs(step[m]).max())  # fmt: skip
        assert (penalty > 0) == (case[m] == CORNER)
        checked += 1
    assert checked > 80


def test_the_sign_of_the_cross_term():
    """H = I: reward along (1, 1), cost along (1, 0) and at its budget: what is left is (0, 1)."""
    g, b = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    step, case = cpo_step(g, b, torch.zeros(1), g, b, 0.5)
    torch.testing.assert_close(step, torch.tensor([[0.0, 1.0]]))
    assert case == CORNER
    step, case = cpo_step(g, -b, torch.zeros(1), g, -b, 0.5)  # the cost falls with the reward
    torch.testing.assert_close(step, torch.tensor([[0.5, 0.5]]).sqrt())
    assert case == FREE


def test_no_budget_no_gradient_and_no_way_back(float64):
    g, b = torch.eye(2)[:1], torch.eye(2)[1:]
    inf = torch.tensor([math.inf])
    assert torch.equal(cpo_step(g, b, -inf, g, b, DELTA).step, trpo_step(g, g, DELTA))
    nothing = torch.zeros(1, 2)
    assert torch.equal(trpo_step(nothing, nothing, DELTA), nothing)
    # Above a budget that no parameter moves: stay. Below it: only the reward counts.
    assert torch.equal(cpo_step(g, nothing, inf, g, nothing, DELTA).step, nothing)
    free = cpo_step(g, nothing, torch.tensor([-1.0]), g, nothing, DELTA).step
    assert torch.equal(free, trpo_step(g, g, DELTA))


def test_members_do_not_depend_on_each_other():
    h, g, b, c = problems(seed=2, count=100)
    together = solve(h, g, b, c)
    for m in range(0, 100, 7):
        one = slice(m, m + 1)
        alone = solve(h[one], g[one], b[one], c[one])
        torch.testing.assert_close(together.step[one], alone.step, rtol=1e-9, atol=0)
        assert together.case[m] == alone.case[0]


# Curvature and conjugate gradients ---------------------------------------------------------------


@pytest.mark.parametrize(("kind", "rtol"), [(torch.float64, 1e-6), (torch.float32, 1e-2)])
def test_conjugate_gradient_solves(kind, rtol):
    h, g, _, _ = (torch.from_numpy(x).to(kind) for x in problems(count=100))
    g[3] = 0

    def product(v: Tensor) -> Tensor:
        return (h @ v[..., None])[..., 0]

    exact = torch.linalg.solve(h.double(), g.double()[..., None])[..., 0].to(kind)
    scale = exact.abs().amax(1, keepdim=True).clamp_min(1)
    # Far more iterations than dimensions leave a solved member where it is.
    for iterations in (3 * P, 40 * P):
        found = conjugate_gradient(product, g, iterations)
        torch.testing.assert_close(found / scale, exact / scale, rtol=0, atol=rtol)
    assert torch.equal(found[3], torch.zeros(P, dtype=kind))
    few = conjugate_gradient(product, g, 2)
    assert not torch.allclose(few / scale, exact / scale, rtol=0, atol=10 * rtol)


def test_curvature_is_the_hessian_and_damping(float64):
    random = torch.Generator().manual_seed(0)
    members, rows = 3, 5
    x = torch.randn(members, rows, 2, generator=random)
    parameters = [torch.randn(members, 2, 2, generator=random).requires_grad_(),
                  torch.randn(members, 1, 2, generator=random).requires_grad_()]  # fmt: skip

    def value(weight: Tensor, bias: Tensor) -> Tensor:
        return ((x @ weight + bias).tanh() ** 3).sum((1, 2))

    product = curvature(value(*parameters), parameters, 0.3)
    vector = torch.randn(members, 6, generator=random)
    found = product(vector)
    for m in range(members):

        def one(flat: Tensor, m: int = m) -> Tensor:
            return ((x[m] @ flat[:4].view(2, 2) + flat[4:]).tanh() ** 3).sum()

        point = flatten(parameters)[m].detach()
        dense = torch.autograd.functional.hessian(one, point) + 0.3 * torch.eye(6)
        torch.testing.assert_close(found[m], dense @ vector[m])
    slope = gradient(value(*parameters), parameters)
    expected = torch.autograd.grad(value(*parameters).sum(), parameters)
    assert torch.equal(slope, flatten(expected))


# The line search ---------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)])
def test_line_search_accepts_by_member(order):
    """One parameter each, at 0 before a step of 1; surrogates are lines and a parabola in it."""
    inf = math.inf
    #        reward costs       KL   allowed      gains  scale that is accepted
    cases = [
        (1.0, (0.0, 0.0), 0.5, (0.0, 0.0), True, 1.0),
        (1.0, (0.0, 0.0), 1.7, (0.0, 0.0), True, SHRINK**2),  # 1.7 x² ≤ 1
        (1.0, (1.0, 0.0), 0.5, (0.7, 0.0), True, SHRINK**2),  # x ≤ 0.7
        (1.0, (0.0, 1.0), 0.5, (0.0, 0.7), True, SHRINK**2),  # any of the costs
        (1.0, (1.0, 0.0), 0.5, (0.0, 0.0), False, 0.0),  # may not rise at all
        (-1.0, (-1.0, 0.0), 0.5, (0.0, 0.0), False, 1.0),  # pays to come down
        (-1.0, (-1.0, 0.0), 0.5, (0.1, 0.0), True, 0.0),  # pays for nothing
        (1.0, (5.0, 9.0), 0.5, (inf, inf), True, 1.0),  # without a budget
        (1.0, (0.0, 0.0), math.nan, (0.0, 0.0), True, 0.0),
    ][order]
    reward, costs, kl, allowed, gains, expected = (torch.tensor(column) for column in zip(*cases))
    parameter = torch.zeros(len(cases), 1, 1)
    other = torch.ones(len(cases), 2)

    def evaluate() -> Surrogates:
        x = parameter[:, 0, 0]
        torch.testing.assert_close(other[:, 0] - 1, 2 * x)
        return Surrogates(reward * x, costs * x[:, None], kl * x.square())

    step = torch.tensor([[1.0, 2.0, 0.0]]).expand(len(cases), -1)
    found = line_search(evaluate, [parameter, other], step, allowed, gains, 1.0, 10)
    torch.testing.assert_close(found.scale, expected)
    torch.testing.assert_close(parameter[:, 0, 0], expected)
    torch.testing.assert_close(other[:, 0], 1 + 2 * expected)
    divergence = torch.where(expected > 0, kl * expected.square(), 0.0)
    torch.testing.assert_close(found.divergence, divergence)


def test_line_search_without_costs():
    parameter = torch.zeros(2, 1)

    def evaluate() -> Surrogates:
        x = parameter[:, 0]
        return Surrogates(torch.tensor([1.0, -1.0]) * x, x.new_zeros(2, 0), x.square())

    gains = torch.ones(2, dtype=torch.bool)
    found = line_search(evaluate, [parameter], torch.ones(2, 1), torch.zeros(2, 0), gains, 1.0, 4)
    assert found.scale.tolist() == [1.0, 0.0] == parameter[:, 0].tolist()
