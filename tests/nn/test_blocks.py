"""The block-wise path of `MLP.many` against the plain one."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from saferl.nn import MLP, blocks
from saferl.nn.blocks import ManyActions
from saferl.rng import MemberRandom


def arguments(hidden: tuple[int, ...], out: int = 1) -> list[torch.Tensor]:
    """K = 2 networks, 5 states, 3 actions of 2 components; everything needs a gradient."""
    torch.manual_seed(0)
    shapes = [(2, 5, hidden[0]), (2, 5, 3, 2), (2, 2, hidden[0]), (2, hidden[-1], out)]
    for fan_in, fan_out in pairwise(hidden):
        shapes += [(2, fan_in, fan_out), (2, 1, fan_out)]
    return [torch.randn(s, dtype=torch.float64).requires_grad_() for s in shapes]


@pytest.mark.parametrize("block", [1, 300, 2**20])  # one state, a few and a rest, all at once
@pytest.mark.parametrize("hidden", [(4,), (4, 3), (4, 3, 6)])
def test_derivatives_against_finite_differences(hidden, block, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", block)
    assert torch.autograd.gradcheck(ManyActions.apply, arguments(hidden, out=2))


@pytest.mark.parametrize("block", [1, 1000, 2**20])
def test_blocks_are_the_layers_in_one_piece(block, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", block)
    mlp = MLP(MemberRandom([0, 1]), (5, 16, 12, 1), ensemble=2)
    x, y = torch.randn(2, 9, 3), torch.randn(2, 9, 4, 2)
    rows = torch.cat((x.unsqueeze(2).expand(-1, -1, 4, -1), y), -1)
    plain = mlp(rows.flatten(1, 2)).unflatten(2, (9, 4))
    got = mlp.many(x, y)
    torch.testing.assert_close(got, plain)
    weights = list(mlp.parameters())
    for a, b in zip(
        torch.autograd.grad(got.square().sum(), weights),
        torch.autograd.grad(plain.square().sum(), weights),
    ):
        torch.testing.assert_close(a, b)


def test_nothing_is_kept_where_no_gradient_is_needed(monkeypatch):
    kept = []
    monkeypatch.setattr(ManyActions, "backward", None)
    plain = [tensor.detach() for tensor in arguments((4, 3))]

    class Context:
        needs_input_grad = (False,) * len(plain)

        def save_for_backward(self, *tensors):
            kept.extend(tensors)

    context = Context()
    ManyActions.forward(context, *plain)
    assert context.units == []
