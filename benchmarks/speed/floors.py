"""The arithmetic's floor: multiply-adds of an update, and the rate of a plain matrix product.

An update is a list of passes of B rows through E networks side by side, with layers (in_l, out_l):

    forward                        E · B · Σ_l in_l · out_l
    gradient of weights            the same
    gradient of hidden units       the same without the first layer
    gradient of n input components E · B · n · out_1

The floor is the time that these would take at the rate of one large product in the same precision,
measured in the same process and round. Element-wise work (activations, Adam, Polyak averages,
random numbers) is not in it, so a ratio of 1 cannot be reached.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

PRODUCT = {"cpu": 1024, "cuda": 4096}  # side of the square product; larger ones are no faster


@dataclass(frozen=True)
class Pass:
    """B rows through E networks, and what goes back."""

    sizes: tuple[int, ...]  # (in, hidden…, out)
    rows: int  # B
    networks: int = 1  # E
    weights: bool = False  # whether the gradient of the weights is wanted
    inputs: int = 0  # components of the input whose gradient is wanted
    every: int = 1  # updates between two such passes

    def forward(self) -> int:
        return self.networks * self.rows * sum(i * o for i, o in pairwise(self.sizes))

    def hidden(self) -> int:
        """Multiply-adds of the gradients of the hidden units."""
        return self.networks * self.rows * sum(i * o for i, o in pairwise(self.sizes[1:]))

    def total(self) -> int:
        """Multiply-adds of one such pass."""
        total = self.forward() * (2 if self.weights else 1)
        if self.weights or self.inputs:
            total += self.hidden() + self.networks * self.rows * self.inputs * self.sizes[1]
        return total


def passes(agent: str, observation_dim: int, action_dim: int, config: Any) -> list[Pass]:
    """The passes of one update.

    Args:
        action_dim: components of the action, or the number of actions.
        config: the agent's; switches that the tables in docs/benchmarks/speed.md do not name are
            at their defaults.

    Raises:
        KeyError: no list for this agent; `counted` asks torch.
    """
    o, a, rows, hidden = observation_dim, action_dim, config.batch_size, tuple(config.hidden)
    critic_hidden = tuple(getattr(config, "critic_hidden", ()) or hidden)  # none: as the actor's
    actor, critic, value = (o, *hidden, a), (o + a, *critic_hidden, 1), (o, *hidden, 1)
    gaussian = (o, *hidden, 2 * a)  # mean and log σ
    target = Pass(critic, rows, 2)  # 2 Q̄(s', a')
    through = Pass(critic, rows, 2, inputs=a)  # 2 Q(s, π(s)) and back to the action

    def trained(sizes: Sequence[int], networks: int = 1, every: int = 1, inputs: int = 0) -> Pass:
        return Pass(tuple(sizes), rows, networks, True, inputs, every)

    def bc() -> list[Pass]:
        return [trained(actor)]

    def td3_bc() -> list[Pass]:
        k = config.policy_interval
        improve = [trained(actor, every=k), Pass(critic, rows, inputs=a, every=k)]
        return [Pass(actor, rows), target, trained(critic, 2), *improve]

    def iql() -> list[Pass]:
        return [Pass(value, rows), trained(value), target, trained(critic, 2), trained(actor)]

    def sac() -> list[Pass]:
        return [Pass(gaussian, rows), target, trained(critic, 2), trained(gaussian), through]

    def cql() -> list[Pass]:
        many = rows * (3 * config.samples + 1)  # the penalty's actions and the logged one, at s
        # The first layer's product with s is needed once per state, that with a for every action.
        first = [trained((o, critic[1]), 2), Pass((a, critic[1]), many, 2, True)]
        rest = Pass(critic[1:], many, 2, True, inputs=critic[1])
        return [Pass(gaussian, rows), trained(gaussian), target, through, *first, rest]

    def a2pr() -> list[Pass]:
        k, z = config.policy_interval, 2 * a
        v = (o, *config.value_hidden, 1)
        encoder = (o + a, *config.vae_hidden, 2 * z)
        decoder = (o + z, *config.vae_hidden, a)
        every = [
            Pass(actor, rows),  # π̄(s')
            target,
            trained(critic, 2),
            Pass(critic, rows, 2),  # 2 Q(s', a') after their step
            Pass(critic, rows),  # Q₁(s, a) after its step
            trained(v),
            trained(encoder),
            trained(decoder, inputs=z),
        ]
        improve = [
            trained(actor, every=k),
            Pass(critic, rows, inputs=a, every=k),  # Q₁(s, π(s))
            Pass(encoder, rows, inputs=a, every=k),
            Pass(decoder, rows, inputs=z, every=k),
            Pass(critic, rows, every=k),  # Q₁(s, ã)
        ]
        return every + improve

    def discrete_cql() -> list[Pass]:
        e, q = config.critics, (o, *hidden, a * max(1, config.quantiles))
        return [Pass(q, rows, e), Pass(q, rows, e), trained(q, e)]

    known: dict[str, Callable[[], list[Pass]]] = {
        "bc": bc, "discrete_bc": bc, "td3_bc": td3_bc, "iql": iql, "sac": sac, "cql": cql,
        "a2pr": a2pr, "discrete_cql": discrete_cql,
    }  # fmt: skip
    return known[agent]()


def multiply_adds(agent: str, observation_dim: int, action_dim: int, config: Any) -> float:
    """Of one update and member, a mean where updates alternate; `KeyError` as in `passes`."""
    return sum(p.total() / p.every for p in passes(agent, observation_dim, action_dim, config))


def counted(update: Callable[[], Any], updates: int = 2) -> float:
    """Multiply-adds per call of ``update`` that torch's counter sees, over ``updates`` calls."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode, addmm_flop

    def in_place(bias, a, b, out_shape=None, **_):  # which the counter does not know by itself
        return addmm_flop(bias, a, b)

    also = {torch.ops.aten.addmm_: in_place}
    with FlopCounterMode(display=False, custom_mapping=also) as counter:
        for _ in range(updates):
            update()
    return counter.get_total_flops() / 2 / updates


class Product:
    """One square product in a precision, to be timed again and again.

    Raises:
        RuntimeError: the device cannot form it.
    """

    def __init__(self, precision: str, device: str):
        import torch

        self.device = torch.device(device)
        self.size = PRODUCT[self.device.type]
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        a, b = torch.randn(2, self.size, self.size, device=device).to(dtype).unbind(0)
        self.a, self.b, self.out = a, b, torch.empty_like(a)
        self.seconds_of(3)  # what the first products set up

    def seconds_of(self, repetitions: int = 5, now: Callable[[], float] | None = None) -> float:
        """Seconds of one, the median."""
        import time

        import torch

        now, times = now or time.perf_counter, []
        for _ in range(repetitions):
            start = now()
            torch.mm(self.a, self.b, out=self.out)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            times.append(now() - start)
        return statistics.median(times)

    def rate(self, now: Callable[[], float] | None = None) -> float:
        """Multiply-adds per second."""
        return self.size**3 / self.seconds_of(now=now)
