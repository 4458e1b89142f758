"""`Agent.learn` compiled: its operations are recorded once per pattern and handed to Inductor.

A recorded update is a list of tensor operations, backward passes included, and as such free of what
stops a tracer of Python code: optimisers, generators, own gradients, several losses on one graph.
It is what a CUDA graph records as well, under the same contract: no reads to the host, and tensors
that outlive an update are changed in place.

Operations that change lists of tensors (Adam, Polyak averages) are one kernel already and run as
they are; the operations between two of them are compiled together. What comes out is run once
beside the recorded operations, which take its place where the two differ.
"""

from __future__ import annotations

import copy
import operator
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from saferl.errors import SaferlError
from saferl.replay import Batch
from saferl.rng import Request


class Compiled:
    """`Agent.learn` of one agent, compiled for each pattern of its updates.

    Numbers are drawn before the update and handed in; which they are is noted in a first, eager
    update of each pattern. The second is recorded as it runs.
    """

    def __init__(self, agent: Any):
        self.agent = agent
        self._requests: dict[Hashable, list[Request]] = {}
        self._programs: dict[Hashable, Program] = {}

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        agent = self.agent
        pattern = agent.now
        if pattern not in self._requests:
            with agent.random.noting() as requests:
                metrics = agent.learn(batch)
            self._requests[pattern] = requests
            return metrics
        drawn = agent.random.draw(self._requests[pattern])
        given = [*batch.tensors(), *drawn]
        if pattern not in self._programs:
            with agent.random.handing_out(drawn), _Recorder() as recorder:
                metrics = agent.learn(batch)
            self._programs[pattern] = Program(recorder.calls, given, metrics)
            return metrics
        return self._programs[pattern](given)


class _Recorder(TorchDispatchMode):
    """Keeps every operation, with the tensors it took and gave."""

    def __init__(self):
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            raise SaferlError(
                "an update reads a tensor on the host (.item(), float(), a branch): engine compile "
                "cannot record it, use eager"
            )
        result = function(*args, **(kwargs or {}))
        call = Call(function, args, kwargs or {}, result)
        if call.given or function._schema.is_mutable:  # else it asked about a tensor, or timed
            self.calls.append(call)
        return result


class Call:
    """An operation that ran. Holding its tensors keeps their `id` theirs."""

    def __init__(self, function: Any, args: tuple, kwargs: dict, result: Any):
        self.function, self.args, self.kwargs, self.result = function, args, kwargs, result
        self.taken, self.given = _tensors((args, kwargs)), _tensors(result)
        lists = any(isinstance(arg, (list, tuple)) and _tensors(arg) for arg in args)
        self.whole = lists and function._schema.is_mutable  # runs as it is


class Program:
    """Recorded calls as compiled steps.

    Args:
        calls: of one update.
        given: tensors that differ from update to update, in the order of those of a later call.
        metrics: what the update returned.
    """

    def __init__(self, calls: Sequence[Call], given: Sequence[Tensor], metrics: dict[str, Tensor]):
        self.given = {id(tensor): (tensor.shape, tensor.stride()) for tensor in given}
        self.metrics = {name: id(tensor) for name, tensor in metrics.items()}
        # What an update takes, neither made in it nor given, outlives it.
        self.kept: dict[int, Tensor] = {}
        known = set(self.given)
        for call in calls:
            for tensor in call.taken:
                if id(tensor) not in known:
                    self.kept[id(tensor)] = tensor.detach()
                    known.add(id(tensor))
            known |= set(map(id, call.given))
        self.steps: list[Callable[[dict[int, Tensor]], None]] = []
        needed = set(self.metrics.values())
        for part in reversed(list(_parts(calls))):
            self.steps.insert(0, _eager(part[0]) if part[0].whole else _compiled(part, needed))
            needed |= {id(tensor) for call in part for tensor in call.taken}

    @torch.no_grad()
    def __call__(self, given: Sequence[Tensor]) -> dict[str, Tensor]:
        values = dict(self.kept)
        for (key, layout), tensor in zip(self.given.items(), given, strict=True):
            values[key] = _laid_out(tensor, *layout)
        for step in self.steps:
            step(values)
        return {name: values[key] for name, key in self.metrics.items()}


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _parts(calls: Sequence[Call]) -> Iterator[list[Call]]:
    """Each call that runs as it is, and the calls between two of them."""
    part: list[Call] = []
    for call in calls:
        if call.whole:
            if part:
                yield part
            yield [call]
            part = []
        else:
            part.append(call)
    if part:
        yield part


class _Slot(int):
    """Where a tensor's value is found."""


def _eager(call: Call) -> Callable[[dict[int, Tensor]], None]:
    taken = tree_map_only(Tensor, lambda tensor: _Slot(id(tensor)), (call.args, call.kwargs))

    function = call.function

    def step(values: dict[int, Tensor]) -> None:
        args, kwargs = tree_map_only(_Slot, values.__getitem__, taken)
        function(*args, **kwargs)

    return step


def _compiled(calls: Sequence[Call], needed: set[int]) -> Callable[[dict[int, Tensor]], None]:
    """The calls as one function of what they take, which sets those of ``needed`` they make."""
    graph, nodes, inputs = fx.Graph(), {}, {}
    made: set[int] = set()
    for call in calls:
        inputs |= {id(t): t.detach() for t in call.taken if id(t) not in made | inputs.keys()}
        made |= {id(tensor) for tensor in call.given}
    for index, key in enumerate(inputs):
        nodes[key] = graph.placeholder(f"input{index}")
    for call in calls:
        args, kwargs = tree_map_only(Tensor, lambda t: nodes[id(t)], (call.args, call.kwargs))
        node = graph.call_function(call.function, args, kwargs)
        if isinstance(call.result, Tensor):
            nodes[id(call.result)] = node
        else:
            for index, tensor in enumerate(call.result or ()):
                if isinstance(tensor, Tensor):
                    nodes[id(tensor)] = graph.call_function(operator.getitem, (node, index))
    results = {id(tensor): tensor for call in calls for tensor in call.given}
    outputs = {
        key: (tensor.shape, tensor.stride())
        for key, tensor in results.items()
        if key in needed and key not in inputs
    }
    graph.output(tuple(nodes[key] for key in outputs))
    keys, tensors = list(inputs), list(inputs.values())
    recorded = fx.GraphModule(nn.Module(), graph)
    function = inductor(copy.deepcopy(recorded), tensors)
    halves = {torch.bfloat16, torch.float16}
    coarse = any(t.dtype in halves for call in calls for t in (*call.taken, *call.given))
    if not _agree(function, recorded, tensors, coarse):
        warnings.warn(
            f"engine compile: {len(calls)} operations come out otherwise when they are compiled, "
            "and run as recorded",
            RuntimeWarning,
            stacklevel=2,
        )
        function = recorded

    def step(values: dict[int, Tensor]) -> None:
        found = function(*[values[key] for key in keys])
        for (key, layout), value in zip(outputs.items(), found, strict=True):
            values[key] = _laid_out(value, *layout)

    return step


@torch.no_grad()
def _agree(
    function: Callable[..., Sequence[Tensor]],
    recorded: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor],
    coarse: bool,
) -> bool:
    """Whether both give the same and leave ``inputs`` alike, to rounding.

    The compiler is not always right: torch 2.13 gets the gradient through a layer norm wrong where
    a mean over critics is asked for beside it.

    ``coarse``: there are products in bf16. Compiled code rounds to it less often, and where two
    numbers are compared, some rows come out on the other side.
    """
    found = []
    for either in (function, recorded):
        taken = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device).copy_(t)
                 for t in inputs]  # fmt: skip
        found.append([*either(*taken), *taken])
    return all(_near(ours, wanted, coarse) for ours, wanted in zip(*found, strict=True))


def _near(ours: Tensor, wanted: Tensor, coarse: bool) -> bool:
    if coarse:
        ours, wanted = ours.double(), wanted.double()
        same = (ours == wanted) | (ours.isnan() & wanted.isnan())
        off, size = (ours - wanted)[~same].norm(), wanted[wanted.isfinite()].norm()
        return bool(off <= 0.25 * size + 1e-6 * wanted.numel() ** 0.5)
    if wanted.is_floating_point() and wanted.numel():
        scale = float(wanted.abs().max())
        return torch.allclose(ours, wanted, 1e-3, 1e-4 * scale, equal_nan=True)
    return torch.equal(ours, wanted)


def _laid_out(value: Tensor, shape: Sequence[int], stride: Sequence[int]) -> Tensor:
    """``value`` as what takes it was compiled for; of a part of a tensor may come a packed one.

    Outputs come so, and batches of rows from one source or from two.
    """
    if value.stride() == stride:
        return value
    return value.new_empty_strided(shape, stride).copy_(value)


@torch.no_grad()
def inductor(module: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Sequence[Tensor]]:
    """``module`` compiled for tensors of these shapes.

    Raises:
        SaferlError: the compiler failed.
    """
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.codecache import cache_dir

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of the compiler's own imports
        try:
            return torch._inductor.compile(module, inputs)
        except TorchDynamoException as error:
            line = str(error).strip().splitlines()[0][:200]
            raise SaferlError(
                f"engine compile failed ({line}): use eager, or delete {cache_dir()} if an earlier "
                "compilation was cut off"
            ) from error
