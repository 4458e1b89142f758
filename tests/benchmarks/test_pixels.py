"""The study from pixels with episodes of ten steps."""

from __future__ import annotations

import dataclasses
import functools
import json

import numpy as np
import pytest

pytest.importorskip("dm_control")
from benchmarks.studies import pixels


@pytest.mark.slow
def test_run_resume_and_report(tmp_path, monkeypatch, capsys):
    task = dataclasses.replace(
        pixels.TASKS["walker"], repeat=100, filmed=2, episodes=1, random_steps=99,
        expert={"hidden": [8], "random_steps": 5}, until={"least": 0, "every": 10, "most": 20},
    )  # fmt: skip
    monkeypatch.setitem(pixels.TASKS, "walker", task)
    monkeypatch.setattr(pixels, "frame_rate", functools.partial(pixels.frame_rate, count=6))
    monkeypatch.setattr(pixels, "EVALUATIONS", 2)
    monkeypatch.setenv("SAFERL_DATA_DIR", str(tmp_path / "data"))
    words = ["--tasks", "walker", "--steps", "16", "--episodes", "2", "--out", str(tmp_path)]
    arms = ["--arms", "SAC, online only", "SAC 50/50"]
    assert pixels.STUDY.run([*words, *arms, "--seeds", "2"]) == 0
    content = json.loads((tmp_path / "pixels.json").read_text())
    assert [(run["arm"], run["seed"]) for run in content["runs"]] == [
        (arm, seed) for seed in (0, 1) for arm in arms[1:]
    ]
    assert content["datasets"]["walker-filmed"]["transitions"] == 20
    first = content["runs"][0]
    assert first["curve"]["steps"] == [8, 16] and np.shape(first["returns"]) == (2,)
    assert first["settings"]["discount"] == 0.99 and first["settings"]["reward_scale"] == 0.01
    text = (tmp_path / "pixels.md").read_text()
    assert "data generated here" in text and "| SAC 50/50        |     2 |" in text
    assert (tmp_path / "pixels.png").read_bytes()[:4] == b"\x89PNG"

    # What is there is not trained again, and a report names what is missing.
    monkeypatch.setattr(pixels, "play", None)
    capsys.readouterr()
    assert pixels.STUDY.run([*words, *arms, "--seeds", "2"]) == 0
    assert capsys.readouterr().err.count("done before") == 4
    assert pixels.STUDY.run([*words, "--seeds", "1", "--report"]) == 0
    assert "Not trained: walker, MOORL, K 2, η 0.5: seed 0" in capsys.readouterr().out
