"""Splitting runs into members and merging them: to the bit, whole or not at all."""

from __future__ import annotations

import csv
import errno
import os
import re
from pathlib import Path

import pytest
import torch

import saferl
from saferl.agents.bc import BC
from saferl.errors import SaferlError
from saferl.evaluation import Evaluation
from saferl.evaluation.report import write_report
from saferl.registry import agent_class, names
from saferl.runs import split as members
from saferl.runs.folder import RunFolder
from saferl.runs.split import merge, split
from tests.conformance.test_agents import SMALL, Setup, dataset_for, run_options
from tests.conftest import point_dataset

ENV = "tests.conftest:PointTest-v0"  # module:id also works in another process
TINY = {"hidden": [8], "batch_size": 16}
AGENTS = names("agents")


def quick(data, out, agent="td3_bc", **options):
    options = {"steps": 20, "members": 3, "settings": TINY, "eval_episodes": 2, "progress": False,
               "device": "cpu", "log_interval": 7} | options  # fmt: skip
    return saferl.train(agent, data, out=out, **options).path


def same(a: Path, b: Path) -> None:
    """Two run folders hold the same, to the bit."""
    (left, left_header), (right, right_header) = RunFolder(a).load(), RunFolder(b).load()
    assert left.keys() == right.keys()
    for key, tensor in left.items():
        assert tensor.dtype == right[key].dtype and torch.equal(tensor, right[key]), key
    assert left_header == right_header
    for name in ("config.yaml", "dataset.json", "metrics.csv", "evaluation.csv"):
        if (a / name).exists() or (b / name).exists():
            assert (a / name).read_bytes() == (b / name).read_bytes(), name


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Six members: two values of alpha, three seeds."""
    settings = TINY | {"alpha": [1.0, 5.0]}
    path = tmp_path_factory.mktemp("members") / "run"
    quick(point_dataset(), path, settings=settings, cost_limits=[3.0], eval_interval=10)
    folder = RunFolder(path)
    state, header = folder.load()
    folder.save(20, state, header | {"seconds": 7.5})  # rounded, those of a tiny run may be none
    return path


def test_a_member_is_a_full_run(run, tmp_path):
    paths = split(run, tmp_path / "parts")
    assert paths == [tmp_path / "parts" / f"member-{m}" for m in range(6)]
    whole, _ = RunFolder(run).load()
    for m, path in enumerate(paths):
        config = RunFolder(path).config()
        assert config.seeds == [m % 3]
        assert config.names == [f"alpha={5 if m > 2 else 1} seed={m % 3}"]
        assert config.agent_settings["alpha"] == [5.0 if m > 2 else 1.0]
        assert config.settings["hidden"] == [8]  # a list of sizes, not of members
        state, header = RunFolder(path).load()
        assert header["seeds"] == [m % 3] and header["step"] == 20
        for key, tensor in state.items():
            assert torch.equal(tensor, whole[key][m : m + 1] if tensor.dim() else whole[key]), key
    rows = Evaluation.read(paths[4] / "evaluation.csv")
    expected = Evaluation.read(run / "evaluation.csv")
    assert set(rows.members.tolist()) == {0}
    assert rows.returns.tolist() == expected.returns[expected.members == 4].tolist()
    with (paths[4] / "metrics.csv").open(newline="") as file:
        mine = list(csv.DictReader(file))
    with (run / "metrics.csv").open(newline="") as file:
        theirs = [row for row in csv.DictReader(file) if row["member"] == "4"]
    assert [row | {"member": "4"} for row in mine] == theirs != []
    # What reads runs reads this one.
    point = point_dataset()
    observations = torch.tensor(point.observations[:5])[None]
    together = saferl.load_agent(run).policy()(observations.expand(6, -1, -1))
    alone = saferl.load_agent(paths[4]).policy()(observations)
    torch.testing.assert_close(alone[0], together[4], rtol=1e-6, atol=1e-6)
    write_report([paths[4]], tmp_path / "report.html")
    assert "alpha=5 seed=1" in (tmp_path / "report.html").read_text()


def test_one_chosen_member_becomes_the_folder(run, tmp_path):
    every = split(run, tmp_path / "parts")
    assert split(run, tmp_path / "one", member=2) == [tmp_path / "one"]
    same(tmp_path / "one", every[2])
    with pytest.raises(SaferlError, match="no member 6: .* has 6, counted from 0"):
        split(run, tmp_path / "other", member=6)
    with pytest.raises(SaferlError, match="no member -1"):
        split(run, tmp_path / "other", member=-1)
    with pytest.raises(SaferlError, match="is not a run folder"):
        split(tmp_path, tmp_path / "other")


def test_split_and_merged_is_the_run(run, tmp_path):
    paths = split(run, tmp_path / "parts")
    same(merge(paths, tmp_path / "whole"), run)
    # Several members on either side are merged alike.
    front = merge(paths[:2], tmp_path / "front")
    assert RunFolder(front).config().agent_settings["alpha"] == [1.0, 1.0]
    back = merge(paths[2:], tmp_path / "back")
    same(merge([front, back], tmp_path / "again"), run)


def test_more_than_ten_members_keep_their_order(tmp_path):
    run = quick(point_dataset(env_id=None), tmp_path / "run", "bc", steps=2, members=11)
    split(run, tmp_path / "parts")
    paths = sorted((tmp_path / "parts").iterdir())
    assert [path.name for path in paths[:2]] == ["member-00", "member-01"]
    same(merge(paths, tmp_path / "whole"), run)


@pytest.mark.parametrize("agent", AGENTS)
def test_every_agent_splits_and_merges(agent, tmp_path):
    cls = agent_class(agent)
    settings = {key: value for key, value in SMALL.items() if hasattr(cls.Config, key)}
    options = {"steps": 5, "settings": settings} | run_options(cls)
    run = quick(dataset_for(cls), tmp_path / "run", agent, **options)
    paths = split(run, tmp_path / "parts")
    same(merge(paths, tmp_path / "whole"), run)
    assert saferl.load_agent(paths[1]).seeds == (1,)


@pytest.mark.parametrize("agent", AGENTS)
def test_the_member_axis_comes_first(agent):
    """Of every tensor with an axis, so that a slice is a member: seen with 3 and with 5 members."""
    cls = agent_class(agent)
    shared = tuple(f"{prefix.rstrip('.')}." for prefix in getattr(cls, "shared", ()))
    three, five = Setup(cls, (5, 6, 7)), Setup(cls, (5, 6, 7, 8, 9))
    for setup in (three, five):
        setup.train(3)
    states = three.state(), five.state()
    assert states[0].keys() == states[1].keys()
    for key, a in states[0].items():
        b = states[1][key]
        if f"{key}.".startswith(shared) or not a.dim():
            assert torch.equal(a, b), key
        else:
            assert (len(a), len(b)) == (3, 5) and a.shape[1:] == b.shape[1:], key


def test_a_resumed_member_goes_on_as_among_the_others(tmp_path):
    """To rounding: 1e-4 relative, 1e-5 absolute after 60 updates of float32."""
    data = point_dataset(env_id=None)
    settings = TINY | {"alpha": [1.0, 5.0]}
    run = quick(data, tmp_path / "run", members=2, settings=settings)
    (part,) = split(run, tmp_path / "part", member=3)
    saferl.resume(run, dataset=data, steps=80, device="cpu", progress=False)
    saferl.resume(part, dataset=data, steps=80, device="cpu", progress=False)
    (whole, _), (alone, header) = RunFolder(run).load(), RunFolder(part).load()
    assert header["step"] == 80
    for key, tensor in alone.items():
        expected = whole[key][3:4] if tensor.dim() else whole[key]
        torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-5, msg=key)
    assert torch.equal(alone["engine.buffer.random"], whole["engine.buffer.random"][3:4])
    with (run / "metrics.csv").open(newline="") as file:
        theirs = [row for row in csv.DictReader(file) if row["member"] == "3"]
    with (part / "metrics.csv").open(newline="") as file:
        mine = list(csv.DictReader(file))
    assert [row["step"] for row in mine] == [row["step"] for row in theirs]
    assert [float(row["critic_loss"]) for row in mine] == pytest.approx(
        [float(row["critic_loss"]) for row in theirs], rel=1e-3
    )


def test_metric_sums_between_two_readings_are_split(tmp_path, monkeypatch):
    """A run stopped in the middle of a log interval carries sums that belong to members."""
    from saferl.training.loop import Loop

    original = Loop._due

    def interrupt(loop, event):
        if event == "eval" and loop.step == 10:
            os.kill(os.getpid(), 2)
        return original(loop, event)

    monkeypatch.setattr(Loop, "_due", interrupt)
    data = point_dataset(env_id=None)
    with pytest.raises(KeyboardInterrupt):
        quick(data, tmp_path / "run", eval_interval=10)
    monkeypatch.setattr(Loop, "_due", original)
    whole, header = RunFolder(tmp_path / "run").load()
    assert header["step"] == 10 and whole["engine.sum.critic_loss"].shape == (3,)
    paths = split(tmp_path / "run", tmp_path / "parts")
    state, _ = RunFolder(paths[1]).load()
    assert torch.equal(state["engine.sum.critic_loss"], whole["engine.sum.critic_loss"][1:2])
    same(merge(paths, tmp_path / "whole"), tmp_path / "run")


def test_online_runs_split_with_their_own_rows(tmp_path):
    settings = TINY | {"random_steps": 5}
    run = quick(None, tmp_path / "run", "sac", env=ENV, settings=settings, members=2)
    paths = split(run, tmp_path / "parts")
    state, _ = RunFolder(paths[1]).load()
    assert state["engine.buffer.online.rows"].shape[:2] == (1, 20)
    same(merge(paths, tmp_path / "whole"), run)
    longer = saferl.resume(paths[1], steps=25, device="cpu", progress=False)
    assert longer.agent.updates == 20


def test_runs_of_their_own_are_merged_under_names_that_tell_them_apart(tmp_path):
    data = point_dataset()
    one = quick(data, tmp_path / "one", members=1, settings=TINY | {"alpha": 1.0},
                cost_limits=[3.0])  # fmt: skip
    two = quick(data, tmp_path / "two", members=2, settings=TINY | {"alpha": 5.0},
                cost_limits=[5.0])  # fmt: skip
    config = RunFolder(merge([one, two], tmp_path / "both")).config()
    assert config.names == ["alpha=1 seed=0", "alpha=5 seed=0", "alpha=5 seed=1"]
    assert config.seeds == [0, 0, 1] and config.agent_settings["alpha"] == [1.0, 5.0, 5.0]
    assert config.cost_limits == (3.0, 5.0)  # for tables: every member is judged by all
    both = saferl.load_agent(tmp_path / "both")
    assert both.config.alpha == (1.0, 5.0, 5.0)
    evaluation = Evaluation.read(tmp_path / "both" / "evaluation.csv")
    assert evaluation.at().matrix().shape == (3, 2)
    continued = saferl.resume(
        tmp_path / "both", dataset=data, env=None, steps=25, device="cpu", progress=False
    )
    assert continued.agent.updates == 25


@pytest.mark.parametrize(
    ("agent", "options", "difference"),
    [
        ("iql", {}, "agent is 'td3_bc' in the first and 'iql' in the second"),
        ("td3_bc", {"steps": 24}, "step is 20 in the first and 24"),
        ("td3_bc", {"data": 1}, "dataset fingerprint is"),
        ("td3_bc", {"settings": TINY | {"tau": 0.1}}, "tau is 0.005 in the first and 0.1"),
        ("td3_bc", {"settings": TINY | {"hidden": [9]}}, r"hidden is \[8\] in the first and \[9\]"),
        ("td3_bc", {"log_interval": 5}, "log_interval is 7 in the first and 5"),
        ("td3_bc", {"seed": 0}, "both hold member 'seed=0'"),
    ],
)
def test_merge_names_the_first_difference(tmp_path, agent, options, difference):
    options = {"seed": 7, "members": 1, "settings": TINY} | options
    first = quick(point_dataset(env_id=None), tmp_path / "a", members=1)
    data = point_dataset(seed=options.pop("data", 0), env_id=None)
    second = quick(data, tmp_path / "b", agent, **options)
    with pytest.raises(SaferlError, match=difference) as caught:
        merge([first, second], tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_evaluations_of_different_length_are_not_merged(run, tmp_path):
    paths = split(run, tmp_path / "parts")
    file = paths[1] / "evaluation.csv"
    longer = Evaluation.read(file)
    Evaluation.concatenate([longer, longer.at()]).write(file)
    with pytest.raises(SaferlError, match="2 rows per member at step 20 .* but 4 .* --episodes"):
        merge(paths, tmp_path / "out")
    longer.until(10).write(file)  # a step that one run lacks is left out
    merge(paths, tmp_path / "out")
    assert set(Evaluation.read(tmp_path / "out" / "evaluation.csv").steps.tolist()) == {10}


class Tabled(BC):
    """Shares a table whose first axis is no member axis."""

    shared = frozenset({"table"})

    def build(self, init):
        super().build(init)
        self.table = torch.nn.Module()
        self.table.register_buffer("rows", torch.arange(12.0).view(4, 3))


class Untold(Tabled):
    shared = frozenset()


@pytest.fixture
def tabled(monkeypatch):
    from saferl import registry

    monkeypatch.setitem(registry._registered["agents"], "tabled", Tabled)
    monkeypatch.setitem(registry._registered["agents"], "untold", Untold)


def test_shared_tables_are_copied_and_must_agree(tmp_path, tabled):
    data = point_dataset(env_id=None)
    run = quick(data, tmp_path / "run", "tabled", steps=3)
    paths = split(run, tmp_path / "parts")
    state, _ = RunFolder(paths[1]).load()
    assert state["agent.table.rows"].shape == (4, 3)
    same(merge(paths, tmp_path / "whole"), run)
    folder = RunFolder(paths[2])
    state, header = folder.load()
    state["agent.table.rows"][0, 0] += 1
    folder.save(3, state, header)
    with pytest.raises(SaferlError, match=r"agent\.table\.rows is one in the first and another"):
        merge(paths, tmp_path / "out")


def test_a_tensor_without_member_axis_is_named(tmp_path, tabled):
    run = quick(point_dataset(env_id=None), tmp_path / "run", "untold", steps=3)
    message = r"agent\.table\.rows of .* has shape \[4, 3\] but the run has 3 members: .*\.shared"
    with pytest.raises(SaferlError, match=message):
        split(run, tmp_path / "parts")
    assert not (tmp_path / "parts").exists()


@pytest.mark.parametrize("written", [0, 1, 4])
def test_a_crash_leaves_nothing_that_looks_whole(run, tmp_path, monkeypatch, written):
    """Stopped in its first, second or fifth table, a split leaves nothing behind."""
    calls = []

    def full(path, text):
        calls.append(path)
        if len(calls) > written:
            raise OSError(errno.ENOSPC, "No space left on device")
        path.write_text(text)

    monkeypatch.setattr(members, "write_text", full)
    with pytest.raises(SaferlError, match=r"cannot write .*parts: No space left"):
        split(run, tmp_path / "parts")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert len(split(run, tmp_path / "parts")) == 6


def test_nothing_appears_before_everything_is_written(run, tmp_path, monkeypatch):
    """What a kill leaves has another name, hidden, so no glob of run folders meets it."""
    replace, seen = os.replace, []

    def watch(source, target):
        if Path(target) == tmp_path / "parts":
            seen.append(sorted(p.name for p in Path(source).iterdir()))
            assert re.fullmatch(r"\.parts\.\d+\.tmp", Path(source).name)
            assert all(RunFolder(p).load()[1]["step"] == 20 for p in Path(source).iterdir())
        assert not (tmp_path / "parts").exists()
        replace(source, target)

    monkeypatch.setattr(os, "replace", watch)
    split(run, tmp_path / "parts")
    assert seen == [[f"member-{m}" for m in range(6)]]


def test_a_folder_in_use_is_not_overwritten(run, tmp_path):
    (tmp_path / "parts").mkdir()
    split(run, tmp_path / "parts")  # an empty folder may be filled
    for function in (split, lambda run, out: merge([run], out)):
        with pytest.raises(SaferlError, match="exists already: choose another --out"):
            function(run, tmp_path / "parts")
    with pytest.raises(SaferlError, match="no run to merge"):
        merge([], tmp_path / "none")


def test_rows_beyond_the_checkpoint_are_left_out(tmp_path):
    """As on resume: a crash after the last checkpoint leaves rows that no state belongs to."""
    run = quick(point_dataset(), tmp_path / "run", members=2)
    with (run / "metrics.csv").open("a") as file:
        file.write("21,0,0.5\n21,1,0.5\n22,0")
    paths = split(run, tmp_path / "parts")
    assert "21," not in (paths[0] / "metrics.csv").read_text()


def test_a_configuration_that_was_edited_is_refused(tmp_path):
    run = quick(point_dataset(env_id=None), tmp_path / "run", steps=3)
    config = RunFolder(run).config()
    RunFolder(run).write_config(config.replace(settings=config.settings | {"alpha": 7.0}))
    with pytest.raises(SaferlError, match="another settings"):
        split(run, tmp_path / "parts")
