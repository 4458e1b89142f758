"""Atomic writes leave the old file or the whole new one."""

from __future__ import annotations

import errno

import pytest

from saferl.errors import SaferlError
from saferl.io import atomic_write, write_text


@pytest.mark.parametrize(
    ("number", "reason"), [(errno.ENOSPC, "the disk is full"), (errno.EACCES, "Permission denied")]
)
def test_a_failed_write_keeps_the_old_file(tmp_path, number, reason):
    file = tmp_path / "file.txt"
    write_text(file, "old")

    def fail(temporary):
        temporary.write_text("half")
        raise OSError(number, "Permission denied")

    with pytest.raises(SaferlError, match=f"cannot write .*: {reason}; try elsewhere"):
        atomic_write(file, fail, "try elsewhere")
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_an_interrupt_keeps_the_old_file(tmp_path):
    def stop(temporary):
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic_write(tmp_path / "file", stop)
    assert list(tmp_path.iterdir()) == []
