"""Studies on ICU-Sepsis, at a size that takes seconds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("icu_sepsis", reason="needs icu-sepsis", exc_type=ImportError)
from benchmarks.icu import ogsrl as benchmark
from saferl.agents.ogsrl import DiscreteOGSRL


@pytest.fixture
def run(monkeypatch):
    """The command with a checkpoint every 2 iterations; returns what it wrote."""
    monkeypatch.setattr(benchmark, "EVERY", 2)
    monkeypatch.setitem(benchmark.SETTINGS, "hidden", [8])
    clinician = {"survival": 0.78, "cost": 0.74, "ood_rate": 0.12}
    monkeypatch.setattr(
        benchmark, "references", lambda: {"clinician": clinician, "frontier": [[0.6, 0.87]]}
    )

    def call(out: Path, *extra: str) -> dict:
        arguments = ["--members", "2", "--episodes", "60", "--played", "16", "--clone", "5",
                     "--doses", "without", "--methods", "BC", "MB-TRPO", "GMB-CPO"]  # fmt: skip
        arguments += ["--iterations", "5", "--out", str(out), *extra]
        assert benchmark.STUDY.run(arguments) == 0
        return json.loads((out / "ogsrl.json").read_text())

    return call


def timeless(result: dict) -> dict:
    return {
        name: {key: value for key, value in cell.items() if key != "seconds"}
        for name, cell in result["cells"].items()
    }


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(run, tmp_path, monkeypatch):
    whole = run(tmp_path / "whole")
    cell = whole["cells"]["GMB-CPO, without doses"]
    assert [point["iteration"] for point in cell["curve"]] == [0, 2, 4, 5]
    assert len(cell["members"]) == 2 and 0 < cell["members"][0]["survival"] < 1
    out, update, calls = tmp_path / "cut", DiscreteOGSRL.update, []

    def interrupted(self, batch):
        calls.append(0)
        if len(calls) == 5 + 4:  # the fourth update of the second cell that has any
            raise KeyboardInterrupt
        return update(self, batch)

    monkeypatch.setattr(DiscreteOGSRL, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(out)
    part = out / "ogsrl.GMB-CPO-0.part.pt"
    assert part.exists()
    assert set(json.loads((out / "ogsrl.json").read_text())["cells"]) == {
        "BC, without doses",
        "MB-TRPO, without doses",
    }
    monkeypatch.setattr(DiscreteOGSRL, "fit", None)  # what was fitted is in the checkpoint
    calls.append(0)
    again = run(out)
    assert len(calls) == 5 + 4 + 1 + 3  # iterations 3, 4 and 5
    assert timeless(again) == timeless(whole)
    assert not part.exists()
    text = (out / "ogsrl.md").read_text()
    assert "GMB-CPO" in text and "of 2" in text and (out / "ogsrl.png").stat().st_size > 1000

    with pytest.raises(SystemExit, match="has other options"):
        run(out, "--played", "8")
