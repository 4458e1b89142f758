"""What a run will need in memory, measured on one and two members before it begins.

    estimate(cls, spec, config, members=16, rows=1_000_000).line(free)
    # memory: 1.2 GiB for 16 members (buffer 320.0 MiB + 58.0 MiB each) of 22.0 GiB free on cpu

An agent, a third party's included, is built with one member and then with two, and makes one real
update of every `Agent.update_key` on zeros of the true batch size. The bytes of the tensors that
live are counted at every operation; a line through both measurements gives any number of members.
It costs about as much time as a dozen updates of the run, and draws no global random numbers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from saferl.errors import SaferlError
from saferl.io import human
from saferl.replay import buffer_class, free_memory, row_floats
from saferl.spec import Spec

# Updates among which every `Agent.update_key` of a run is sought.
CANDIDATES = (*range(1, 101), *(10**k for k in range(3, 9)))
FIT_ROWS = 2048  # of the dataset, for an agent that learns something before its first update
SHORTAGE = ("can't allocate memory", "not enough memory", "out of memory")


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes at the peak of an update, for ``members`` members on ``device``."""

    members: int
    device: torch.device
    buffer: int  # rows that all members share; 0 where they are in a file
    fixed: int  # what else does not grow with the members: counters, shared tables, workspaces
    state: int  # per member between updates: parameters, targets, optimiser, gradients, own rows
    work: int  # per member on top of it, at the peak of an update
    settings: int = 1  # combinations of values, each trained on every seed

    @property
    def each(self) -> int:
        """Bytes that one more member takes."""
        return self.state + self.work

    @property
    def shared(self) -> int:
        """Bytes that do not depend on the number of members."""
        return self.buffer + self.fixed

    @property
    def total(self) -> int:
        return self.shared + self.members * self.each

    def fits(self, free: int) -> int:
        """How many members fit into ``free`` bytes."""
        return max(0, (free - self.shared) // self.each)

    def line(self, free: int) -> str:
        """The line to print before a run, ``free`` bytes being available."""
        parts = [f"buffer {human(self.buffer)}"] if self.buffer else []
        if self.fixed >= 2**20:
            parts.append(f"{human(self.fixed)} shared")
        parts.append(f"{human(self.each)} each")
        need = f"{human(self.total)} for {_count(self.members)} ({' + '.join(parts)})"
        return f"memory: {need} of {human(free)} free on {self.device}"

    def check(self, free: int) -> None:
        """Raises `SaferlError` where the run does not fit into ``free`` bytes."""
        if self.total <= free:
            return
        need = (
            f"{_count(self.members)} need{'s' if self.members == 1 else ''} {human(self.total)} "
            f"but {human(free)} is free on {self.device}"
        )
        fit = self.fits(free)
        if not fit and self.buffer + self.each > free and self.buffer >= self.each:
            raise SaferlError(
                f"{need}, and the replay buffer alone takes {human(self.buffer)}: train on fewer "
                "rows (Dataset.subset, --dataset-option size=N) or pass --memory-map FILE"
            )
        raise SaferlError(f"{need}: {self._advice(fit)}")

    @contextlib.contextmanager
    def guarding(self, place: Callable[[], tuple[int, Any]]) -> Iterator[None]:
        """Put `out_of_memory` of ``place()``, step and path, where an allocation fails within."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise self.out_of_memory(*place()) from error

    def out_of_memory(self, step: int, path: Any = None) -> SaferlError:
        """The error that replaces torch's when memory runs out at ``step`` of the run at ``path``.

        What the run held itself counts as available, and at least one member has to go: if the
        estimate says that all fit, others took the memory or it was fragmented.
        """
        if self.device.type == "cuda":
            held = torch.cuda.memory_reserved(self.device)
        else:
            held = self.shared + self.members * self.state
        fit = min(self.fits(free_memory(self.device) + held), self.members - 1)
        rest = ""
        if path is not None and fit:
            rest = (
                f"; or take members out of {path} with `saferl split`, and continue each by itself"
            )
        return SaferlError(
            f"out of memory on {self.device} at step {step} with {_count(self.members)} of "
            f"{human(self.each)}: {self._advice(fit)}{rest}"
        )

    def peak(self) -> str | None:
        """What the device's allocator counted at the peak since it was last reset (CUDA only)."""
        if self.device.type != "cuda":
            return None
        peak = torch.cuda.max_memory_allocated(self.device)
        return f"memory: {human(peak)} at the peak ({human(self.total)} were estimated)"

    def _advice(self, fit: int) -> str:
        seeds = fit // self.settings
        if seeds:
            each = f" with {self.settings} settings each" if self.settings > 1 else ""
            verb = "fits" if fit == 1 else "fit"
            return f"{_count(fit)} {verb} (--members {seeds}{each})"
        if fit:
            return f"{_count(fit)} fit: give fewer of the {self.settings} settings at once"
        return "not even one fits: lower batch_size or the sizes of hidden layers with --set"


def estimate(
    cls: Any,
    spec: Spec,
    config: Any,
    members: int | Sequence[int],
    rows: int,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    *,
    costs: bool = True,
    own_rows: int = 0,
    memory_map: bool = False,
    dataset: Any = None,
) -> Estimate:
    """Measure one and two members of an agent class and say what ``members`` of them need.

    Args:
        members: a count, or the seeds, one per member (repeated where settings differ).
        rows: capacity of the replay buffer that members share.
        own_rows: capacity of each member's own, `OnlineBuffer`.
        costs, memory_map: as `ReplayBuffer` will be made.
        dataset: for agents that override `Agent.fit`, which learns from its first 2048 rows here;
            tables as long as the dataset are then underestimated.

    Activations count as the eager engine holds them. A compiled update needs less, but while it is
    recorded and compiled, once, all that an update computes is held at the same time. On CUDA the
    allocator's own figures are used, which include cuBLAS's workspaces. Memory inside a CPU kernel
    and what the allocator leaves unused between its blocks are not seen.

    Raises:
        SaferlError: two members (or the only one) cannot be held by the device.
    """
    device = torch.device(device)
    seeds = tuple(range(members)) if isinstance(members, int) else tuple(members)
    count, settings = len(seeds), max(1, len(seeds) // len(set(seeds)))
    cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if cuda else 0
    found, unseen = [], 0
    with torch.random.fork_rng(devices=[device] if cuda else []):
        for m in (1, 2)[:count]:
            try:
                found.append(probe(cls, spec, config, m, device, precision, costs, dataset))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                raise SaferlError(
                    f"{_count(m)} of {cls.__name__} need{'s' if m == 1 else ''} more than the "
                    f"{human(free_memory(device))} free on {device}: lower batch_size or the sizes "
                    "of hidden layers with --set"
                ) from error
            if cuda and m == 1:  # workspaces are allocated once and stay
                unseen = torch.cuda.max_memory_allocated(device) - before - found[0].peak
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    one, last = found[0], found[-1]
    # A single member is one point: nothing tells what it shares from what is its own.
    state, each = last.kept, last.peak
    if count > 1:
        state, each = last.kept - one.kept, last.peak - one.peak
    extras = cls.batch_extras(config)
    size = 0 if memory_map else int(rows * row_floats(spec, costs, extras) * 4)
    own = int(own_rows * row_floats(spec, costs, extras, online=True) * 4)
    return Estimate(
        members=count,
        device=device,
        buffer=size,
        fixed=max(0, one.peak - each) + max(0, unseen),
        state=state + own,
        work=each - state,
        settings=settings,
    )


def announce(
    say: Callable[[str], None],
    cls: Any,
    spec: Spec,
    config: Any,
    members: int | Sequence[int],
    rows: int,
    device: torch.device | str,
    precision: str,
    **options: Any,
) -> Estimate:
    """`estimate`, said in one line; raises `SaferlError` where it is more than is free now."""
    need = estimate(cls, spec, config, members, rows, device, precision, **options)
    free = free_memory(need.device)
    say(need.line(free))
    need.check(free)
    return need


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the CPU, in numpy or on a GPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in SHORTAGE)


class Ledger(TorchDispatchMode):
    """Counts the bytes of all tensors that operations return while they live.

    ``bytes``: now; ``peak``: the most so far. Views and in-place results share a storage, which is
    counted once.
    """

    def __init__(self):
        super().__init__()
        self.bytes = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._references: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._references:
            self._references[key] = weakref.ref(storage, lambda _: self._forget(key))
        self.bytes += size - self._sizes.get(key, 0)  # out= may have grown it
        self._sizes[key] = size
        self.peak = max(self.peak, self.bytes)

    def _forget(self, key: int) -> None:
        del self._references[key]
        self.bytes -= self._sizes.pop(key)


class Probe(NamedTuple):
    """Bytes of a number of members, the replay buffer left out."""

    kept: int  # between updates
    peak: int  # at the peak of an update


def probe(
    cls: Any,
    spec: Spec,
    config: Any,
    members: int,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
    costs: bool = True,
    dataset: Any = None,
) -> Probe:
    """Build ``members`` members, update them, and count."""
    per_member = {  # the values are of the run's members, not of these
        field.name: (getattr(config, field.name)[0],) * members
        for field in dataclasses.fields(config)
        if isinstance(getattr(config, field.name), tuple) and not isinstance(field.default, tuple)
    }
    config = dataclasses.replace(config, **per_member)
    with Ledger() as ledger:
        agent = cls(spec, config, members, device, precision)
        if dataset is not None:
            agent.fit(dataset.subset(min(FIT_ROWS, len(dataset))), lambda line: None)
        extras = cls.batch_extras(config)
        buffer = buffer_class(spec)(spec, config.batch_size, range(members), device, costs, extras)
        buffer.size = buffer.capacity
        rows = buffer.nbytes
        updates = {agent.update_key(update): update for update in reversed(CANDIDATES)}.values()
        for _ in range(2):  # the first round makes the optimisers' state and the gradients
            for update in sorted(updates):
                agent.updates = update - 1
                agent.update(buffer.sample(agent.batch_rows))
        return Probe(ledger.bytes - rows, ledger.peak - rows)


def _count(members: int) -> str:
    return f"{members} member{'' if members == 1 else 's'}"
