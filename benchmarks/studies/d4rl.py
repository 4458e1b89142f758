"""Offline agents on D4RL by the published protocol, beside published scores.

    python -m benchmarks d4rl --suite locomotion --agents iql td3_bc
    python -m benchmarks d4rl --suite antmaze --data FOLDER --no-download

Updates, seeds and episodes are CORL's; the last policy of each seed is the result. Settings are
those of ``configs/``, which say where they come from.
"""

from __future__ import annotations

from benchmarks.studies.public import Method, Public, Suite

ROBOTS = ("halfcheetah", "hopper", "walker2d")
KINDS = ("medium", "medium-replay", "medium-expert")
MORE = ("random", "expert", "full-replay")
HANDS = ("pen", "door", "hammer", "relocate")
CORL = "CORL's configurations"
SUITES = {
    "locomotion": Suite(
        tuple(f"{robot}-{kind}-v2" for robot in ROBOTS for kind in KINDS), 1_000_000, 4, 10, CORL
    ),
    "locomotion-more": Suite(
        tuple(f"{robot}-{kind}-v2" for robot in ROBOTS for kind in MORE), 1_000_000, 4, 10,
        "as CORL does on the others",
    ),
    "antmaze": Suite(
        tuple(f"antmaze-{maze}-v2" for maze in (
            "umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play",
            "large-diverse",
        )), 1_000_000, 4, 100, CORL,
    ),
    "adroit": Suite(
        tuple(f"{hand}-{kind}-v1" for hand in HANDS for kind in ("human", "cloned", "expert")),
        1_000_000, 4, 10, CORL,
    ),
    "kitchen": Suite(
        tuple(f"kitchen-{kind}-v0" for kind in ("complete", "partial", "mixed")),
        1_000_000, 4, 100, "ours: CORL does not configure Kitchen",
    ),
    "maze2d": Suite(
        tuple(f"maze2d-{maze}-v1" for maze in ("umaze", "medium", "large")), 1_000_000, 4, 100,
        CORL,
    ),
}  # fmt: skip
METHODS = {
    "bc": Method("BC", "bc"),
    "bc10": Method("10 % BC", "bc", {"best_fraction": 0.1}),
    "td3_bc": Method("TD3+BC", "td3_bc"),
    "iql": Method("IQL", "iql"),
    "cql": Method("CQL", "cql"),
    "rebrac": Method("ReBRAC", "rebrac"),
    "a2pr": Method("A2PR", "a2pr"),
}


class D4RL(Public):
    name, suites, methods = "d4rl", SUITES, METHODS
    heading = "D4RL"
    about = (
        "Scores are D4RL's, 100 for its expert reference: mean over seeds and episodes of the last "
        "policies, with a 95 % interval over both. Published: mean ± standard deviation over "
        "seeds. *difference*: ours minus the published mean, with a 95 % interval from both; "
        "*above* or *below* if it excludes 0. Versions of gymnasium's environments differ from "
        "those that the published numbers were measured in."
    )

    def file_of(self, dataset: str) -> str:
        from saferl.data.sources import d4rl

        return d4rl.card(dataset).origin.rsplit("/", 1)[-1]


STUDY = D4RL()
