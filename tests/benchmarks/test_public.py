"""The studies on D4RL, Minari and DSRL, run to the end on small files in the published layouts."""

from __future__ import annotations

import json
import warnings

import h5py
import numpy as np
import pytest

from benchmarks import runner
from benchmarks.studies import d4rl, dsrl, minari, public
from benchmarks.study import NOTHING
from saferl.data.sources import d4rl as source
from saferl.registry import agent_class
from saferl.runs.settings import published

ROWS = 300


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A study's command on the files of ``tmp_path / "data"``, at a scale of seconds."""
    monkeypatch.setenv("SAFERL_DATA_DIR", str(tmp_path / "none"))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "data"))
    (tmp_path / "data").mkdir()
    settings = public.Public.settings

    def small(self, dataset, method):
        agent = self.methods[method].agent
        return settings(self, dataset, method) | runner.narrowed(agent, 8) | {"batch_size": 8}

    monkeypatch.setattr(public.Public, "settings", small)

    def call(study, *words):
        return study.run([
            *words, "--updates", "4", "--seeds", "2", "--episodes", "2", "--device", "cpu",
            "--data", str(tmp_path / "data"), "--no-download", "--runs", str(tmp_path / "runs"),
            "--out", str(tmp_path),
        ])  # fmt: skip

    return call


def write(path, observations, actions, costs=False, terminals=None):
    """A flat HDF5 file of 50-step episodes, as D4RL's v2 and DSRL's are."""
    random = np.random.default_rng(0)
    states = random.normal(size=(ROWS + 1, observations)).astype(np.float32)
    values = {
        "observations": states[:-1],
        "next_observations": states[1:],
        "actions": random.uniform(-0.9, 0.9, (ROWS, actions)).astype(np.float32),
        "rewards": random.normal(size=ROWS).astype(np.float32),
        "terminals": np.zeros(ROWS, bool),
        "timeouts": np.arange(ROWS) % 50 == 49,
    }
    if costs:
        values["costs"] = (random.uniform(size=ROWS) < 0.1).astype(np.float32)
    with h5py.File(path, "w") as file:
        for name, value in values.items():
            file[name] = value


def test_d4rl_to_the_end(run, tmp_path, monkeypatch, capsys):
    write(tmp_path / "data" / "hopper_medium-v2.hdf5", 11, 3)
    write(tmp_path / "data" / "mini_kitchen_microwave_kettle_light_slider-v0.hdf5", 60, 9)
    words = ["--suite", "locomotion", "kitchen", "--datasets", "hopper-medium*", "kitchen-comp*",
             "--agents", "bc", "bc10", "iql"]  # fmt: skip
    assert run(d4rl.STUDY, *words) == 1
    content = json.loads((tmp_path / "d4rl.json").read_text())
    assert [(r["dataset"], r["method"]) for r in content["runs"]] == [
        ("d4rl/hopper-medium-v2", method) for method in ("bc", "bc10", "iql")
    ]
    bc10, iql = content["runs"][1:]
    assert np.shape(iql["returns"]) == (2, 2)
    assert published("iql", "d4rl/hopper-medium-v2").items() <= iql["settings"].items()
    assert bc10["config"]["best_fraction"] == 0.1
    text = (tmp_path / "d4rl.md").read_text()
    assert "53.5 ± 1.8" in text and "CORL: -5" in text and "], below" in text
    assert "1000000 updates, 4 seeds, the last policy of each in 10 episodes" in text
    assert "Here: 4 updates, 2 seeds, 2 episodes" in text
    assert "- IQL: configs/iql.yaml, d4rl/halfcheetah-*: authors, mujoco_config.py" in text
    assert "no environment is set" in text  # of Kitchen
    replay = "hopper_medium_replay-v2.hdf5 is not in the folder of --data"
    assert f"- d4rl/hopper-medium-replay-v2, bc, bc10, iql: {replay}\n" in text
    assert "2 episodes (**not the published protocol**)" in text
    assert "Not run: 9 of 12" in text
    assert not list((tmp_path / "runs").iterdir())  # folders of finished trainings are removed

    # What is there is not trained again.
    monkeypatch.setattr(public, "trained", None)
    capsys.readouterr()
    run(d4rl.STUDY, *words)
    assert capsys.readouterr().err.count("done before") == 3


def test_an_interrupted_training_goes_on(run, tmp_path, monkeypatch, capsys):
    write(tmp_path / "data" / "hopper_medium-v2.hdf5", 11, 3)
    words = ["--suite", "locomotion", "--datasets", "hopper-medium-v2", "--agents", "bc"]
    play = public.play

    def fails(*_):
        raise RuntimeError("no room")

    monkeypatch.setattr(public, "play", fails)
    assert run(d4rl.STUDY, *words) == 1
    assert "d4rl/hopper-medium-v2, bc: no room" in capsys.readouterr().out
    (folder,) = (tmp_path / "runs").iterdir()
    monkeypatch.setattr(public, "play", play)
    monkeypatch.setattr("saferl.train", None)  # it is resumed
    assert run(d4rl.STUDY, *words) == 0
    assert "Not run" not in capsys.readouterr().out and not folder.exists()


def test_without_files_it_says_what_was_not_run(run, tmp_path, capsys):
    words = ["--suite", "antmaze", "--datasets", "*umaze-v2", "--agents", "iql"]
    assert run(d4rl.STUDY, *words) == 1
    out = capsys.readouterr().out
    assert out.startswith(NOTHING) and "- d4rl/antmaze-umaze-v2, iql: antmaze" in out.replace(
        "Ant_maze", "antmaze"
    )
    assert not (tmp_path / "d4rl.md").exists()


def test_dsrl_to_the_end(run, tmp_path):
    name = dsrl.tasks()["HopperVelocity"]["file"]
    write(tmp_path / "data" / name, 11, 3, costs=True)
    write(tmp_path / "data" / dsrl.tasks()["easymean"]["file"], 261, 2, costs=True)
    words = ["--suite", "velocity", "metadrive", "--datasets", "HopperVelocity", "easymean",
             "--agents", "bc", "caps", "bcq_lag"]  # fmt: skip
    assert run(dsrl.STUDY, *words) == 1
    content = json.loads((tmp_path / "dsrl.json").read_text())
    bc, caps, lag = content["runs"]
    assert list(bc["played"]) == ["any"]
    assert list(caps["played"]) == list(lag["played"]) == ["20", "40", "80"]
    assert np.shape(lag["played"]["80"]["costs"]) == (2, 2)
    assert len(lag["names"]) == 6 and len(caps["names"]) == 2
    assert lag["settings"]["cost_limit"] == [20.0, 40.0, 80.0]
    text = (tmp_path / "dsrl.md").read_text()
    assert text.count("average |") == 3 and "CAPS supplement, reward / cost" in text
    assert "FISOR's table, reward" not in text  # its limit is another
    assert "- dsrl/easymean, bc, caps, bcq_lag: " in text and "MetaDrive" in text


def test_minari_to_the_end(run, tmp_path):
    library = pytest.importorskip("minari")
    from minari.data_collector import EpisodeBuffer

    random, episodes = np.random.default_rng(0), []
    for number in range(3):
        ends = np.arange(20) == 19
        episodes.append(EpisodeBuffer(
            id=number, seed=number, observations=list(random.normal(size=(21, 11))),
            actions=list(random.uniform(-1, 1, (20, 3)).astype(np.float32)),
            rewards=list(random.normal(size=20)), terminations=[False] * 20,
            truncations=list(ends), infos={},
        ))  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it asks for author, description …
        library.create_dataset_from_buffers("mujoco/hopper/medium-v0", episodes, env="Hopper-v5")
    words = ["--suite", "mujoco", "--datasets", "*hopper/medium*", "--agents", "bc"]
    assert run(minari.STUDY, *words) == 0
    text = (tmp_path / "minari.md").read_text()
    assert "do not compare" in text and "(return)" in text and "Published numbers" not in text
    (record,) = json.loads((tmp_path / "minari.json").read_text())["runs"]
    assert record["dataset"] == "minari/mujoco/hopper/medium-v0"


# Data, by hand -----------------------------------------------------------------------------------


def test_every_dataset_is_known_and_has_valid_settings():
    assert {id for suite in d4rl.SUITES.values() for id in suite.datasets} <= set(source.ids())
    assert sum(len(suite.datasets) for suite in dsrl.STUDY.suites.values()) == 38
    for id in (id for suite in minari.SUITES.values() for id in suite.datasets):
        assert minari.STUDY.like(id).removeprefix("d4rl/") in source.ids() or "umaze" in id, id
    for study in (d4rl.STUDY, dsrl.STUDY, minari.STUDY):
        for key in study.keys(study.parse(["--report"])):
            agent_class(key["agent"]).make_config(
                {k: v for k, v in key["settings"].items() if k != "cost_limit"}
            )
    antmaze = d4rl.STUDY.keys(d4rl.STUDY.parse(["--suite", "antmaze"]))
    assert {(k["updates"], k["members"], k["episodes"]) for k in antmaze} == {(1_000_000, 4, 100)}


def test_published_numbers_are_of_known_datasets_and_say_where_they_come_from():
    known = {id for suite in d4rl.SUITES.values() for id in suite.datasets}
    for column in d4rl.STUDY.references():
        assert len(column["source"]) > 20 and "recall" not in column["source"]
        assert set(column["scores"]) <= set(d4rl.METHODS)
        assert {id for scores in column["scores"].values() for id in scores} <= known
    for column in dsrl.STUDY.references():
        assert {name for scores in column["scores"].values() for name in scores} <= set(
            dsrl.tasks()
        )
    assert minari.STUDY.references() == []


def test_a_difference_from_a_published_mean_by_hand():
    column = {"seeds": 4, "sd": "sample"}
    ours = np.full((3, 2), 50.0)  # without spread: the interval is the published one's
    half = 3.182446 * 2.0 / 2  # Student's quantile for 3 degrees of freedom, sd / sqrt(4)
    said = public.against(ours, column, 40.0, 2.0)
    assert said == f"10.0 [{10 - half:.1f}, {10 + half:.1f}], above"
    column["sd"] = "population"  # sd / sqrt(3)
    wider = 3.182446 * 2.0 / 3**0.5
    assert public.against(ours, column, 48.0, 2.0) == (
        f"2.0 [{2 - wider:.1f}, {2 + wider:.1f}], cannot tell"
    )


def test_costs_are_normalised_by_the_limit():
    part = {"returns": [[0.0, 0.0]], "costs": [[10.0, 30.0]], "lengths": [[1, 1]]}
    entry = {"dataset": "dsrl/PointGoal1", "method": "caps", "limits": [20.0, 40.0, 80.0],
             "run": {"played": {"any": part}}}  # fmt: skip
    text = dsrl.STUDY.table([entry], {"dsrl/PointGoal1": {"reference_returns": [0.0, 10.0]}})
    rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines()[2:]]
    assert [row[3] for row in rows] == ["20", "40", "80", "average"]
    assert [row[5].split()[0] for row in rows] == ["1.00", "0.50", "0.25", "0.58"]
    assert "/" in rows[-1][-2]  # CAPS's own
    assert runner.EVALUATION_SEED == 10_000
