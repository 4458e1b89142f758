"""The one exception that a user's mistake raises.

Its message is a single line that says what is wrong and what to do. The command line prints it
without a traceback and exits with status 2; in Python it is an ordinary ``ValueError``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SaferlError(ValueError):
    """A mistake that the caller can mend, told in one line."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """``"did you mean 'x'? "`` for the valid name that is most alike, whatever the case; or ""."""
    spellings = {text.lower(): text for text in valid}
    close = difflib.get_close_matches(name.lower(), spellings, n=1, cutoff=0.6)
    return f"did you mean {spellings[close[0]]!r}? " if close else ""


def unknown(kind: str, name: str, valid: Iterable[str], hint: str = "") -> SaferlError:
    """An error for an unknown name that offers the nearest valid one.

    >>> str(unknown("agent", "cqll", ["bc", "cql"]))
    "unknown agent 'cqll': did you mean 'cql'? Valid: bc, cql"
    """
    valid = sorted(valid)
    listing = "Valid: " + ", ".join(valid[:30]) + (", …" if len(valid) > 30 else "")
    return SaferlError(f"unknown {kind} {name!r}: {nearest(name, valid)}{hint or listing}".rstrip())


def one_line(error: BaseException) -> str:
    """Kind and first line of an error of another library."""
    return f"{type(error).__name__}: {error}".split("\n")[0].rstrip(": ")
