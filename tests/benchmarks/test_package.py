"""The package: its command, the store, what reports are made of, and the committed results."""

from __future__ import annotations

import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks import report, workers
from benchmarks.store import RESULTS, Store, command_of
from benchmarks.study import NOTHING, STUDIES, load

# A report that is made again may not change. (Timings of others are part of the numbers.)
COMMITTED = {
    "comparison": "comparison", "mixture_start": "mixture_start", "limits": "limits",
    "online": "online", "pixels": "pixels", "scores": "scores", "scores --shared": "scores_shared",
    "precision": "precision", "shield": "shield", "icu": "icu_sepsis", "ogsrl": "ogsrl",
    "guardians": "guardians", "guarded_cql": "guarded_cql", "speed": "speed",
    "published": "published", "a2pr_authors": "a2pr_authors",
}  # fmt: skip


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_has_a_command_line(name, capsys):
    study = load(name)
    assert study.name == name
    with pytest.raises(SystemExit) as ended:
        study.run(["--help"])
    assert ended.value.code == 0
    assert "--report" in capsys.readouterr().out


def test_the_command_lists_the_studies_and_knows_no_others(capsys):
    assert command.main([]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in STUDIES)
    assert command.main(["evidence"]) == 2
    assert "no study evidence: there are d4rl, " in capsys.readouterr().err


@pytest.mark.parametrize("line", COMMITTED)
def test_committed_results_give_the_committed_report(line, tmp_path, monkeypatch, capsys):
    stem, (name, *options) = COMMITTED[line], line.split()
    shutil.copy(RESULTS / f"{stem}.json", tmp_path)
    monkeypatch.setattr(report, "plot", lambda *_, **__: None)  # plots are looked at
    study = load(name)
    monkeypatch.setattr(study, "draw", lambda *_: None, raising=False)
    before = (tmp_path / f"{stem}.json").read_bytes()
    assert study.run([*options, "--report", "--out", str(tmp_path)]) == 0
    committed = (RESULTS / f"{stem}.md").read_text()
    assert (tmp_path / f"{stem}.md").read_text() == committed == capsys.readouterr().out
    assert (tmp_path / f"{stem}.json").read_bytes() == before


def test_every_committed_store_is_rendered():
    assert {file.stem for file in RESULTS.glob("*.json")} <= {*COMMITTED.values()}


def test_no_results_are_no_report(tmp_path, capsys):
    for name in ("guardians", "limits"):
        assert load(name).run(["--report", "--out", str(tmp_path)]) == 0
        assert capsys.readouterr().out == NOTHING
    assert not list(tmp_path.iterdir())


# The store ---------------------------------------------------------------------------------------


def test_other_data_are_another_training(tmp_path):
    store = Store(tmp_path / "x.json")
    key = {"dataset": "d", "agent": "bc", "settings": {"lr": 1}}
    store.add("d", {"fingerprint": "f"}, [key | {"fingerprint": "f"}])
    again = Store(store.path)
    assert again.entries([key])[0]["run"]["fingerprint"] == "f" and again.done(key) == ["f"]
    again.add("d", {"fingerprint": "g"}, [])  # the dataset was made again
    assert again.entries([key])[0]["run"] is None
    assert Store(store.path, fresh=True).content["runs"] == []


def test_a_report_shows_what_was_trained_with_other_settings_and_a_run_trains_again(tmp_path):
    store = Store(tmp_path / "x.json")
    key = {"dataset": "d", "agent": "bc", "settings": {"lr": 1}}
    store.add("d", {"fingerprint": "f"}, [key | {"fingerprint": "f"}])
    today = key | {"settings": {"lr": 2}}
    assert store.done(today) == [] and store.entries([today])[0]["run"] is None
    assert store.entries([today], report=True)[0]["run"]["settings"] == {"lr": 1}


def test_a_command_leaves_out_this_machines_paths():
    words = ["--peer-python", "/y", "--jobs", "1", "--out", "/x"]
    assert command_of("scores", words) == "python -m benchmarks scores --jobs 1"


# Reports -----------------------------------------------------------------------------------------


def test_difference_interval():
    random = np.random.default_rng(0)
    ours, peer = random.normal(10, 1, (3, 20)), random.normal(0, 1, (3, 20))
    difference, low, high = report.compare(ours, peer)
    assert difference == pytest.approx(ours.mean() - peer.mean())
    assert 5 < low < difference < high < 15
    back, back_low, back_high = report.compare(peer, ours)
    assert (back, back_low, back_high) == pytest.approx((-difference, -high, -low))
    # Narrower than the sum of the two intervals, wider than either.
    alone, other = (np.diff(report.interval(side))[0] for side in (ours, peer))
    assert alone < high - low < 2.2 * (alone + other)


def test_pooled_by_hand():
    # Distances 3 and 4 down, 6 and 8 up: their roots of sums of squares are 5 and 10, halved.
    assert report.pooled([(10.0, 7.0, 16.0), (20.0, 16.0, 28.0)]) == (15.0, 12.5, 20.0)


def test_verdicts():
    assert report.verdict(0.1, 3) == "above" and report.verdict(-3, -0.1) == "below"
    assert report.verdict(-1, 1) == "cannot tell"
    assert [report.limit_verdict(*ends, 10.0) for ends in ((1, 10), (11, 12), (9, 11))] == [
        "met", "not met", "cannot tell",
    ]  # fmt: skip


def test_a_plot_has_a_panel_per_title(tmp_path):
    one = report.Series("a", [1, 2], [3, 4], "black", y_ends=([2, 3], [5, 6]), thin=[[1, 2]])
    two = report.Series("b", [1, 2], [3, 4], "C0", "s-", band=([2, 3], [5, 6]), hollow=True)
    report.plot({"x": [one, two], "y": [two]}, tmp_path / "plot.png", x="steps")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"
    report.plot({}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


# Workers -----------------------------------------------------------------------------------------


def test_a_worker_answers_reports_errors_and_keeps_prints_apart(tmp_path, monkeypatch):
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").touch()
    (tmp_path / "benchmarks" / "adder.py").write_text(
        "import importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('workers', {workers.__file__!r})\n"
        "workers = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(workers)\n"
        "def add(a, b):\n"
        "    print('noise')\n"
        "    return a + b\n"
        "workers.serve({'add': add})\n"
    )
    monkeypatch.setattr(workers, "ROOT", tmp_path)
    with workers.Worker(sys.executable, "adder") as worker:
        assert worker("add", a=1, b=2) == 3
        with pytest.raises(RuntimeError, match="unsupported operand"):
            worker("add", a=1, b="x")
        assert worker("add", a=2, b=2) == 4  # an error does not end it


def test_a_failed_training_is_said_and_the_others_go_on(tmp_path, capsys):
    from benchmarks import runner

    class Toy:
        name = "limits"
        label = staticmethod(lambda key: key["agent"])
        told = staticmethod(lambda run: "fine")

    def work(name, key, options, done):
        if key["agent"] == "b":
            raise RuntimeError("q of member 0 is not finite")
        return {"fingerprint": "f"}, key | {"fingerprint": "f"}

    store = Store(tmp_path / "x.json")
    keys = [{"dataset": "d", "agent": agent} for agent in "abc"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "work", work)
        assert runner.train_all(Toy(), keys, store, SimpleNamespace(jobs=1)) == 1
    assert "b: FAILED, q of member 0 is not finite" in capsys.readouterr().err
    assert [run["agent"] for run in Store(store.path).content["runs"]] == ["a", "c"]


def test_withdrawn_measurements_are_marked_and_not_counted():
    from benchmarks.speed import tables

    content = json.loads((RESULTS / "speed.json").read_text())
    rows = [row for row in content["parts"]["matrix"]["rows"] if "ogsrl" in row["agent"]]
    cells = [cell for row in rows for cell in row["rows"] if "ms" in cell]
    assert len(rows) == 2 and cells
    for cell in cells:
        assert tables.counts(cell) == (cell["kind"] != "compile")
    text = (RESULTS / "speed.md").read_text()
    assert "mis-trained OGSRL; to be measured again: discrete_ogsrl compile fp32 1" in text
