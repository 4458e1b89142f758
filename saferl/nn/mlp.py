"""Multi-layer perceptrons for M members and E ensemble elements at once.

A layer's weight is ``[M, E, in, out]`` and runs as one batched matrix product over M·E, so an
ensemble of two critics for sixteen members is a single call. M = E = 1 is the same code.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saferl.nn.blocks import ManyActions
from saferl.nn.perceptron import Plan, run
from saferl.rng import MemberRandom

# An initialiser fills one layer in torch.nn.Linear's layout: weight [out, in] and bias [out].
Initialiser = Callable[[Tensor, Tensor, torch.Generator], None]


def torch_default(weight: Tensor, bias: Tensor, generator: torch.Generator) -> None:
    """torch.nn.Linear's own: weight and bias from U(±1/√in)."""
    bound = weight.shape[1] ** -0.5
    nn.init.uniform_(weight, -bound, bound, generator=generator)
    nn.init.uniform_(bias, -bound, bound, generator=generator)


def orthogonal(gain: float = 2**0.5) -> Initialiser:
    """Orthogonal weight with the given gain, zero bias."""

    def fill(weight: Tensor, bias: Tensor, generator: torch.Generator) -> None:
        nn.init.orthogonal_(weight, gain, generator=generator)
        nn.init.zeros_(bias)

    return fill


def xavier(gain: float = 1.0) -> Initialiser:
    """Xavier-uniform weight with the given gain, zero bias."""

    def fill(weight: Tensor, bias: Tensor, generator: torch.Generator) -> None:
        nn.init.xavier_uniform_(weight, gain, generator=generator)
        nn.init.zeros_(bias)

    return fill


def uniform(bound: float | None = None, bias: float | None = None) -> Initialiser:
    """Weight and bias from U(±bound), 1/√in if None; the bias all ``bias`` where it is given."""

    def fill(weight: Tensor, biases: Tensor, generator: torch.Generator) -> None:
        width = weight.shape[1] ** -0.5 if bound is None else bound
        nn.init.uniform_(weight, -width, width, generator=generator)
        if bias is None:
            nn.init.uniform_(biases, -width, width, generator=generator)
        else:
            nn.init.constant_(biases, bias)

    return fill


PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}  # of products; None: that of the parameters
_compute: torch.dtype | None = None  # type of the products; None: that of the parameters


@contextlib.contextmanager
def compute_in(dtype: torch.dtype | None) -> Iterator[None]:
    """Form the products of all perceptrons in ``dtype``; parameters and outputs keep theirs."""
    global _compute
    before, _compute = _compute, dtype
    try:
        yield
    finally:
        _compute = before


class _Spread(torch.autograd.Function):
    """base [K,B,H], each row n times, plus y [K,B·n,J] @ w [K,J,H], summed in place."""

    @staticmethod
    def forward(ctx, base: Tensor, y: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(y, w)
        ctx.rows = base.shape[1]
        out = base.new_empty(*y.shape[:2], base.shape[2])
        out.unflatten(1, (ctx.rows, -1)).copy_(base.unsqueeze(2))
        return out.baddbmm_(y, w)

    @staticmethod
    def backward(ctx, grad: Tensor):
        y, w = ctx.saved_tensors
        need_base, need_y, need_w = ctx.needs_input_grad
        dbase = grad.unflatten(1, (ctx.rows, -1)).sum(2) if need_base else None
        dy = torch.bmm(grad, w.mT) if need_y else None
        dw = torch.bmm(y.mT, grad) if need_w else None
        return dbase, dy, dw


class MLP(nn.Module):
    """M·E independent ReLU perceptrons.

    Args:
        init: one CPU random stream per member; fixes M and the initial weights.
        sizes: widths ``(in, hidden…, out)``.
        ensemble: E.
        layer_norm: LayerNorm (affine) after each hidden linear layer, before the ReLU.
        hidden_init, final_init: how layers are initialised.
    """

    def __init__(
        self,
        init: MemberRandom,
        sizes: Sequence[int],
        ensemble: int = 1,
        layer_norm: bool = False,
        hidden_init: Initialiser = torch_default,
        final_init: Initialiser = torch_default,
    ):
        super().__init__()
        self.sizes, self.ensemble, self.members = tuple(sizes), ensemble, len(init.generators)
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        self.scales, self.offsets = nn.ParameterList(), nn.ParameterList()
        last = len(sizes) - 2
        for layer, (fan_in, fan_out) in enumerate(pairwise(sizes)):
            weight = torch.empty(self.members, ensemble, fan_in, fan_out)
            bias = torch.empty(self.members, ensemble, 1, fan_out)
            fill = final_init if layer == last else hidden_init
            for m, generator in enumerate(init.generators):
                for e in range(ensemble):
                    one, offset = torch.empty(fan_out, fan_in), torch.empty(fan_out)
                    fill(one, offset, generator)
                    weight[m, e], bias[m, e, 0] = one.T, offset
            self.weights.append(nn.Parameter(weight))
            self.biases.append(nn.Parameter(bias))
            if layer_norm and layer < last:
                self.scales.append(nn.Parameter(torch.ones_like(bias)))
                self.offsets.append(nn.Parameter(torch.zeros_like(bias)))
        # The same objects: to look them up in a ParameterList takes as long as a small product.
        self._stacks = tuple(self.weights), tuple(self.biases)

    def _run(
        self, inputs: Sequence[Tensor], layers: slice, elements: int, frozen: bool = False
    ) -> Tensor:
        """Some layers, with ReLUs between them."""
        weights, biases = (stack[layers] for stack in self._stacks)
        plan = Plan(len(inputs), elements, _compute or weights[0].dtype, frozen)
        return run(plan, *inputs, *weights, *biases)

    def _activate(self, x: Tensor, layer: int, elements: int) -> Tensor:
        if self.scales:
            scale, offset = self.scales[layer][:, :elements], self.offsets[layer][:, :elements]
            x = torch.addcmul(offset, F.layer_norm(x.to(scale.dtype), x.shape[-1:]), scale)
        return x.relu()

    def forward(
        self,
        *inputs: Tensor,
        elements: int | None = None,
        dropout: float = 0.0,
        random: MemberRandom | None = None,
        frozen: bool = False,
    ) -> Tensor:
        """``[M, B, in]`` (shared by the ensemble) or ``[M, E, B, in]`` to ``[M, E, B, out]``.

        Args:
            inputs: one tensor, or parts of it along the last axis.
            elements: only the first so many of the ensemble.
            dropout: probability that a hidden unit is zeroed (the others grow by 1/(1-p)), drawn
                from ``random``.
            frozen: only gradients of the inputs will be asked for, not of the parameters.
        """
        return self._from(0, inputs, elements or self.ensemble, dropout, random, frozen)

    def _from(
        self,
        first: int,
        inputs: Sequence[Tensor],
        elements: int,
        dropout: float = 0.0,
        random: MemberRandom | None = None,
        frozen: bool = False,
    ) -> Tensor:
        """`forward` from layer ``first`` on."""
        if not self.scales and not dropout:
            return self._run(inputs, slice(first, None), elements, frozen)
        last = len(self.weights) - 1
        for layer in range(first, last):
            x = self._run(inputs, slice(layer, layer + 1), elements, frozen)
            x = self._activate(x, layer, elements)
            if dropout:
                assert random is not None
                x = x * (random.uniform(*x.shape[1:]) >= dropout) / (1 - dropout)
            inputs = (x,)
        return self._run(inputs, slice(last, None), elements, frozen)

    def many(self, x: Tensor, y: Tensor) -> Tensor:
        """Each row of ``x`` ``[M, B, I]`` with each of its K ``y`` ``[M, B, K, J]``, I + J = in.

        Equal to `forward` on ``x`` repeated K times beside ``y``, as ``[M, E, B, K, out]``, but the
        first layer's product with ``x`` is formed once per row. Needs a hidden layer.
        """
        e, split, dtype = self.ensemble, x.shape[-1], x.dtype
        plan = Plan(1, e, _compute or self.weights[0].dtype)
        weight, bias = plan.stack(self.weights[0]), plan.stack(self.biases[0])
        base, weight = torch.baddbmm(bias, plan.join((x,)), weight[:, :split]), weight[:, split:]
        if x.device.type == "cpu" and not self.scales:
            *hidden, weight_out, bias_out = [
                plan.stack(which[layer])
                for layer in range(1, len(self.weights))
                for which in (self.weights, self.biases)
            ]
            actions = plan.join((y.flatten(2),)).unflatten(-1, y.shape[2:])
            out = ManyActions.apply(base, actions, weight, weight_out, *hidden) + bias_out
            out = out.unflatten(0, (-1, e))
        else:
            hidden = _Spread.apply(base, plan.join((y.flatten(1, 2),)), weight)
            out = self._from(1, (self._activate(hidden.unflatten(0, (-1, e)), 0, e),), e)
        return out.to(dtype).unflatten(2, y.shape[1:3])
