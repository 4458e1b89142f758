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
import io
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saferl.errors import SaferlError
from saferl.io import write_text
from saferl.registry import agent_class
from saferl.runs.folder import RunFolder

TABLES = ("metrics.csv", "evaluation.csv")  # a row per step and member
# Of config.yaml. The data may lie elsewhere now: their fingerprints are compared. Limits are for
# tables, and members that were trained for one each are judged by all. Engines compute the same.
NOT_COMPARED = (
    "agent_config", "seeds", "members", "dataset", "dataset_options", "cost_limits", "engine",
)  # fmt: skip


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
    count = len(source.seeds)
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
    members (`Agent.variants`); their seeds are free. Rows of metrics.csv and evaluation.csv are
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
    plan: dict[str, Any]  # config.yaml
    card: dict[str, Any]  # dataset.json
    state: dict[str, Tensor]
    header: dict[str, Any]
    tables: dict[str, tuple[list[str], list[dict[str, str]]]]  # file → columns, rows

    @classmethod
    def read(cls, path: str | Path) -> _Source:
        folder = RunFolder(path)
        plan = folder.config()
        state, header = folder.load()
        for key, recorded in (("agent", "agent"), ("config", "agent_config"), ("seeds", "seeds")):
            if header[key] != plan[recorded]:
                raise SaferlError(
                    f"the checkpoints of {path} were written with another {recorded} than its "
                    "config.yaml has now: restore the file"
                )
        source = cls(folder.path, plan, folder.card(), state, header, {})
        for key, tensor in state.items():
            source._check(key, tensor)
        for name in TABLES:
            file = folder.path / name
            if file.is_file():
                source.tables[name] = _read_table(file, header["step"])
        return source

    @property
    def seeds(self) -> list[int]:
        return self.plan["seeds"]

    @property
    def agent(self) -> type:
        return agent_class(self.plan["agent"])

    def varying(self) -> list[str]:
        """Settings that hold one value per member."""
        defaults = {field.name: field.default for field in dataclasses.fields(self.agent.Config)}
        return [
            key
            for key, value in self.plan["agent_config"].items()
            if isinstance(value, list) and not isinstance(defaults.get(key), tuple)
        ]

    def is_shared(self, key: str) -> bool:
        """Whether a tensor of the state is one that all members share."""
        prefixes = self.agent.shared
        return any(f"{key}.".startswith(f"agent.{prefix.rstrip('.')}.") for prefix in prefixes)

    def _check(self, key: str, tensor: Tensor) -> None:
        if tensor.dim() and not self.is_shared(key) and len(tensor) != len(self.seeds):
            raise SaferlError(
                f"{key} of {self.path} has shape {list(tensor.shape)} but the run has "
                f"{len(self.seeds)} members: give it a leading member axis, or name it in "
                f"{self.agent.__name__}.shared if all members share it"
            )

    def member(self, m: int) -> _Source:
        """The run of member ``m`` alone."""
        settings = dict(self.plan["agent_config"])
        for key in self.varying():
            settings[key] = settings[key][m]
        seeds, names = [self.seeds[m]], [self.plan["members"][m]]
        state = {
            key: tensor[m : m + 1] if tensor.dim() and not self.is_shared(key) else tensor
            for key, tensor in self.state.items()
        }
        tables = {
            name: (columns, [row | {"member": "0"} for row in rows if int(row["member"]) == m])
            for name, (columns, rows) in self.tables.items()
        }
        return dataclasses.replace(
            self,
            plan=self.plan | {"seeds": seeds, "members": names, "agent_config": settings},
            header=self.header | {"seeds": seeds, "config": settings},
            state=state,
            tables=tables,
        )

    def write(self, path: Path) -> None:
        folder = RunFolder.create(path, self.plan, self.card)
        header = dict(self.header)
        folder.save(header.pop("step"), self.state, header)
        for name, (columns, rows) in self.tables.items():
            text = io.StringIO()
            writer = csv.DictWriter(text, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            write_text(folder.path / name, text.getvalue())

    def comparable(self) -> dict[str, Any]:
        """What runs must agree in to be one run, in the order in which it is worth naming."""
        found = {"agent": self.plan["agent"], "step": self.header["step"]}
        found["dataset fingerprint"] = self.card.get("fingerprint")
        found |= {f"spec.{key}": value for key, value in self.header["spec"].items()}
        found |= {k: v for k, v in self.plan.items() if k not in NOT_COMPARED}
        variants = self.agent.variants
        for key, value in self.plan["agent_config"].items():
            if key not in variants:
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
    counts = [len(source.seeds) for source in sources]
    seeds = [seed for source in sources for seed in source.seeds]
    settings = dict(first.plan["agent_config"])
    varying = [key for key in settings if key in first.agent.variants]
    for key in varying:
        values: list[Any] = []
        for source, count in zip(sources, counts):
            value = source.plan["agent_config"][key]
            values += value if isinstance(value, list) else [value] * count
        settings[key] = values if len(set(values)) > 1 else values[0]
    varying = [key for key in varying if isinstance(settings[key], list)]

    names, origin, seen = [], [], {}
    for source, count in zip(sources, counts):
        origin += [source.path] * count
        names += source.plan["members"]
    for m, seed in enumerate(seeds):
        values = tuple(settings[key][m] for key in varying)
        # A run whose members had one value did not name it.
        absent = [
            f"{key}={value:g}"
            for key, value in zip(varying, values)
            if not any(word.startswith(f"{key}=") for word in names[m].split())
        ]
        names[m] = " ".join([*absent, names[m]])
        if (seed, values) in seen:
            raise SaferlError(
                f"{seen[seed, values]} and {origin[m]} both hold member {names[m]!r}: counted "
                "twice it would look like an independent seed; leave one out"
            )
        seen[seed, values] = origin[m]
    state = {
        key: torch.cat([source.state[key] for source in sources])
        if tensor.dim() and not first.is_shared(key)
        else tensor
        for key, tensor in first.state.items()
    }
    limits = dict.fromkeys(limit for source in sources for limit in source.plan["cost_limits"])
    seconds = max(source.header["seconds"] for source in sources)
    return dataclasses.replace(
        first,
        plan=first.plan
        | {"seeds": seeds, "members": names, "cost_limits": list(limits), "agent_config": settings},
        header=first.header | {"seeds": seeds, "config": settings, "seconds": seconds},
        state=state,
        tables={
            name: _merge_tables(name, sources, counts)
            for name in TABLES
            if all(name in source.tables for source in sources)
        },
    )


def _read_table(file: Path, step: int) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows up to a step; what a crash left beyond the checkpoint is not part of it."""
    lines = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
    reader = csv.DictReader(lines)
    rows = [row for row in reader if int(row["step"]) <= step]
    return list(reader.fieldnames or ()), rows


def _merge_tables(
    name: str, sources: Sequence[_Source], counts: Sequence[int]
) -> tuple[list[str], list[dict[str, str]]]:
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
