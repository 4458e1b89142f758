"""What the golden tests of agents share: plain networks of one member, and comparisons.

A reference is written from the equations with ``torch.nn.functional`` and ordinary autograd, for
one member and one critic at a time, in float64. It shares no code with the agents but the random
stream.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saferl.registry import agent_class
from saferl.replay import Batch
from saferl.spec import Spec

MEMBERS = (5, 6)  # seeds
OBS, A, B = 3, 2, 7  # observation and action components, rows


@pytest.fixture
def float64():
    """Rounding far below the tolerance, so that a small systematic error shows."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def make(name: str, members=MEMBERS, **settings):
    """A small agent; ``settings`` are its configuration."""
    cls = agent_class(name)
    bounds = () if cls.discrete else (1.0,) * A
    spec = Spec(OBS, 4 if cls.discrete else A, cls.discrete, tuple(-b for b in bounds), bounds)
    return cls(spec, cls.make_config({"hidden": [8, 8]} | settings), members)


def make_batch(agent, seed: int = 0, rows: int = B, costs: bool = False) -> Batch:
    """Random transitions, a third of them terminal."""
    random = torch.Generator().manual_seed(seed)
    shape = (agent.members, rows)

    def normal(*tail: int) -> Tensor:
        return torch.randn(*shape, *tail, generator=random)

    return Batch(
        observations=normal(OBS),
        actions=(
            torch.randint(agent.spec.action_dim, shape, generator=random)
            if agent.discrete
            else normal(A).tanh()
        ),
        rewards=normal(),
        costs=normal().abs() if costs else None,
        next_observations=normal(OBS),
        terminals=(torch.rand(shape, generator=random) < 1 / 3).to(torch.get_default_dtype()),
    )


def member_of(batch: Batch, m: int) -> Batch:
    """One member's rows, without the member axis."""
    return batch.map(lambda field: field[m])


class Net:
    """A copy of one perceptron out of an `MLP`, as a chain of ordinary linear layers."""

    def __init__(self, mlp: nn.Module, member: int, element: int = 0):
        self.layers = [
            (
                w[member, element].detach().T.clone().requires_grad_(),
                b[member, element, 0].detach().clone().requires_grad_(),
            )
            for w, b in zip(mlp.weights, mlp.biases)
        ]
        self.norms = [  # scale and offset of each hidden layer's LayerNorm, where there is one
            tuple(x[member, element, 0].detach().clone().requires_grad_() for x in pair)
            for pair in zip(mlp.scales, mlp.offsets)
        ]

    def __call__(self, *inputs: Tensor) -> Tensor:
        x = torch.cat(inputs, -1)
        for i, (weight, bias) in enumerate(self.layers[:-1]):
            x = F.linear(x, weight, bias)
            if self.norms:
                x = F.layer_norm(x, x.shape[-1:], *self.norms[i])
            x = F.relu(x)
        return F.linear(x, *self.layers[-1])

    def parameters(self) -> list[Tensor]:
        return [tensor for pair in (*self.layers, *self.norms) for tensor in pair]

    def copy(self) -> Net:
        twin = Net.__new__(Net)
        twin.layers = [(w.detach().clone(), b.detach().clone()) for w, b in self.layers]
        twin.norms = [(w.detach().clone(), b.detach().clone()) for w, b in self.norms]
        return twin

    @torch.no_grad()
    def follow(self, source: Net, rate: float) -> None:
        """Polyak average, written out."""
        for own, new in zip(self.parameters(), source.parameters()):
            own.copy_(rate * new.detach() + (1 - rate) * own)

    def assert_is(self, mlp: nn.Module, member: int, element: int = 0) -> None:
        for (w, b), weight, bias in zip(self.layers, mlp.weights, mlp.biases):
            torch.testing.assert_close(weight[member, element].T, w, rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(bias[member, element, 0], b, rtol=1e-9, atol=1e-11)
        for (w, b), scale, offset in zip(self.norms, mlp.scales, mlp.offsets, strict=True):
            torch.testing.assert_close(scale[member, element, 0], w, rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(offset[member, element, 0], b, rtol=1e-9, atol=1e-11)


def nets(ensemble: nn.Module, member: int) -> list[Net]:
    """One `Net` per ensemble element."""
    return [Net(ensemble.mlp, member, e) for e in range(ensemble.mlp.ensemble)]


def adam(*networks: Net | Tensor, lr: float) -> torch.optim.Adam:
    tensors = []
    for network in networks:
        tensors += network.parameters() if isinstance(network, Net) else [network]
    return torch.optim.Adam(tensors, lr=lr, foreach=False)


def descend(optimizer: torch.optim.Adam, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward(inputs=optimizer.param_groups[0]["params"])
    optimizer.step()


def gradients(agent) -> dict[str, list[Tensor]]:
    """The last update's gradients of each network and free parameter."""
    found = {}
    for name, value in vars(agent).items():
        if isinstance(value, nn.Parameter):
            found[name] = [value.grad]
        elif isinstance(value, nn.Module):
            found[name] = [p.grad for p in value.parameters()]
    return {name: grads for name, grads in found.items() if any(g is not None for g in grads)}


def affected(name: str, before: dict, after: dict, updates: int = 1, **common) -> set[str]:
    """Networks whose gradient in the last of ``updates`` differs between two configurations."""
    results = []
    for settings in (before, after):
        agent = make(name, **common, **settings)
        for i in range(updates):
            agent.update(make_batch(agent, seed=i))
        results.append(gradients(agent))
    one, two = results
    assert one.keys() == two.keys()
    return {key for key in one if any(not torch.equal(a, b) for a, b in zip(one[key], two[key]))}


def moved(agent, batch: Batch) -> set[str]:
    """Networks and free parameters that one update changes."""

    def parts() -> dict[str, list[Tensor]]:
        return {
            name: [p.detach().clone() for p in tensors]
            for name, value in vars(agent).items()
            if isinstance(value, (nn.Module, nn.Parameter))
            for tensors in [[value] if isinstance(value, nn.Parameter) else value.parameters()]
        }

    before = parts()
    agent.update(batch)
    after = parts()
    return {k for k in before if any(not torch.equal(a, b) for a, b in zip(before[k], after[k]))}
