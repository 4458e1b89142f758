"""Stacked perceptrons equal ordinary ones, in values and gradients."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from saferl.nn import (
    MLP,
    DiscreteQEnsemble,
    QEnsemble,
    VEnsemble,
    orthogonal,
    polyak,
    torch_default,
    xavier,
)
from saferl.nn.mlp import _Spread
from saferl.rng import MemberRandom

M, E, B, K = 3, 2, 5, 4


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def build(sizes, **options) -> MLP:
    """An `MLP` in float64 whose LayerNorm parameters, if any, are not trivial."""
    mlp = MLP(MemberRandom(range(M)), sizes, **options).double()
    with torch.no_grad():
        for i, p in enumerate([*mlp.scales, *mlp.offsets]):
            p.add_(0.3 * normal(*p.shape, seed=i))
    return mlp


def one(mlp: MLP, m: int, e: int, x: Tensor) -> Tensor:
    """Member m, element e, as torch's own layers."""
    last = len(mlp.weights) - 1
    for layer, (weight, bias) in enumerate(zip(mlp.weights, mlp.biases)):
        x = F.linear(x, weight[m, e].T, bias[m, e, 0])
        if layer < last:
            if mlp.scales:
                scale, offset = mlp.scales[layer][m, e, 0], mlp.offsets[layer][m, e, 0]
                x = F.layer_norm(x, x.shape[-1:], scale, offset)
            x = x.relu()
    return x


def assert_same(mlp: MLP, got: Tensor, expected: Tensor, *inputs: Tensor) -> None:
    """Equal values, and equal gradients of a random projection of them."""
    torch.testing.assert_close(got, expected)
    weight = normal(*got.shape, seed=9)
    wanted = [*mlp.parameters(), *inputs]
    # A last bias of an element that was left out has no gradient.
    one, two = (
        torch.autograd.grad((weight * out).sum(), wanted, allow_unused=True, materialize_grads=True)
        for out in (got, expected)
    )
    for a, b in zip(one, two):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("sizes", [(3, 8, 6, 2), (3, 8, 1), (3, 2), (3, 1)])
def test_forward_is_torch_linear(sizes, layer_norm):
    mlp = build(sizes, ensemble=E, layer_norm=layer_norm)
    shared = normal(M, B, 3).requires_grad_()
    stack = [torch.stack([one(mlp, m, e, shared[m]) for e in range(E)]) for m in range(M)]
    assert_same(mlp, mlp(shared), torch.stack(stack), shared)
    own = normal(M, E, B, 3).requires_grad_()
    stack = [torch.stack([one(mlp, m, e, own[m, e]) for e in range(E)]) for m in range(M)]
    assert_same(mlp, mlp(own), torch.stack(stack), own)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_first_elements(layer_norm):
    mlp = build((3, 8, 1), ensemble=3, layer_norm=layer_norm)
    x = normal(M, B, 3).requires_grad_()
    assert_same(mlp, mlp(x, elements=2), mlp(x)[:, :2], x)


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("sizes", [(5, 8, 6, 1), (5, 8, 2)])
def test_many_is_forward_on_repeated_rows(sizes, layer_norm):
    mlp = build(sizes, ensemble=E, layer_norm=layer_norm)
    x, y = normal(M, B, 3).requires_grad_(), normal(M, B, K, 2, seed=1).requires_grad_()
    rows = torch.cat((x.unsqueeze(2).expand(-1, -1, K, -1), y), -1)
    expected = mlp(rows.flatten(1, 2)).unflatten(2, (B, K))
    got = mlp.many(x, y)
    assert got.shape == (M, E, B, K, sizes[-1])
    assert_same(mlp, got, expected, x, y)


def test_many_of_critics():
    critic = QEnsemble(MemberRandom(range(M)), 3, 2, (8,), E).double()
    s, a = normal(M, B, 3), normal(M, B, K, 2, seed=1)
    got = critic.many(s, a)
    assert got.shape == (M, E, B, K)
    for k in range(K):
        torch.testing.assert_close(got[..., k], critic(s, a[:, :, k]))
    torch.testing.assert_close(critic(s, a[:, :, 0], elements=1), critic(s, a[:, :, 0])[:, :1])


def test_own_derivatives():
    """Against finite differences, also where only some inputs need a gradient."""
    base = normal(2, B, 6, seed=2).requires_grad_()
    y, w = normal(2, B * K, 3, seed=3).requires_grad_(), normal(2, 3, 6, seed=4).requires_grad_()
    assert torch.autograd.gradcheck(_Spread.apply, (base, y, w))
    assert torch.autograd.gradcheck(_Spread.apply, (base, y.detach(), w))
    assert torch.autograd.gradcheck(_Spread.apply, (base.detach(), y, w.detach()))


def test_members_start_from_their_own_seed():
    three = MLP(MemberRandom([4, 5, 6]), (3, 8, 2), E)
    alone = MLP(MemberRandom([5]), (3, 8, 2), E)
    for a, b in zip(three.parameters(), alone.parameters()):
        assert torch.equal(a[1], b[0])
    assert not torch.equal(three.weights[0][0], three.weights[0][1])
    assert not torch.equal(three.weights[0][:, 0], three.weights[0][:, 1])


def test_dropout():
    mlp = MLP(MemberRandom([0, 1]), (1, 4000, 4000))
    with torch.no_grad():  # hidden units are all 1, and the output shows them
        mlp.weights[0].zero_(), mlp.biases[0].fill_(1), mlp.biases[1].zero_()
        mlp.weights[1].copy_(torch.eye(4000).expand_as(mlp.weights[1]))
    x = torch.zeros(2, 3, 1)
    out = mlp(x, dropout=0.25, random=MemberRandom([0, 1]))
    torch.testing.assert_close(out.unique(), torch.tensor([0.0, 4 / 3]))
    assert (out == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert not torch.equal(out[0], out[1])
    assert not torch.equal(out[:, :, 0], out[:, :, 1])
    assert torch.equal(out, mlp(x, dropout=0.25, random=MemberRandom([0, 1])))
    assert torch.equal(out[1:], _member(mlp, 1)(x[1:], dropout=0.25, random=MemberRandom([1])))
    assert (mlp(x) == 1).all()


def _member(mlp: MLP, m: int) -> MLP:
    alone = MLP(MemberRandom([0]), mlp.sizes)
    with torch.no_grad():
        for a, b in zip(alone.parameters(), mlp.parameters()):
            a.copy_(b[m : m + 1])
    return alone


def test_initialisers():
    """Layout is torch.nn.Linear's, [out, in], so fans are not exchanged."""

    def fill(initialiser, out: int = 300, fan_in: int = 100):
        weight, bias = torch.full((out, fan_in), 9.0), torch.full((out,), 9.0)
        initialiser(weight, bias, torch.Generator().manual_seed(0))
        return weight, bias

    weight, bias = fill(torch_default)
    assert weight.abs().max() == pytest.approx(0.1, rel=1e-3)
    assert bias.abs().max() == pytest.approx(0.1, rel=0.05)
    weight, bias = fill(xavier(0.5))
    assert weight.abs().max() == pytest.approx(0.5 * math.sqrt(6 / 400), rel=1e-3)
    assert (bias == 0).all()
    weight, bias = fill(orthogonal(3.0))
    torch.testing.assert_close(weight.T @ weight, 9 * torch.eye(100), atol=1e-4, rtol=0)
    assert (bias == 0).all()


def test_polyak():
    source, target = VEnsemble(MemberRandom([0]), 3, (4,)), VEnsemble(MemberRandom([1]), 3, (4,))
    before = [p.detach().clone() for p in target.parameters()]
    polyak(target, source, 0.25)
    for p, q, old in zip(target.parameters(), source.parameters(), before):
        torch.testing.assert_close(p, 0.25 * q + 0.75 * old)
    polyak(target, source, 1.0)
    for p, q in zip(target.parameters(), source.parameters()):
        assert torch.equal(p, q)


@pytest.mark.parametrize("quantiles", [0, 5])
def test_discrete_critics(quantiles):
    critic = DiscreteQEnsemble(MemberRandom(range(M)), 3, 4, (8,), E, quantiles)
    s = normal(M, B, 3).float()
    distribution = critic.distribution(s)
    assert distribution.shape == (M, E, B, 4, max(1, quantiles))
    torch.testing.assert_close(critic(s), distribution.mean(-1))
    assert torch.equal(critic.mode(s), critic(s).mean(1).argmax(-1))
    assert torch.equal(critic.sample(s, MemberRandom(range(M))), critic.mode(s))
