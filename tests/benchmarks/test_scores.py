"""The study `scores`: its schedule and its table; d3rlpy itself is not here."""

from __future__ import annotations

import numpy as np
import pytest

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
