"""Files written so that a crash or a full disk never leaves half of one; memory of the host."""

from __future__ import annotations

import csv
import errno
import io
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from saferl.errors import SaferlError


def atomic_write(path: Path, write: Callable[[Path], object], advice: str = "") -> None:
    """Call ``write(temporary)``, sync, rename to ``path``; nothing is left behind on failure.

    Args:
        advice: what the user can do if it fails, the end of the error's line.

    Raises:
        SaferlError: the disk is full or not writable; what was at ``path`` before is still there.
    """
    # The suffix stays last: some writers choose the format by it.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or error
        advice = advice or "choose a folder that can be written to and has room"
        raise SaferlError(f"cannot write {path}: {reason}; {advice}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str, advice: str = "") -> None:
    """`atomic_write` of a text file."""
    atomic_write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"), advice)


Row = dict[str, str]


def read_csv(path: Path) -> tuple[list[str], list[Row]]:
    """Columns and rows of a CSV file with a header, every cell as text."""
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
        return list(reader.fieldnames or ()), rows


def csv_lines(
    columns: Sequence[str], rows: Iterable[Mapping[str, object]], header: bool = False
) -> str:
    """Rows as the lines of a CSV file; a column that a row lacks is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def free_memory() -> int:
    """Bytes of the host's memory that can be allocated now."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 2**63 - 1  # not a Linux machine: let the allocation itself decide


def human(size: float) -> str:
    """1536 → '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


Value = TypeVar("Value")


def part(state: dict[str, Value], prefix: str) -> dict[str, Value]:
    """The entries of a state whose key begins with ``prefix``, without it."""
    return {key[len(prefix) :]: v for key, v in state.items() if key.startswith(prefix)}
