"""``python -m benchmarks``: the studies; ``python -m benchmarks STUDY``: one of them."""

from __future__ import annotations

import os
import sys

from benchmarks.study import STUDIES, load
from benchmarks.workers import ONE_THREAD


def listing() -> str:
    """A line per study."""
    width = max(map(len, STUDIES))
    lines = [f"  {name:{width}}  {about}" for name, (_, about) in STUDIES.items()]
    return "\n".join(["usage: python -m benchmarks STUDY [options]", "", *lines])


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(listing())
        return 0
    name, *rest = arguments
    if name not in STUDIES:
        print(f"no study {name}: there are {', '.join(STUDIES)}", file=sys.stderr)
        return 2
    os.environ.update(ONE_THREAD)  # before torch is imported, here and in processes of --jobs
    return load(name).run(rest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
