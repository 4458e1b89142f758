"""Values of many actions per state on the CPU, block by block so that a block stays in the cache.

CQL values 3N + 1 actions at every state. Whole tensors of its hidden units take tens of megabytes:
every element-wise pass over them then waits for memory, and the C library hands them back to the
system after each use and has to fault them in again. Here a block of rows goes through all layers
before the next, forwards and backwards; the arithmetic is that of the plain layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 2**20
"""Bytes of a hidden layer's units in one block; half and double measured the same within 3 %."""


class ManyActions(torch.autograd.Function):
    """ReLU perceptron on ``base`` plus ``actions @ first``, for K networks one after the other.

    - base ``[K, B, H]``: the first layer's product with the states and its bias;
    - actions ``[K, B, n, J]``, first ``[K, J, H]``: the rest of the first layer's input and weight;
    - last ``[K, H, out]``: the last layer's weight (its bias is added outside);
    - hidden: weight ``[K, in, out]`` and bias ``[K, 1, out]`` of each layer between.

    Returns ``[K, B · n, out]``.
    """

    @staticmethod
    def forward(ctx, base: Tensor, actions: Tensor, first: Tensor, last: Tensor, *hidden: Tensor):
        ctx.save_for_backward(actions, first, last, *hidden)
        networks, states, n, _ = actions.shape
        ctx.width = max(base.shape[-1], *(bias.shape[-1] for bias in hidden[1::2]), 1)
        ctx.size = min(states, max(1, BLOCK // (base.element_size() * n * ctx.width)))
        ctx.units = []  # of each block and layer, after the ReLU
        out = base.new_empty(networks, states * n, last.shape[-1])
        for k in range(networks):
            for start in range(0, states, ctx.size):
                block = slice(start, start + ctx.size)
                x = base[k, block].repeat_interleave(n, 0)
                x.addmm_(actions[k, block].flatten(0, 1), first[k]).relu_()
                units = [x]
                for weight, bias in zip(hidden[::2], hidden[1::2]):
                    units.append(torch.addmm(bias[k], units[-1], weight[k]).relu_())
                torch.mm(units[-1], last[k], out=out[k, start * n : (start + ctx.size) * n])
                if any(ctx.needs_input_grad):
                    ctx.units.append(units)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        actions, first, last, *hidden = ctx.saved_tensors
        networks, states, n, _ = actions.shape
        weights = hidden[::2]
        dbase = first.new_empty(networks, states, first.shape[-1])
        dactions = torch.empty_like(actions) if ctx.needs_input_grad[1] else None
        # Sums over blocks, which bfloat16 would round away.
        wide = torch.promote_types(first.dtype, torch.float32)
        dfirst, dlast = torch.zeros_like(first, dtype=wide), torch.zeros_like(last, dtype=wide)
        dhidden = [torch.zeros_like(tensor, dtype=wide) for tensor in hidden]
        # Gradients at the units of one layer and of the next, in the same memory for all blocks.
        here, there = (first.new_empty(ctx.size * n * ctx.width) for _ in range(2))
        blocks = iter(ctx.units)
        for k in range(networks):
            for start in range(0, states, ctx.size):
                block = slice(start, start + ctx.size)
                units = next(blocks)
                top = grad[k, start * n : (start + ctx.size) * n]
                _add(dlast[k], units[-1].T, top)
                d = torch.mm(top, last[k].T, out=_shaped(here, units[-1]))
                for layer in range(len(weights) - 1, -1, -1):
                    _mask(d, units[layer + 1])
                    _add(dhidden[2 * layer][k], units[layer].T, d)
                    dhidden[2 * layer + 1][k] += d.sum(0, keepdim=True)
                    here, there = there, here
                    d = torch.mm(d, weights[layer][k].T, out=_shaped(here, units[layer]))
                _mask(d, units[0])
                torch.sum(d.unflatten(0, (-1, n)), 1, out=dbase[k, block])
                _add(dfirst[k], actions[k, block].flatten(0, 1).T, d)
                if dactions is not None:
                    dactions[k, block] = (d @ first[k].T).unflatten(0, (-1, n))
        narrow = [tensor.to(first.dtype) for tensor in (dfirst, dlast, *dhidden)]
        return dbase, dactions, *narrow


def _add(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in place."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _mask(grad: Tensor, units: Tensor) -> None:
    """The ReLU's gradient, in place."""
    torch.ops.aten.threshold_backward.grad_input(grad, units, 0, grad_input=grad)


def _shaped(memory: Tensor, like: Tensor) -> Tensor:
    """The beginning of flat ``memory`` in the shape of ``like``."""
    return memory[: like.numel()].view_as(like)
