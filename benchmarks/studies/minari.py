"""Offline agents on Minari's datasets, with the settings of the D4RL data that they resemble.

    python -m benchmarks minari --suite mujoco --agents iql
    python -m benchmarks minari --data FOLDER --no-download    # as MINARI_DATASETS_PATH

Minari's data are other than D4RL's of the same name (new environments, new policies), so scores
published for D4RL do not hold for them, and none with a source is known to us for these ids.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from benchmarks.studies import d4rl
from benchmarks.studies.public import Public, Suite

LIKE = {"simple": "medium-replay"}  # levels of Minari that D4RL calls otherwise
AS_D4RL = "as CORL does on D4RL's data of the same kind"
MAZES = ("umaze", "medium", "large")
SUITES = {
    "mujoco": Suite(
        tuple(f"mujoco/{robot}/{level}-v0" for robot in d4rl.ROBOTS
              for level in ("simple", "medium", "expert")),
        1_000_000, 4, 10, AS_D4RL,
    ),
    "pointmaze": Suite(
        tuple(f"D4RL/pointmaze/{maze}-v2" for maze in MAZES), 1_000_000, 4, 100, AS_D4RL
    ),
    "antmaze": Suite(
        tuple(f"D4RL/antmaze/{maze}-v1" for maze in (
            "umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play",
            "large-diverse",
        )), 1_000_000, 4, 100, AS_D4RL,
    ),
    "adroit": Suite(
        tuple(f"D4RL/{hand}/{kind}-v2" for hand in d4rl.HANDS
              for kind in ("human", "cloned", "expert")),
        1_000_000, 4, 10, AS_D4RL,
    ),
    "kitchen": Suite(
        tuple(f"D4RL/kitchen/{kind}-v2" for kind in ("complete", "partial", "mixed")),
        1_000_000, 4, 100, "ours",
    ),
}  # fmt: skip


class Minari(Public):
    name, suites, methods = "minari", SUITES, d4rl.METHODS
    packages = ("mujoco", "gymnasium", "minari")
    heading = "Minari"
    about = (
        "Scores are 100 for the reference that a dataset names, returns where it names none: mean "
        "over seeds and episodes of the last policies, with a 95 % interval over both. **The data "
        "are not D4RL's: scores published for D4RL do not compare.** Settings are those of the "
        "D4RL data of the same kind."
    )

    def like(self, dataset: str) -> str:
        """``D4RL/door/human-v2`` → ``d4rl/door-human-v1``."""
        _, task, level = dataset.split("/")
        level = level.rsplit("-", 1)[0]
        task = "maze2d" if task == "pointmaze" else task
        return f"d4rl/{task}-{LIKE.get(level, level)}-{VERSIONS.get(task, 'v2')}"

    def local(self, dataset: str, folder: Path) -> dict[str, Any]:
        os.environ["MINARI_DATASETS_PATH"] = str(folder.resolve())
        return {}


VERSIONS = {"maze2d": "v1", "kitchen": "v0"} | dict.fromkeys(d4rl.HANDS, "v1")
STUDY = Minari()
