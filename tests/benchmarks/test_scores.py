"""The study `scores`: its schedule and its table; d3rlpy itself is not here."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch

from benchmarks import workers
from benchmarks.store import Store
from benchmarks.studies import scores
from saferl.registry import agent_class


def test_settings_are_fields_of_our_configs():
    for agent in workers.SETTINGS:
        config = agent_class(agent).make_config(workers.settings_of(agent, (8, 8)))
        assert config.hidden == (8, 8)
    assert agent_class("cql").make_config(workers.settings_of("cql", (8,))).critic_hidden == (8,)


def test_verdicts():
    assert scores.verdict(-3.0, -1.0, scores.WORDS) == "below beyond the interval"
    assert scores.verdict(-1.0, 1.0, scores.WORDS) == "not below"
    assert scores.verdict(1.0, 3.0, scores.WORDS) == "above beyond the interval"


def test_our_members_train_together_and_the_peers_seeds_apart(tmp_path):
    options = scores.STUDY.parse(
        ["--report", "--agents", "bc", "cql", "--seeds", "2", "--datasets", "d", "--hidden", "8"]
    )
    keys = scores.STUDY.keys(options)
    assert [(k["agent"], k["implementation"], k.get("seed")) for k in keys] == [
        ("bc", "saferl", None), ("bc", "d3rlpy", 0), ("bc", "d3rlpy", 1),
        ("cql", "saferl", None), ("cql", "d3rlpy", 0), ("cql", "d3rlpy", 1),
    ]  # fmt: skip
    assert keys[0]["members"] == 2
    store = Store(tmp_path / "scores.json")
    facts = {"fingerprint": "f", "reference_returns": [0.0, 10.0]}
    random = np.random.default_rng(0)
    for key, mean in zip(keys[:3], (5.0, 2.0, 2.0)):
        rows = random.normal(mean, 0.1, (key.get("members", 1), 4)).tolist()
        run = key | {"fingerprint": "f", "returns": rows, "costs": None, "seconds": 1.0}
        store.add("d", facts, [run])
    (row,) = scores.summaries(store.entries(keys), store.datasets)
    assert (row["agent"], row["seeds"], row["episodes"]) == ("bc", 2, 4)
    assert row["saferl"]["score"] == pytest.approx(50, abs=2)
    assert row["verdict"] == "above beyond the interval"
    assert not scores.summaries(store.entries(keys[:2]) + store.entries(keys[3:]), {})


def test_both_sides_train_and_play_the_same_episodes(tmp_path, monkeypatch, capsys):
    """With a stand-in for d3rlpy's process, which gets the data and writes a policy."""
    seen = []

    class Peer:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def __call__(self, do, **arguments):
            if do == "versions":
                return {"d3rlpy": "0"}
            with np.load(arguments["data"]) as file:
                seen.append((arguments["seed"], file["observations"].shape))
            layer = torch.nn.Sequential(torch.nn.Linear(11, 3), torch.nn.Tanh())
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                torch.jit.script(layer).save(arguments["policy"])
            return {"seconds": 1.0}

    monkeypatch.setattr(scores, "peer", lambda options: Peer())
    name = "saferl/hopper-velocity-medium-v0"
    words = ["--datasets", name, "--agents", "iql", "--steps", "4", "--seeds", "2", "--episodes",
             "2", "--size", "600", "--hidden", "8", "--batch-size", "8", "--peer-python", "x",
             "--out", str(tmp_path)]  # fmt: skip
    assert scores.STUDY.run(words) == 0
    content = json.loads((tmp_path / "scores.json").read_text())
    ours, *theirs = content["runs"]
    assert (ours["implementation"], ours["members"]) == ("saferl", 2)
    assert [run["seed"] for run in theirs] == [0, 1] == [seed for seed, _ in seen]
    assert np.shape(ours["returns"]) == (2, 2) and np.shape(theirs[0]["returns"]) == (1, 2)
    assert content["versions"]["peer"] == {"d3rlpy": "0"}
    assert "- iql: saferl − d3rlpy" in (tmp_path / "scores.md").read_text()
    assert scores.STUDY.run(words) == 0
    assert capsys.readouterr().err.count("done before") == 3
