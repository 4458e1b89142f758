"""The study `comparison` end to end at a toy scale, and its arithmetic by hand."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import data as datasets
from benchmarks import runner
from benchmarks.studies import comparison
from saferl.registry import agent_class

TEN = "saferl/hopper-expert-random-10-v0"
TINY = ["--datasets", TEN, "--size", "600", "--updates", "4", "--members", "2",
        "--episodes", "2", "--hidden", "8", "--batch-size", "8"]  # fmt: skip


def run(*arguments: str, out: Path) -> int:
    return comparison.STUDY.run([*TINY, *arguments, "--out", str(out)])


def plan(**changes) -> argparse.Namespace:
    values = {"datasets": None, "agents": list(comparison.NAMES), "members": 3, "size": None,
              "updates": 100, "hidden": 64, "batch_size": 64, "cql_samples": 4,
              "report": False}  # fmt: skip
    return argparse.Namespace(**values | changes)


@pytest.fixture
def sensitive(monkeypatch):
    """One coefficient with two values, on the tiny data."""
    monkeypatch.setattr(comparison, "SENSITIVITY", {TEN: {"alpha": [1.0, 2.5]}})
    monkeypatch.setattr(comparison, "CURVE_POINTS", 2)
    monkeypatch.setattr(comparison, "CURVE_EPISODES", 1)


def test_run_resume_and_report(tmp_path, sensitive, monkeypatch, capsys):
    assert run("--agents", "a2pr", "bc", out=tmp_path) == 0
    content = json.loads((tmp_path / "comparison.json").read_text())
    plain, _, varied = content["runs"]
    assert [(r["agent"], r["varied"]) for r in content["runs"]] == [
        ("a2pr", None), ("bc", None), ("a2pr", {"alpha": [1.0, 2.5]}),
    ]  # fmt: skip
    assert np.shape(plain["returns"]) == np.shape(plain["costs"]) == (2, 2)
    assert np.shape(varied["returns"]) == (4, 2)
    assert varied["names"][1:3] == ["alpha=1 seed=1", "alpha=2.5 seed=0"]
    assert plain["curve"]["updates"] == [2, 4]
    assert np.shape(plain["curve"]["returns"]) == (2, 2)
    assert len(plain["metrics"]["cloned_share"]) == 2
    assert plain["config"]["hidden"] == [8, 8, 8] and plain["config"]["vae_hidden"] == [16, 16]
    assert plain["config"]["mask"] == 1.5  # configs/a2pr.yaml, of hopper's random data
    assert plain["fingerprint"] == content["datasets"][TEN]["fingerprint"]
    text = (tmp_path / "comparison.md").read_text()
    assert "not D4RL's" in text and "Missing" not in text
    assert "2.5 (in use)" in text and "1 (in use)" not in text
    for name in ("comparison.png", "comparison_curves.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"

    monkeypatch.setattr("benchmarks.report.plot", lambda *_, **__: None)  # once is enough

    # What is there is not trained again; what is asked for besides is.
    trained = []
    work = runner.work

    def count(name, key, *rest):
        result = work(name, key, *rest)
        trained.append((key["agent"], result[1] is not None))
        return result

    monkeypatch.setattr(runner, "work", count)
    assert run("--agents", "a2pr", "td3_bc", "bc", out=tmp_path) == 0
    assert trained == [("a2pr", False), ("td3_bc", True), ("bc", False), ("a2pr", False)]
    after = json.loads((tmp_path / "comparison.json").read_text())["runs"]
    assert after[:3] == content["runs"] and len(after) == 4

    # Another scale is another training; a report alone trains nothing and says what is missing.
    trained.clear()
    before = (tmp_path / "comparison.json").read_bytes()
    capsys.readouterr()
    assert run("--report", out=tmp_path) == 0
    assert run("--report", "--agents", "bc", "--updates", "5", out=tmp_path) == 0
    assert trained == [] and (tmp_path / "comparison.json").read_bytes() == before
    printed = capsys.readouterr().out
    assert f"- {TEN}: IQL\n- {TEN}: CQL\n" in printed.replace("\n\n", "\n")
    assert "Nothing has been measured at this scale." in printed


@pytest.mark.slow
def test_processes_give_what_one_gives(tmp_path):
    assert run("--agents", "bc", "td3_bc", "--jobs", "2", out=tmp_path / "two") == 0
    assert run("--agents", "bc", "td3_bc", out=tmp_path / "one") == 0
    found = []
    for folder in ("one", "two"):
        content = json.loads((tmp_path / folder / "comparison.json").read_text())
        found.append({run["agent"]: run["returns"] for run in content["runs"]})
    assert found[0] == found[1] and set(found[0]) == {"bc", "td3_bc"}


def test_a_failed_training_is_said_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    train = comparison.Comparison.train

    def fail(self, key, *rest):
        if key["agent"] == "td3_bc":
            raise RuntimeError("q of member 0 is not finite")
        return train(self, key, *rest)

    monkeypatch.setattr(comparison.Comparison, "train", fail)
    assert run("--agents", "td3_bc", "bc", out=tmp_path) == 1
    out, err = capsys.readouterr()
    assert f"{TEN}: TD3+BC: FAILED, q of member 0 is not finite" in err
    assert [r["agent"] for r in json.loads((tmp_path / "comparison.json").read_text())["runs"]] == [
        "bc"
    ]
    assert f"- {TEN}: TD3+BC" in out


def test_order_of_work(monkeypatch, tmp_path):
    asked = ["saferl/h*-10-v0", "saferl/hopper-velocity-mixed-v0"]
    keys = comparison.STUDY.keys(plan(datasets=asked))
    order = [(key["dataset"].split("/")[1][:6], key["agent"], key["varied"]) for key in keys]
    five = ["a2pr", "td3_bc", "bc", "iql", "cql"]
    assert [agent for _, agent, _ in order] == [*five, *five, "a2pr", "a2pr", "a2pr", *five]
    assert [order[i][0] for i in (0, 5, 10, 13)] == ["halfch", "hopper", "halfch", "hopper"]
    assert [next(iter(varied)) for *_, varied in order[10:13]] == ["alpha", "mask", "vae_weight"]
    monkeypatch.setattr(datasets, "SHARED_DATA", tmp_path / "absent")
    names = {key["dataset"] for key in comparison.STUDY.keys(plan())}
    assert len(names) == 21 and not any(name.startswith("shared/") for name in names)
    names = {key["dataset"] for key in comparison.STUDY.keys(plan(report=True))}
    assert any(name.startswith("shared/") for name in names)  # their results are committed


def test_settings_published_where_there_are_any_then_the_scale():
    of = comparison.settings_of
    a2pr = of("a2pr", "shared/halfcheetah-medium-replay", plan())
    assert (a2pr["alpha"], a2pr["vae_weight"], a2pr["mask"], a2pr["discount"]) == (
        40.0, 1.5, 0.8, 0.995,
    )  # fmt: skip
    assert a2pr["critic_hidden"] == [64] * 4 and a2pr["vae_hidden"] == [128] * 2
    iql = of("iql", "saferl/halfcheetah-expert-random-1-v0", plan())
    assert iql["normalize_rewards"] and iql["expectile"] == 0.7
    assert iql["actor_decay_steps"] == 100
    assert of("cql", "saferl/hopper-velocity-medium-v0", plan())["samples"] == 4
    full = of("a2pr", TEN, plan(hidden=0, batch_size=256))
    assert full["batch_size"] == 256 and "vae_hidden" not in full
    for agent in comparison.NAMES:
        agent_class(agent).make_config(of(agent, TEN, plan()))
    # The values in use are among the varied ones, or the table would not have them.
    for dataset, fields in comparison.SENSITIVITY.items():
        used = of("a2pr", dataset, plan())
        assert all(used[field] in values for field, values in fields.items())


def entry(dataset, agent, returns, varied=None):
    return {"dataset": dataset, "agent": agent, "varied": varied, "members": 2,
            "run": returns and {"returns": returns}}  # fmt: skip


FACTS = {"mix-1": {"reference_returns": [100.0, 300.0]},
         "mix-5": {"reference_returns": [0.0, 100.0]}}  # fmt: skip


def test_summary_by_hand():
    row = comparison.summary(entry("mix-1", "bc", [[100.0, 300.0], [200.0, 400.0]]), FACTS["mix-1"])
    assert (row["return"], row["score"], row["iqm_score"]) == (250.0, 75.0, 75.0)
    low, high = row["return_interval"]
    assert low < 250 < high
    assert row["score_interval"] == pytest.approx([(low - 100) / 2, (high - 100) / 2])


def test_comparisons():
    entries = [
        entry("mix-1", "a2pr", [[200.0, 200.0], [200.0, 200.0]]),
        entry("mix-1", "bc", [[150.0, 150.0], [150.0, 150.0]]),
        entry("mix-5", "a2pr", [[10.0, 10.0], [10.0, 10.0]]),
        entry("mix-5", "bc", [[20.0, 20.0], [20.0, 20.0]]),
        entry("mix-5", "a2pr", [[99.0, 99.0]], varied={"alpha": [1.0]}),  # not part of it
        entry("mix-1", "iql", None),
    ]
    found = comparison.comparisons(entries, FACTS, {"toy": ["mix-1", "mix-5", "mix-10"]})
    assert [(d["where"], d["peer"], d["difference"], d["verdict"]) for d in found] == [
        ("mix-1", "bc", 25.0, "above"),
        ("mix-5", "bc", -10.0, "below"),
        ("mean of 2 of 3 mixtures of toy", "bc", 7.5, "above"),
    ]
    wide = [
        entry("mix-5", "a2pr", [[0.0, 40.0], [90.0, 30.0]]),
        entry("mix-5", "bc", [[10.0, 50.0], [60.0, 20.0]]),
    ]
    assert comparison.comparisons(wide, FACTS, {})[0]["verdict"] == "cannot tell"


def test_sensitivity_rows_take_the_members_of_their_value():
    varied = entry("mix-5", "a2pr", [[1.0, 3.0], [5.0, 7.0], [20.0, 20.0], [40.0, 40.0]],
                   {"alpha": [1.0, 40.0]})  # fmt: skip
    plain = entry("mix-5", "a2pr", [[0.0, 0.0]]) | {"settings": {"alpha": 40.0}}
    rows = comparison.sensitivity([varied, plain], FACTS)
    assert [(r["value"], r["score"], r["in_use"]) for r in rows] == [
        (1.0, 4.0, False), (40.0, 30.0, True),
    ]  # fmt: skip


def test_a_snapshot_is_the_policy_in_its_file(tmp_path):
    h5py = pytest.importorskip("h5py")
    import torch

    random = np.random.default_rng(0)
    weights = [random.normal(size=shape) for shape in ((3, 4), (4, 4), (4, 2))]
    biases = [random.normal(size=(1, n)) for n in (4, 4, 2)]
    mean, std, log_std = random.normal(size=(1, 3)), np.full((1, 3), 2.0), np.full((1, 2), -1.0)
    with h5py.File(tmp_path / "log.h5", "w") as file:
        group = file.create_group("snapshots/iter0000020/GaussianPolicy")
        layers = ("hidden/FeedforwardNet/layer_0", "hidden/FeedforwardNet/layer_2", "out")
        for layer, weight, bias in zip(layers, weights, biases):
            group[f"{layer}/AffineLayer/W"], group[f"{layer}/AffineLayer/b"] = weight, bias
        group["obsnorm/Standardizer/mean_1_D"] = mean
        group["obsnorm/Standardizer/meansq_1_D"] = std**2 + mean**2
        group["logstdevs_1_Da"] = log_std
    policy = datasets.Snapshot(tmp_path / "log.h5", 20)
    s = random.normal(size=(1, 5, 3)) * 30
    x = (s - mean) / std
    for weight, bias in zip(weights[:-1], biases):
        x = np.tanh(x @ weight + bias)
    wanted = x @ weights[-1] + biases[-1]
    np.testing.assert_allclose(policy(torch.from_numpy(s).float()), wanted, rtol=1e-4, atol=1e-5)
    assert policy.std_of_action.numpy() == pytest.approx(np.exp(log_std))


@pytest.mark.skipif(
    not (datasets.SHARED_DATA / datasets.IMITATION).is_dir(), reason="../shared/data is not here"
)
def test_rolled_out_data_are_cached_and_hold_every_policy(monkeypatch):
    monkeypatch.setitem(
        datasets.SHARED,
        "shared/hopper-medium-replay",
        ("hopper", [("log_Hopper-v1_4.h5", 0), ("log_Hopper-v1_4.h5", 20)]),
    )
    data = datasets.rolled_out("shared/hopper-medium-replay", 100)
    assert len(data) >= 100 and "not D4RL's" in data.card.origin
    returns = data.episode_returns()
    assert returns[-1] > 3 * returns[0] > 0  # iteration 20 hops further than iteration 0

    def again(*_, **__):
        raise AssertionError("played again")

    monkeypatch.setattr("saferl.rollout.collect_transitions", again)
    assert datasets.rolled_out("shared/hopper-medium-replay", 100).fingerprint == data.fingerprint
