"""Members of a run taken apart and put together.

    saferl.split("runs/ten-seeds", "parts")          # parts/member-0 … parts/member-9
    saferl.merge(["parts/member-3", "more/member-0"], "both")

Every tensor of a checkpoint with at least one axis has the member axis first, but for shared tables
that the agent names in ``Agent.shared``; tensors without an axis are counters. So a member is one
slice of every tensor, and a merge is a concatenation: splitting and merging again gives the same
checkpoint to the bit. A folder appears under its name only when it is whole.
"""

from __future__ import annotations

import csv
import dataclasses
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saferl.errors import SaferlError
from saferl.io import Row, csv_lines, write_text
from saferl.registry import agent_class
from saferl.runs.config import Member, RunConfig
from saferl.runs.folder import RunFolder, check_record

TABLES = ("metrics.csv", "evaluation.csv")  # a row per step and member
# Of the record. The data may lie elsewhere now: their fingerprints are compared. Limits are for
# tables, and members that were trained for one each are judged by all. Engines compute the same.
NOT_COMPARED = ("settings", "members", "dataset", "dataset_options", "cost_limits", "engine")


def split(run: str | Path, out: str | Path, member: int | None = None) -> list[Path]:
    """Run folders of single members: the last checkpoint, its settings and its rows.

    Resumed, a member goes on as it would among the others, to rounding (products of M matrices at
    once may sum in another order than one's). TensorBoard events are not copied.

    Args:
        run: folder of a run with M members.
        out: receives ``member-0`` … ``member-{M-1}``, with leading zeros where there are more than
            ten; with ``member`` it becomes the run folder itself.
        member: only this one, counted from 0.

    Returns:
        The folders that were written.

    Raises:
        SaferlError: not a run, no such member, ``out`` is in use, or a tensor without member axis.
    """
    source, out = _Source.read(run), Path(out)
    count = len(source.config.who)
    if member is not None and not 0 <= member < count:
        raise SaferlError(f"no member {member}: {run} has {count}, counted from 0")
    chosen = range(count) if member is None else [member]
    width = len(str(count - 1))
    names = [f"member-{m:0{width}d}" if member is None else "." for m in chosen]
    with _appearing(out) as temporary:
        for m, name in zip(chosen, names):
            source.member(m).write(temporary / name)
    return [out / name for name in names]


def merge(runs: Sequence[str | Path], out: str | Path) -> Path:
    """One run folder of the members of several runs, in the order given.

    The runs must agree in agent, step, data and all settings but those that may differ between
    members (`Agent.per_member`); their seeds are free. Rows of metrics.csv and evaluation.csv are
    kept for steps that every run has.

    Raises:
        SaferlError: naming the first difference; two members that are the same; ``out`` in use.
    """
    if not runs:
        raise SaferlError("there is no run to merge: pass at least one run folder")
    out = Path(out)
    sources = [_Source.read(run) for run in runs]
    for other in sources[1:]:
        _compare(sources[0], other)
    merged = _concatenate(sources)
    with _appearing(out) as temporary:
        merged.write(temporary)
    return out


@dataclasses.dataclass
class _Source:
    """What a run folder holds, in memory."""

    path: Path
    config: RunConfig
    card: dict[str, Any]  # dataset.json
    state: dict[str, Tensor]
    header: dict[str, Any]
    tables: dict[str, tuple[list[str], list[Row]]]  # file → columns, rows

    @classmethod
    def read(cls, path: str | Path) -> _Source:
        folder = RunFolder(path)
        config = folder.config()
        state, header = folder.load()
        check_record(folder, config, header)
        source = cls(folder.path, config, folder.card(), state, header, {})
        for key, tensor in state.items():
            source._check(key, tensor)
        for name in TABLES:
            file = folder.path / name
            if file.is_file():
                source.tables[name] = _read_table(file, header["step"])
        return source

    @property
    def agent(self) -> Any:
        return agent_class(self.config.agent)

    def is_shared(self, key: str) -> bool:
        """Whether a tensor of the state is one that all members share."""
        prefixes = self.agent.shared
        return any(f"{key}.".startswith(f"agent.{prefix.rstrip('.')}.") for prefix in prefixes)

    def _check(self, key: str, tensor: Tensor) -> None:
        if tensor.dim() and not self.is_shared(key) and len(tensor) != len(self.config.who):
            raise SaferlError(
                f"{key} of {self.path} has shape {list(tensor.shape)} but the run has "
                f"{len(self.config.who)} members: give it a leading member axis, or name it in "
                f"{self.agent.__name__}.shared if all members share it"
            )

    def member(self, m: int) -> _Source:
        """The run of member ``m`` alone."""
        config = self.config.replace(members=(self.config.who[m],))
        state = {
            key: tensor[m : m + 1] if tensor.dim() and not self.is_shared(key) else tensor
            for key, tensor in self.state.items()
        }
        tables = {
            name: (columns, [row | {"member": "0"} for row in rows if int(row["member"]) == m])
            for name, (columns, rows) in self.tables.items()
        }
        return self.of(config, state, tables)

    def of(
        self,
        config: RunConfig,
        state: dict[str, Tensor],
        tables: dict[str, tuple[list[str], list[Row]]],
        **header: Any,
    ) -> _Source:
        """The same run of other members."""
        header = self.header | {"seeds": config.seeds, "config": config.agent_settings} | header
        return dataclasses.replace(self, config=config, header=header, state=state, tables=tables)

    def write(self, path: Path) -> None:
        folder = RunFolder.create(path, self.config, self.card)
        header = dict(self.header)
        folder.save(header.pop("step"), self.state, header)
        for name, (columns, rows) in self.tables.items():
            write_text(folder.path / name, csv_lines(columns, rows, header=True))

    def value(self, m: int, key: str) -> Any:
        """A setting of one member."""
        return self.config.who[m].values.get(key, self.config.settings.get(key))

    def comparable(self) -> dict[str, Any]:
        """What runs must agree in to be one run, in the order in which it is worth naming."""
        found = {"agent": self.config.agent, "step": self.header["step"]}
        found["dataset fingerprint"] = self.card.get("fingerprint")
        found |= {f"spec.{key}": value for key, value in self.header["spec"].items()}
        found |= {k: v for k, v in self.config.to_dict().items() if k not in NOT_COMPARED}
        for key, value in self.config.settings.items():
            if key not in self.agent.per_member:
                found[key] = value
        return found


def _compare(first: _Source, other: _Source) -> None:
    """Raises `SaferlError` with the first thing in which two runs differ."""
    ours, theirs = first.comparable(), other.comparable()
    for key in [*ours, *(key for key in theirs if key not in ours)]:
        a, b = ours.get(key), theirs.get(key)
        if a != b:
            raise _differ(first, other, key, _short(a), _short(b))
    for key in [*first.state, *(key for key in other.state if key not in first.state)]:
        a, b = first.state.get(key), other.state.get(key)
        if a is None or b is None:
            raise _differ(
                first, other, key, *("absent" if x is None else "present" for x in (a, b))
            )
        if a.dim() and not first.is_shared(key):
            if a.shape[1:] != b.shape[1:] or a.dtype != b.dtype:
                raise _differ(
                    first, other, key, *(f"{x.dtype} {list(x.shape[1:])}" for x in (a, b))
                )
        elif a.dtype != b.dtype or not torch.equal(a, b):
            values = (_short(x.tolist()) for x in (a, b)) if not a.dim() else ("one", "another")
            raise _differ(first, other, key, *values)


def _differ(first: _Source, other: _Source, key: str, a: str, b: str) -> SaferlError:
    return SaferlError(
        f"cannot merge {first.path} and {other.path}: {key} is {a} in the first and {b} in the "
        "second; merge runs that differ in seeds and per-member settings only"
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _concatenate(sources: Sequence[_Source]) -> _Source:
    first = sources[0]
    counts = [len(source.config.who) for source in sources]
    places = [(source, m) for source, count in zip(sources, counts) for m in range(count)]
    # Settings that were varied stay so; others become so where the runs differ in them.
    varied = list(dict.fromkeys(key for s, m in places for key in s.config.who[m].values))
    varied += [
        key
        for key in first.config.settings
        if key in first.agent.per_member
        and key not in varied
        and len({s.value(m, key) for s, m in places}) > 1
    ]
    members: list[Member] = []
    seen: dict[Any, Path] = {}
    for source, m in places:
        values = {key: source.value(m, key) for key in varied}
        member = Member(source.config.who[m].seed, values)
        key = member.seed, tuple(values.values())
        if key in seen:
            raise SaferlError(
                f"{seen[key]} and {source.path} both hold member {str(member)!r}: counted twice it "
                "would look like an independent seed; leave one out"
            )
        seen[key] = source.path
        members.append(member)
    state = {
        key: torch.cat([source.state[key] for source in sources])
        if tensor.dim() and not first.is_shared(key)
        else tensor
        for key, tensor in first.state.items()
    }
    limits = dict.fromkeys(limit for source in sources for limit in source.config.cost_limits)
    config = first.config.replace(
        members=tuple(members),
        settings={k: v for k, v in first.config.settings.items() if k not in varied},
        cost_limits=tuple(limits),
    )
    tables = {
        name: _merge_tables(name, sources, counts)
        for name in TABLES
        if all(name in source.tables for source in sources)
    }
    seconds = max(source.header["seconds"] for source in sources)
    return first.of(config, state, tables, seconds=seconds)


def _read_table(file: Path, step: int) -> tuple[list[str], list[Row]]:
    """Columns and rows up to a step; what a crash left beyond the checkpoint is not part of it."""
    text = file.read_text()
    whole = text[: text.rfind("\n") + 1]  # without a line that was cut off
    reader = csv.DictReader(whole.splitlines())
    return list(reader.fieldnames or ()), [row for row in reader if int(row["step"]) <= step]


def _merge_tables(
    name: str, sources: Sequence[_Source], counts: Sequence[int]
) -> tuple[list[str], list[Row]]:
    """Rows of all members, by step and member, of the steps that every run has."""
    columns: list[str] = []
    tables = [source.tables[name] for source in sources]
    steps = set.intersection(*({int(row["step"]) for row in rows} for _, rows in tables))
    episodes: dict[int, tuple[int, Path]] = {}
    merged, offset = [], 0
    for source, count, (heads, rows) in zip(sources, counts, tables):
        columns += [head for head in heads if head not in columns]
        kept = [row for row in rows if int(row["step"]) in steps]
        for step in sorted(steps):
            share = sum(int(row["step"]) == step for row in kept) // count
            before, where = episodes.setdefault(step, (share, source.path))
            if before != share:
                raise SaferlError(
                    f"{name} has {before} rows per member at step {step} in {where} but {share} in "
                    f"{source.path}: evaluate both with the same --episodes"
                )
        merged += [row | {"member": str(int(row["member"]) + offset)} for row in kept]
        offset += count
    merged.sort(key=lambda row: (int(row["step"]), int(row["member"])))  # stable: episodes stay
    return columns, [{column: row.get(column, "") for column in columns} for row in merged]


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A folder that becomes ``out`` when the block ends well, and vanishes otherwise."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise SaferlError(f"{out} exists already: choose another --out")
    out = Path(os.path.abspath(out))
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        os.replace(temporary, out)
    except OSError as error:
        raise SaferlError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
