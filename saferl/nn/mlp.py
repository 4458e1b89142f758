"""Multi-layer perceptrons for M members and E ensemble elements at once.

A layer's weight is ``[M, E, in, out]`` and runs as one batched matrix product over M·E, so an
ensemble of two critics for sixteen members is a single call. M = E = 1 is the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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


class _ScalarHead(torch.autograd.Function):
    """x [K,B,H] @ w [K,H,1]: batched products with one column are several times slower than these."""

    @staticmethod
    def forward(ctx, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return torch.bmm(w.mT, x.mT).mT

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, w = ctx.saved_tensors
        dx = grad * w.mT if ctx.needs_input_grad[0] else None
        dw = torch.bmm(grad.mT, x).mT if ctx.needs_input_grad[1] else None
        return dx, dw


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
        for layer, (fan_in, fan_out) in enumerate(zip(sizes[:-1], sizes[1:])):
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

    def forward(self, x: Tensor) -> Tensor:
        """``[M, B, in]`` (shared by the ensemble) or ``[M, E, B, in]`` to ``[M, E, B, out]``."""
        m, e = self.members, self.ensemble
        if x.dim() == 3:
            x = x.unsqueeze(1).expand(m, e, *x.shape[1:])
        rows = x.shape[2]
        x = x.reshape(m * e, rows, -1)
        last = len(self.weights) - 1
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases)):
            weight, bias = weight.flatten(0, 1), bias.flatten(0, 1)
            if weight.shape[-1] == 1:
                x = _ScalarHead.apply(x, weight) + bias
            else:
                x = torch.baddbmm(bias, x, weight)
            if layer < last:
                if self.scales:
                    scale, offset = self.scales[layer], self.offsets[layer]
                    x = F.layer_norm(x, x.shape[-1:])
                    x = torch.addcmul(offset.flatten(0, 1), x, scale.flatten(0, 1))
                x = x.relu_()
        return x.view(m, e, rows, -1)
