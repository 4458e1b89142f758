"""`Layers` against finite differences and against torch's own operations."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from saferl.nn.perceptron import Layers, Plan, plain

M, E, B = 2, 3, 4


def arguments(
    sizes: tuple[int, ...], own_rows: bool = False, dtype: torch.dtype = torch.float64
) -> tuple[list[Tensor], list[Tensor]]:
    """An input in two parts, and all weights and biases; everything needs a gradient."""
    random = torch.Generator().manual_seed(0)
    rows = (M, E, B) if own_rows else (M, B)
    inputs = [(*rows, 2), (*rows, sizes[0] - 2)]
    weights = [(M, E, i, o) for i, o in pairwise(sizes)]
    biases = [(M, E, 1, o) for o in sizes[1:]]
    made = [
        [torch.randn(s, generator=random, dtype=dtype).requires_grad_() for s in shapes]
        for shapes in (inputs, weights + biases)
    ]
    return made[0], made[1]


@pytest.mark.parametrize("own_rows", [False, True])
@pytest.mark.parametrize("sizes", [(5, 4), (5, 1), (5, 4, 3, 1), (5, 34, 3)])
def test_derivatives_against_finite_differences(sizes, own_rows):
    inputs, parameters = arguments(sizes, own_rows)
    plan = Plan(2, E, torch.float64)

    def layers(*tensors: Tensor) -> Tensor:
        return Layers.apply(plan, *tensors)

    constant = [parameter.detach() for parameter in parameters]
    given = [part.detach() for part in inputs]
    assert torch.autograd.gradcheck(layers, (*inputs, *parameters))
    assert torch.autograd.gradcheck(layers, (given[0], inputs[1], *constant))
    assert torch.autograd.gradcheck(layers, (*given, *parameters))
    if max(sizes) < 6:
        assert torch.autograd.gradgradcheck(layers, (*inputs, *parameters))
        assert torch.autograd.gradgradcheck(layers, (given[0], inputs[1], *parameters))


@pytest.mark.parametrize("elements", [1, 2, 3])
@pytest.mark.parametrize("sizes", [(5, 40, 50, 1), (40, 40, 33)])  # rows that are not whole lines
def test_layers_are_the_plain_ones_in_float32(sizes, elements):
    inputs, parameters = arguments(sizes, dtype=torch.float32)
    plan = Plan(2, elements, torch.float32)
    got, expected = (f(plan, *inputs, *parameters) for f in (Layers.apply, plain))
    assert got.shape == (M, elements, B, sizes[-1])
    torch.testing.assert_close(got, expected)
    wanted = [*inputs, *parameters]
    one, two = (torch.autograd.grad(out.square().sum(), wanted) for out in (got, expected))
    for a, b, tensor in zip(one, two, wanted):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        assert a.is_contiguous() or tensor.dim() < 4  # fused Adam takes it for granted


def test_only_needed_gradients_are_formed(monkeypatch):
    """A part of the input that is data gets none, and no product is spent on it."""
    inputs, parameters = arguments((5, 4, 1))
    seen = []

    def through(d: Tensor, weight: Tensor, original=Layers.backward.__globals__["_through"]):
        seen.append(weight.shape[1])
        return original(d, weight)

    monkeypatch.setitem(Layers.backward.__globals__, "_through", through)
    constant = [parameter.detach() for parameter in parameters]
    out = Layers.apply(Plan(2, E, torch.float64), inputs[0].detach(), inputs[1], *constant)
    torch.autograd.grad(out.sum(), inputs[1])
    assert seen == [4, 3]  # hidden units, and the three components of the second part
