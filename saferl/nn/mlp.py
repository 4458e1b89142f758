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


NARROW = 32  # columns up to which the transposed product is the faster one (CPU)


class _NarrowHead(torch.autograd.Function):
    """x [K,B,H] @ w [K,H,J] for few columns J, where a plain product is up to 5 times slower."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return torch.bmm(w.mT, x.mT).mT

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, w = ctx.saved_tensors
        need_x, need_w = ctx.needs_input_grad
        dx = (grad * w.mT if w.shape[-1] == 1 else torch.bmm(grad, w.mT)) if need_x else None
        # In the weight's own layout, which fused Adam takes for granted.
        dw = torch.bmm(grad.mT, x).mT.contiguous() if need_w else None
        return dx, dw


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


def _cast(x: Tensor) -> Tensor:
    return x if _compute is None else x.to(_compute)


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

    def _shared(self, x: Tensor, elements: int) -> Tensor:
        """``[M, …]`` to ``[M·E, …]``: the same input for every ensemble element."""
        x = x.unsqueeze(1).expand(self.members, elements, *x.shape[1:])
        return x.reshape(self.members * elements, *x.shape[2:])

    def _stacked(self, which: nn.ParameterList, layer: int, elements: int) -> Tensor:
        parameter = which[layer]
        if elements < self.ensemble:
            parameter = parameter[:, :elements]
        return _cast(parameter.flatten(0, 1))

    def _activate(self, x: Tensor, layer: int, elements: int) -> Tensor:
        if self.scales:
            scale = self._stacked(self.scales, layer, elements)
            offset = self._stacked(self.offsets, layer, elements)
            x = torch.addcmul(offset, F.layer_norm(x, x.shape[-1:]), scale)
        return x.relu_()

    def _layers(
        self,
        x: Tensor,
        first: int,
        elements: int,
        dropout: float = 0.0,
        random: MemberRandom | None = None,
        frozen: bool = False,
    ) -> Tensor:
        """From the input of layer ``first``, ``[M·E, rows, …]``, to ``[M·E, rows, out]``."""
        last = len(self.weights) - 1
        for layer in range(first, last + 1):
            weight = self._stacked(self.weights, layer, elements)
            bias = self._stacked(self.biases, layer, elements)
            if weight.shape[-1] <= NARROW:
                # A Function forms all gradients that are possible, torch's own those asked for.
                x = _NarrowHead.apply(x, weight.detach() if frozen else weight) + bias
            else:
                x = torch.baddbmm(bias, x, weight)
            if layer < last:
                x = self._activate(x, layer, elements)
                if dropout:
                    kept = random.uniform(elements, *x.shape[1:]).flatten(0, 1) >= dropout
                    x = x * kept / (1 - dropout)
        return x

    def forward(
        self,
        x: Tensor,
        elements: int | None = None,
        dropout: float = 0.0,
        random: MemberRandom | None = None,
        frozen: bool = False,
    ) -> Tensor:
        """``[M, B, in]`` (shared by the ensemble) or ``[M, E, B, in]`` to ``[M, E, B, out]``.

        Args:
            elements: only the first so many of the ensemble.
            dropout: probability that a hidden unit is zeroed (the others grow by 1/(1-p)), drawn
                from ``random``.
            frozen: only gradients of ``x`` will be asked for, not of the parameters.
        """
        e, rows, dtype = elements or self.ensemble, x.shape[-2], x.dtype
        x = _cast(x)
        x = self._shared(x, e) if x.dim() == 3 else x.reshape(self.members * e, rows, -1)
        x = self._layers(x, 0, e, dropout, random, frozen).to(dtype)
        return x.view(self.members, e, rows, -1)

    def many(self, x: Tensor, y: Tensor) -> Tensor:
        """Each row of ``x`` ``[M, B, I]`` with each of its K ``y`` ``[M, B, K, J]``, I + J = in.

        Equal to `forward` on ``x`` repeated K times beside ``y``, as ``[M, E, B, K, out]``, but the
        first layer's product with ``x`` is formed once per row. Needs a hidden layer.
        """
        e, (rows, k), split, dtype = self.ensemble, y.shape[1:3], x.shape[-1], x.dtype
        x, y = _cast(x), _cast(y)
        weight = self._stacked(self.weights, 0, e)
        bias = self._stacked(self.biases, 0, e)
        base = torch.baddbmm(bias, self._shared(x, e), weight[:, :split])
        if x.device.type == "cpu" and not self.scales:
            *hidden, weight_out, bias_out = [
                self._stacked(which, layer, e)
                for layer in range(1, len(self.weights))
                for which in (self.weights, self.biases)
            ]
            y = self._shared(y, e)
            out = ManyActions.apply(base, y, weight[:, split:], weight_out, *hidden) + bias_out
        else:
            hidden = _Spread.apply(base, self._shared(y.flatten(1, 2), e), weight[:, split:])
            out = self._layers(self._activate(hidden, 0, e), 1, e)
        return out.to(dtype).view(self.members, e, rows, k, -1)
