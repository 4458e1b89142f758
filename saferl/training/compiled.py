"""`Agent.learn` compiled: its operations are recorded once per update key and handed to Inductor.

A recorded update is a list of tensor operations, backward passes included, and as such free of what
stops a tracer of Python code: optimisers, generators, own gradients, several losses on one graph.
It is what a CUDA graph records as well, under the same contract: no reads to the host, and tensors
that outlive an update are changed in place.

What leaves torch is not in that list, and its result would stay what it was while recording. So an
update that reads a tensor on the host is refused, and so is one whose recording differs from that
of the next update, with other rows and other random numbers: in operations, in numbers of Python's,
in tensors made outside torch. What leaves torch on purpose is an operator of its own
(`saferl.nn.search.tree_search`). All these errors name the line.

Operations that change lists of tensors (Adam, Polyak averages) are one kernel already and run as
they are; the operations between two of them are compiled together. Before a program is used, it is
compared with eager in an update that it was not recorded from. Compiled parts that come out
otherwise than their recorded operations give way to them; recorded operations that come out
otherwise than the eager update are an error.
"""

from __future__ import annotations

import copy
import itertools
import operator
import os
import sys
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from saferl.errors import SaferlError
from saferl.replay import Batch
from saferl.rng import Request

TORCH = os.path.dirname(torch.__file__)
HOST_READS = {
    getattr(Tensor, name)
    for name in ("numpy", "cpu", "item", "tolist", "__array__", "__dlpack__", "__float__",
                 "__int__", "__bool__", "__index__", "__complex__")
}  # fmt: skip
"""Methods that read a tensor on the host, of which a recorder of operations may see nothing."""


class Compiled:
    """`Agent.learn` of one agent, compiled for each update key.

    Numbers are drawn before the update and handed in; which they are is noted in a first, eager
    update of each key. The second is recorded as it runs and compiled. The third runs twice:
    by the program, which is taken back, and eagerly, to compare. From the fourth on the program
    runs alone.
    """

    def __init__(self, agent: Any):
        self.agent = agent
        self._requests: dict[Hashable, list[Request]] = {}
        self._programs: dict[Hashable, Program] = {}
        self._recordings: dict[Hashable, Recording] = {}  # of programs that are not compared yet

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """One update.

        Raises:
            SaferlError: the update cannot be recorded, or the compiler failed.
        """
        agent = self.agent
        key = agent.key
        if key not in self._requests:
            with agent.random.noting() as requests:
                metrics = agent.learn(batch)
            self._requests[key] = requests
            return metrics
        drawn = agent.random.draw(self._requests[key])
        if key not in self._programs:
            recording, metrics = self._record(batch, drawn)
            self._programs[key] = Program(recording, metrics)
            self._recordings[key] = recording.slim()
            return metrics
        program = self._programs[key]
        if key not in self._recordings:
            return program([*batch.tensors(), *drawn])
        metrics = self._compare(program, self._recordings[key], batch, drawn)
        del self._recordings[key]
        return metrics

    def _record(self, batch: Batch, drawn: Sequence[Tensor]) -> tuple[Recording, dict[str, Tensor]]:
        """An eager update, and its operations."""
        recorder = _Recorder()
        with self.agent.random.handing_out(drawn), recorder, _Guard():
            metrics = self.agent.learn(batch)
        return Recording(recorder.calls, [*batch.tensors(), *drawn]), metrics

    def _compare(
        self, program: Program, first: Recording, batch: Batch, drawn: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """An eager update, if the program does the same from the same state.

        Raises:
            SaferlError: it does not, or it is another list of operations than ``first``.
        """
        # In the memory layout of what was recorded, so that eager sums in the same order.
        given = program.laid_out([*batch.tensors(), *drawn])
        fields = iter(given)
        batch = batch.map(lambda field: next(fields))
        before = [_copy(tensor) for tensor in program.state]
        gpu = [self.agent.device] if self.agent.device.type == "cuda" else []
        with torch.random.fork_rng(gpu), torch.no_grad():
            tried = [_copy(tensor) for tensor in given]  # an update may change them too
            found = {name: _copy(value) for name, value in program(tried, check=True).items()}
            after = [_copy(tensor) for tensor in program.state]
            for tensor, value in zip(program.state, before):
                tensor.copy_(value)
        second, metrics = self._record(batch, list(fields))
        first.compare(second)
        coarse = program.coarse or bool(gpu)
        zero = torch.zeros((), device=self.agent.device)
        pairs = [(found[name], value, zero) for name, value in metrics.items()]
        pairs += zip(after, program.state, before)
        if not all(_moved_alike(*pair, coarse) for pair in pairs):
            raise _unrecordable(
                "on other rows its recorded operations give something else than the update itself",
                "look for what it computes outside torch",
            )
        return metrics


class _Guard(TorchFunctionMode):
    """Refuses what leaves torch without an operation of torch."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in HOST_READS:
            raise _unrecordable(
                f"{_line()} reads a tensor on the host (.{function.__name__}())",
                "compute it with torch, or make it an operator with torch.library.custom_op",
            )
        return function(*args, **(kwargs or {}))


class _Recorder(TorchDispatchMode):
    """Keeps every operation, with the tensors it took and gave."""

    def __init__(self):
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if torch.Tag.data_dependent_output in function.tags:
            raise _unrecordable(
                f"{_line()} reads a tensor on the host (.item(), float(), a branch)",
                "compute it with torch",
            )
        if torch.Tag.dynamic_output_shape in function.tags and not _by_numbers(function, args):
            raise _unrecordable(
                f"{_line()} makes a tensor whose shape depends on values ({function})",
                "keep all rows and weight them by 0 and 1",
            )
        result = function(*args, **(kwargs or {}))
        call = Call(function, args, kwargs or {}, result)
        if call.given or function._schema.is_mutable:  # else it asked about a tensor, or timed
            self.calls.append(call)
        return result


def _by_numbers(function: Any, args: tuple) -> bool:
    """Whether it picks rows by their numbers, not by a mask."""
    masks = (torch.bool, torch.uint8)
    picks = function is torch.ops.aten.index.Tensor
    return picks and all(index.dtype not in masks for index in _tensors(args[1]))


def _unrecordable(what: str, remedy: str) -> SaferlError:
    return SaferlError(f"engine compile cannot record this update: {what}; use eager, or {remedy}")


def _line() -> str:
    """``file:line`` of the innermost caller that is neither torch nor this file."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        path = frame.f_code.co_filename
        if path != __file__ and not path.startswith((TORCH, "<")):
            break
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


class Call:
    """An operation that ran. Holding its tensors keeps their `id` theirs."""

    def __init__(self, function: Any, args: tuple, kwargs: dict, result: Any):
        self.function, self.args, self.kwargs, self.result = function, args, kwargs, result
        leaves = tree_leaves((args, kwargs))
        self.taken = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self.numbers = [leaf for leaf in leaves if isinstance(leaf, (int, float, complex))]
        self.given = _tensors(result)
        lists = any(isinstance(arg, (list, tuple)) and _tensors(arg) for arg in args)
        self.whole = lists and function._schema.is_mutable  # runs as it is
        self.line = _line()

    def written(self) -> Iterator[Tensor]:
        """The tensors that it changes."""
        for index, argument in enumerate(self.function._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                positional = index < len(self.args)
                yield from _tensors(
                    self.args[index] if positional else self.kwargs.get(argument.name)
                )


class Recording:
    """The operations of an update, and where the tensors come from that they take.

    Args:
        calls: the operations.
        given: tensors that differ from update to update, in the order of those of a later call.
    """

    def __init__(self, calls: Sequence[Call], given: Sequence[Tensor]):
        self.calls, self.given = calls, given
        # What it takes, neither made in it nor given, by the line that took it first: it outlives
        # the update, or it was made outside torch.
        self.kept: dict[int, tuple[Tensor, str]] = {}
        places = {id(tensor): place for place, tensor in enumerate(given)}
        self.steps: list[tuple[Any, list[int], list[Any], str]] = []
        for call in calls:
            for tensor in call.taken:
                if id(tensor) not in places:
                    self.kept[id(tensor)] = tensor.detach(), call.line
                    places[id(tensor)] = len(places)
            taken = [places[id(tensor)] for tensor in call.taken]
            self.steps.append((call.function, taken, call.numbers, call.line))
            for tensor in call.given:
                places.setdefault(id(tensor), len(places))

    def slim(self) -> Recording:
        """Without the tensors that the update made: what `compare` needs."""
        self.calls = self.given = ()
        return self

    def compare(self, other: Recording) -> None:
        """Check that an update on another batch is the same list of operations.

        Raises:
            SaferlError: it is not; the line that differs is named.
        """
        remedy = "tell such updates apart by Agent.update_key"
        for one, two in itertools.zip_longest(self.steps, other.steps):
            if one is None or two is None or one[:2] != two[:2]:
                line = (two or one)[3]
                raise _unrecordable(f"{line} does other operations on another batch", remedy)
            numbers, line = two[2:]
            if not all(a == b or (a != a and b != b) for a, b in zip(one[2], numbers)):
                raise _unrecordable(
                    f"{line} computes with a number of Python's that changes between updates",
                    f"keep it in a tensor that is changed in place, or {remedy}",
                )
        for (one, _), (two, line) in zip(self.kept.values(), other.kept.values(), strict=True):
            # What two updates take from the same memory is state. Anything else was made in the
            # update, but not by an operation of torch, so it may only be a constant.
            if not (_place(one) == _place(two) or _same(one, two)):
                raise _unrecordable(
                    f"{line} takes a tensor that no operation of torch made and that differs from "
                    "update to update",
                    "compute it with torch (no from_numpy, no torch.tensor of changing numbers), "
                    "and change what outlives an update in place",
                )


def _place(tensor: Tensor) -> tuple[Any, ...]:
    memory = tensor.untyped_storage().data_ptr(), tensor.storage_offset()
    return *memory, tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _same(one: Tensor, two: Tensor) -> bool:
    """Equal in type, shape and values, NaN being equal to NaN."""
    if (one.shape, one.dtype, one.device) != (two.shape, two.dtype, two.device):
        return False
    return bool(((one == two) | ((one != one) & (two != two))).all())


class Program:
    """A recording as compiled steps.

    Args:
        metrics: what the recorded update returned.
    """

    def __init__(self, recording: Recording, metrics: dict[str, Tensor]):
        calls = recording.calls
        self.given = {id(tensor): (tensor.shape, tensor.stride()) for tensor in recording.given}
        self.metrics = {name: id(tensor) for name, tensor in metrics.items()}
        self.kept = {key: tensor for key, (tensor, _) in recording.kept.items()}
        changed = {_place(tensor)[0] for call in calls for tensor in call.written()}
        self.state = [tensor for tensor in self.kept.values() if _place(tensor)[0] in changed]
        halves = {torch.bfloat16, torch.float16}
        # Compiled code rounds to 16 bits less often, and where two numbers are compared, some rows
        # come out on the other side.
        self.coarse = any(t.dtype in halves for call in calls for t in (*call.taken, *call.given))
        self.steps: list[Whole | Part] = []
        needed = set(self.metrics.values())
        for part in reversed(list(_parts(calls))):
            self.steps.insert(0, Whole(part[0]) if part[0].whole else Part(part, needed))
            needed |= {id(tensor) for call in part for tensor in call.taken}

    def laid_out(self, given: Sequence[Tensor]) -> list[Tensor]:
        """``given`` in the memory layout of what was recorded."""
        layouts = self.given.values()
        return [_laid_out(tensor, *layout) for tensor, layout in zip(given, layouts, strict=True)]

    @torch.no_grad()
    def __call__(self, given: Sequence[Tensor], check: bool = False) -> dict[str, Tensor]:
        """One update. ``check``: by the recorded operations, which replace parts that differ."""
        values = self.kept | dict(zip(self.given, self.laid_out(given), strict=True))
        for step in self.steps:
            step(values, check)
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


class Whole:
    """A call that runs as it is, for what it changes."""

    def __init__(self, call: Call):
        self.function = call.function
        self.taken = tree_map_only(Tensor, lambda t: _Slot(id(t)), (call.args, call.kwargs))

    def __call__(self, values: dict[int, Tensor], check: bool = False) -> None:
        args, kwargs = tree_map_only(_Slot, values.__getitem__, self.taken)
        self.function(*args, **kwargs)


class Part:
    """Calls as one function of what they take, which sets those of ``needed`` they make."""

    def __init__(self, calls: Sequence[Call], needed: set[int]):
        graph = fx.Graph()
        nodes: dict[Any, Any] = {}
        inputs: dict[Any, Any] = {}
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
        self.outputs = {
            key: (tensor.shape, tensor.stride())
            for key, tensor in results.items()
            if key in needed and key not in inputs
        }
        graph.output(tuple(nodes[key] for key in self.outputs))
        self.count, self.inputs = len(calls), list(inputs)
        self.recorded = fx.GraphModule(nn.Module(), graph)
        halves = {torch.bfloat16, torch.float16}
        self.coarse = any(t.dtype in halves for call in calls for t in (*call.taken, *call.given))
        self.function = inductor(self.recorded, list(inputs.values()))

    def __call__(self, values: dict[int, Tensor], check: bool = False) -> None:
        inputs = [values[key] for key in self.inputs]
        if check and not _agree(self.function, self.recorded, inputs, self.coarse):
            warnings.warn(
                f"engine compile: {self.count} operations come out otherwise when they are "
                "compiled, and run as recorded",
                RuntimeWarning,
                stacklevel=2,
            )
            self.function = self.recorded
        found = (self.recorded if check else self.function)(*inputs)
        for (key, layout), value in zip(self.outputs.items(), found, strict=True):
            values[key] = _laid_out(value, *layout)


@torch.no_grad()
def _agree(
    function: Callable[..., Sequence[Tensor]],
    recorded: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor],
    coarse: bool,
) -> bool:
    """Whether both give the same and leave copies of ``inputs`` alike, to rounding.

    The compiler is not always right: torch 2.13 gets the gradient through a layer norm wrong where
    a mean over critics is asked for beside it.

    ``coarse``: there are products in 16 bits.
    """
    found = []
    for either in (function, recorded):
        taken = [_copy(tensor) for tensor in inputs]
        found.append([*either(*taken), *taken])
    return all(_near(ours, wanted, coarse) for ours, wanted in zip(*found, strict=True))


def _copy(tensor: Tensor) -> Tensor:
    """With the same strides; one that is expanded itself, as nothing can change it in place."""
    if 0 in tensor.stride():
        return tensor
    layout = tensor.shape, tensor.stride()
    return torch.empty_strided(*layout, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _near(ours: Tensor, wanted: Tensor, coarse: bool) -> bool:
    if coarse:
        return _distance(ours, wanted) <= 0.25 * _size(wanted) + 1e-6 * wanted.numel() ** 0.5
    if wanted.is_floating_point() and wanted.numel():
        scale = float(wanted.abs().nan_to_num(0.0, 0.0).max())
        return torch.allclose(ours, wanted, 1e-3, 1e-4 * scale, equal_nan=True)
    return torch.equal(ours, wanted)


@torch.no_grad()
def _moved_alike(ours: Tensor, wanted: Tensor, before: Tensor, coarse: bool) -> bool:
    """Whether the same operations in the same layouts have changed ``before`` alike.

    On a CPU to the bit, but where a library's sums depend on where memory begins. On a GPU, where
    sums by atomic additions differ between two runs, a line search may take its next shorter step.
    """
    if not wanted.is_floating_point():
        return torch.equal(ours, wanted)
    change = _size(wanted.double() - before.double())
    return _distance(ours, wanted) <= (0.5 if coarse else 1e-2) * change + 1e-6 * _size(wanted)


def _distance(ours: Tensor, wanted: Tensor) -> float:
    ours, wanted = ours.double(), wanted.double()
    same = (ours == wanted) | (ours.isnan() & wanted.isnan())
    return float((ours - wanted)[~same].norm())  # NaN is near nothing


def _size(tensor: Tensor) -> float:
    return float(tensor[tensor.isfinite()].double().norm())


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
            # Of a copy, as the compiler changes what it is given.
            return torch._inductor.compile(copy.deepcopy(module), list[Any](inputs))
        except TorchDynamoException as error:
            line = str(error).strip().splitlines()[0][:200]
            raise SaferlError(
                f"engine compile failed ({line}): use eager, or delete {cache_dir()} if an earlier "
                "compilation was cut off"
            ) from error
