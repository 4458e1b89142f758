"""The study of offline data with an environment at a toy scale, and its arithmetic by hand."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.studies import online
from benchmarks.studies import online as report
from benchmarks.studies import online_tasks as tasks
from saferl.registry import agent_class
from saferl.spec import Spec

TINY = ["--size", "600", "--members", "2", "--episodes", "1", "--hidden", "8"]


@pytest.fixture
def short(monkeypatch):
    """Hopper alone, a few steps, eight rows a batch."""
    task = dataclasses.replace(
        tasks.TASKS["hopper"], steps=24, utd=1, pretraining=12, random_steps=6, evaluations=2
    )
    monkeypatch.setitem(tasks.TASKS, "hopper", task)
    monkeypatch.setitem(tasks.WIDE, "batch_size", 8)


def test_run_resume_and_report(tmp_path, short, monkeypatch, capsys):
    def run(*methods: str, report: bool = False) -> int:
        more = ["--out", str(tmp_path), *["--report"] * report]
        return online.STUDY.run([*TINY, "--tasks", "hopper", "--methods", *methods, *more])

    assert run("limits", "limits_guarded", "wsrl", "iql") == 0
    content = json.loads((tmp_path / "online.json").read_text())
    limits, guarded, iql, wsrl = content["runs"]
    assert [r["method"] for r in content["runs"]] == ["limits", "limits_guarded", "iql", "wsrl"]
    assert limits["names"][1:3] == ["cost_limit=inf seed=1", "cost_limit=40 seed=0"]
    assert list(limits["played"]) == ["bare"] and list(guarded["played"]) == ["bare", "guarded"]
    assert np.shape(guarded["played"]["guarded"]["costs"]) == (4, 1)
    assert limits["curve"]["steps"] == [12, 24] and np.shape(limits["curve"]["returns"]) == (2, 4)
    assert iql["curve"]["steps"] == [0, 12, 24]
    assert np.shape(limits["probe"]["largest"]) == (2, 4)
    largest, mean = (np.array(limits["probe"][k]) for k in ("largest", "mean"))
    assert (largest >= mean).all()
    assert limits["updates"] == {"critic": 18, "actor": 18}
    assert limits["passes"] == 18 * (17 + 15)  # two critics of the return, two of the cost
    assert wsrl["config"]["critics"] == 10 and wsrl["updates"]["critic"] == 18 + 12
    assert len(limits["metrics"]["exploration_cost"]) == 4
    text = (tmp_path / "online.md").read_text()
    assert "Scores come from generated data" in text and "Not trained" not in text
    assert "SAC 50/50 + LayerNorm, guard, limit 40" in text and "within 40" in text
    assert (tmp_path / "online.png").read_bytes()[:4] == b"\x89PNG"

    monkeypatch.setattr("benchmarks.report.plot", lambda *_, **__: None)  # once is enough

    # What is there is not trained again, and a report names what is missing.
    monkeypatch.setattr(online, "probe_values", None)
    assert run("limits", "wsrl") == 0
    capsys.readouterr()
    assert run("iql", "rlpd", report=True) == 0
    assert "- hopper: rlpd" in capsys.readouterr().out
    assert run("online") == 1  # probe_values is gone: it is said, and the store keeps what it has
    assert "online: FAILED" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "online.json").read_text())["runs"]) == 4


def test_every_training_of_every_task_comes_once_and_the_telling_ones_first():
    order = tasks.schedule(list(tasks.TASKS), None)
    assert len(order) == len(set(order)) and order[0] == ("hopper", "limits")
    assert set(order) >= {(t, m) for t, facts in tasks.TASKS.items() for m in facts.methods}
    assert tasks.schedule(["hopper"], ["iql", "limits"]) == [("hopper", "limits"),
                                                             ("hopper", "iql")]  # fmt: skip
    for task, method in order:
        facts, how = tasks.TASKS[task], tasks.METHODS[method]
        settings = tasks.settings_of(facts, how)
        agent_class(how.agent).make_config(settings)  # has these fields
        every = facts.steps // facts.evaluations
        assert facts.pretraining % every == facts.steps % every == 0  # evaluated in between


def test_passes_by_hand():
    sac = SimpleNamespace(critics=2, cost_limit=float("inf"))
    counts = tasks.passes("sac", sac)
    assert counts["critic"] + counts["actor"] == 18  # moorl's cost model: 1 + 2 + 6, and 3 + 6
    rlpd = tasks.passes("rlpd", SimpleNamespace(critics=10, cost_limit=float("inf")))
    assert rlpd == {"critic": 41, "actor": 33}
    assert tasks.passes("iql_finetune", SimpleNamespace()) == {"critic": 12, "actor": 3}


def test_the_guard_stops_once_half_of_the_limit_is_spent():
    class Full:
        members, spec = 1, Spec(2, 1, action_low=(-1.0,), action_high=(1.0,), horizon=100)

        def __call__(self, observations):
            return observations.new_ones(*observations.shape[:-1], 1)

    shield, state = tasks.guard(Full()), np.zeros(2, np.float32)
    shield.reset()
    taken = []
    for _ in range(22):
        taken.append(float(shield(state)[0]))
        shield.observe(1.0, False)
    assert taken == [1.0] * 20 + [0.0] * 2


def group(names, **changes):
    played = {"returns": [[1.0, 3.0], [5.0, 7.0], [2.0, 2.0], [4.0, 4.0]], "costs": None,
              "lengths": [[1, 1]] * 4}  # fmt: skip
    run = {
        "names": names,
        "played": {"bare": played},
        "curve": {"steps": [0, 10, 20], "returns": [[9.0] * 4, [1, 2, 3, 4], [3, 4, 5, 6]]},
        "probe": {"mean": [[0.0] * 4, [1, 2, 3, 4], [2, 3, 4, 5]],
                  "largest": [[99.0] * 4, [5, 6, 7, 8], [4, 4, 4, 4]]},
        "metrics": {"q_largest": [1.0, 2.0, 3.0, 4.0]},
        "updates": {"critic": 1000},
        "passes": 18_000,
        "seconds": {"cpu": 40.0},
    }  # fmt: skip
    return {"task": "cartpole", "method": "mixed_meta", "run": run | changes}


def test_rows_by_hand():
    one, half = report.rows_of(
        group(["eta=1 seed=0", "eta=1 seed=1", "eta=0.5 seed=0", "eta=0.5 seed=1"])
    )
    assert (one["title"], half["title"]) == ("SAC 50/50", "50/50 + slow weights, K 5, η 0.5")
    assert one["returns"].tolist() == [[1, 3], [5, 7]] and half["returns"].mean() == 3
    assert one["area"].tolist() == [2, 3] and half["area"].tolist() == [4, 5]  # step 0 left out
    assert half["probe"][:, -1].tolist() == [4, 5] and one["probe_largest"].max() == 6
    assert half["q_largest"].tolist() == [3, 4] and one["seconds"] == 10
    text = report.comparisons([one, half])
    assert "| cartpole |" in text and "-1" in text and "cannot tell" in text
    assert "4.5" in report.table([half]) and "–" not in report.table([half])


def test_what_q_does_once_the_return_is_level():
    def row(returns, q):
        return {
            "task": "t",
            "title": "m",
            "steps": np.arange(7) * 10,
            "curve": np.array([[0.0, *returns]] * 3),
            "probe": np.array(q, float),
        }

    level = [5, 50, 100, 101, 99, 100]
    text = report.settled(
        [row(level, [[0, 0, 1, 2, 3, 4], [0, 0, 1, 2, 3, 5], [0, 0, 1, 2, 3, 6]])]
    )
    assert "| 30 to 60 |" in text and "     1.0 |     5.0 | 4.0 [" in text
    assert text.count("rising") == 1
    assert "level |" in report.settled(
        [row(level, [[0, 0, 1, 2, 3, 0], [0] * 6, [0, 0, 1, 1, 1, 2]])]
    )
    assert "falling |" in report.settled([row(level, [[9, 9, 9, 9, 9, 1 + m] for m in range(3)])])
    assert report.settled([row([5, 50, 70, 100, 101, 99], [[0] * 6] * 3)]) == ""  # three are few
