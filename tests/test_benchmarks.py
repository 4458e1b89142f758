"""Helpers of the benchmarks; the benchmarks themselves run by hand."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, addmm_flop

from saferl.data.buffer import Batch
from saferl.registry import agent_class
from saferl.spec import Spec

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import common
import scores
import scores_report
import throughput


def test_counts_of_one_layer_and_of_a_network():
    # 5 rows through 3 → 4 → 2, two networks: by hand.
    assert throughput.forward((3, 4, 2), 5, 2) == 2 * 5 * (12 + 8)
    assert throughput.backward_inputs((3, 4, 2), 5, 2) == 2 * 5 * 8
    assert throughput.backward_inputs((3, 4, 2), 5, 2, wanted_inputs=1) == 2 * 5 * (8 + 4)
    assert throughput.step((3, 4, 2), 5) == 5 * (20 + 20 + 8)


@pytest.mark.parametrize("agent", sorted(throughput.NETWORKS))
def test_floor_is_what_the_agents_multiply(agent):
    o, a, hidden, rows = 7, 3, (32, 32), 64
    cls = agent_class(agent)
    settings = common.settings_of(agent, hidden) | {"normalize_rewards": False}
    spec = Spec(o, a, action_low=(-1.0,) * a, action_high=(1.0,) * a)
    learner = cls(spec, cls.make_config(settings), [0])
    batch = Batch(
        torch.randn(1, rows, o),
        torch.rand(1, rows, a) * 2 - 1,
        torch.randn(1, rows),
        None,
        torch.randn(1, rows, o),
        torch.zeros(1, rows),
    )
    learner.update(batch)

    def in_place(bias, a, b, out_shape=None, **_):  # which the counter does not know by itself
        return addmm_flop(bias, a, b)

    also = {torch.ops.aten.addmm_: in_place}
    with FlopCounterMode(display=False, custom_mapping=also) as counter:
        learner.update(batch)  # two in all that are counted: TD3+BC's updates alternate
        learner.update(batch)
    done = counter.get_total_flops() / 2 / 2
    # The counter sees matrix products alone; the gradient at a critic's last hidden layer is an
    # outer product with one column, done element by element. The actor's loss goes back to the
    # critic's whole input, of which the count has the action alone.
    count = throughput.multiply_adds(agent, o, a, hidden, rows)
    assert 0.94 * count <= done <= 1.02 * count


def test_settings_are_fields_of_our_configs():
    for agent in common.SETTINGS:
        config = agent_class(agent).make_config(common.settings_of(agent, (8, 8)))
        assert config.hidden == (8, 8)
    assert agent_class("cql").make_config(common.settings_of("cql", (8,))).critic_hidden == (8,)


def test_difference_interval():
    random = np.random.default_rng(0)
    ours, peer = random.normal(10, 1, (3, 20)), random.normal(0, 1, (3, 20))
    difference, low, high = scores_report.compare(ours, peer)
    assert difference == pytest.approx(ours.mean() - peer.mean())
    assert 5 < low < difference < high < 15
    back, back_low, back_high = scores_report.compare(peer, ours)
    assert (back, back_low, back_high) == pytest.approx((-difference, -high, -low))
    # Narrower than the sum of the two intervals, wider than either.
    alone = np.diff(scores_report.bootstrap_interval(ours))[0]
    assert (
        alone < high - low < 2.2 * alone + 2.2 * np.diff(scores_report.bootstrap_interval(peer))[0]
    )


def test_verdicts():
    assert scores_report.verdict(-3.0, -1.0) == "below beyond the interval"
    assert scores_report.verdict(-1.0, 1.0) == "not below"
    assert scores_report.verdict(1.0, 3.0) == "above beyond the interval"
    row = {"agent": "cql", "ratio": 1.1, "sampling_share": 0.01, "over_floor": 2.0}
    lines = throughput.verdicts([row])
    assert [line.split(":")[0] for line in lines] == ["MISSED", "met", "met"]


def test_finished_trainings_are_skipped_and_unfinished_ones_are_not(tmp_path):
    options = argparse.Namespace(
        agents=["bc", "cql"], seeds=2, steps=None, hidden=[8], batch_size=4
    )
    facts = {"d": {"fingerprint": "f"}}
    book = scores.Book(tmp_path / "scores.json", fresh=False)
    tasks = scores.schedule(options, facts, book)
    assert [(t["agent"], t["implementation"], t.get("seed")) for t in tasks] == [
        ("bc", "saferl", None), ("bc", "d3rlpy", 0), ("bc", "d3rlpy", 1),
        ("cql", "saferl", None), ("cql", "d3rlpy", 0), ("cql", "d3rlpy", 1),
    ]  # fmt: skip
    key = scores_report.configuration(options, "d", facts["d"], "bc", "d3rlpy")
    book.add([key | {"seed": 1, "returns": [1.0]}])
    again = scores.Book(tmp_path / "scores.json", fresh=False)
    left = scores.schedule(options, facts, again)
    assert len(left) == 5
    assert ("bc", "d3rlpy", 1) not in [
        (t["agent"], t["implementation"], t.get("seed")) for t in left
    ]
    # Other data, or another configuration, is another training.
    assert len(scores.schedule(options, {"d": {"fingerprint": "g"}}, again)) == 6
    options.hidden = [16]
    assert len(scores.schedule(options, facts, again)) == 6


def test_worker_answers_reports_errors_and_keeps_prints_apart(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(Path(common.__file__).parent)!r})\n"
        "import common\n"
        "def add(a, b):\n"
        "    print('noise')\n"
        "    return a + b\n"
        "common.serve({'add': add})\n"
    )
    with common.Worker(sys.executable, script) as worker:
        assert worker("add", a=1, b=2) == 3
        with pytest.raises(RuntimeError, match="unsupported operand"):
            worker("add", a=1, b="x")
        assert worker("add", a=2, b=2) == 4  # an error does not end it


def test_command_leaves_out_this_machines_paths(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/x/scores.py", "--peer-python", "/y", "--jobs", "1"])
    assert common.command() == "python benchmarks/scores.py --jobs 1"
