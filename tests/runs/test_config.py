"""`RunConfig` and `Member`: one definition of a run, read and written without loss."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import yaml

import saferl
from saferl.cli import _parser, main
from saferl.errors import SaferlError
from saferl.runs.config import Member, RunConfig, groups_of, options, plain
from saferl.runs.folder import RunFolder
from saferl.runs.settings import resolve
from tests.conftest import point_dataset


def test_limits_that_print_alike_stay_apart(tmp_path):
    """1000001 and 1000002 are 1e+06 in six digits."""
    limits = [1000001.0, 1000002.0]
    run = saferl.train(
        "bc_safe", point_dataset(), steps=4, members=1, cost_limits=limits, out=tmp_path / "run",
        settings={"hidden": [4]}, eval_episodes=6, device="cpu", progress=False,
    )  # fmt: skip
    config = RunFolder(run.path).config()
    assert [member.values["cost_limit"] for member in config.who] == limits
    groups = groups_of(config.who)
    assert [group.cost_limit for group in groups] == limits
    rows = run.evaluation.table(config.cost_limits, groups=groups)
    judged = [(row["group"], row["limit"]) for row in rows if row["member"] is None]
    assert judged == [("cost_limit=1000001", 1000001.0), ("cost_limit=1000002", 1000002.0)]


def test_a_record_is_read_as_it_was_written():
    asked = RunConfig(agent="a2pr", members=2, seed=3, cost_limits=[5, 10], steps=7,
                      settings={"hidden": [8, 8], "mask": 0.123456789})  # fmt: skip
    run = resolve(asked, "d4rl/hopper-medium-v2").run
    text = yaml.safe_dump(run.to_dict())
    again = RunConfig.from_dict(yaml.safe_load(text))
    assert again == run.replace(seed=again.seed)
    assert again.seeds == [3, 4, 3, 4] and again.names == run.names
    assert again.agent_settings["cost_limit"] == [5.0, 5.0, 10.0, 10.0]


def test_every_option_has_help_and_one_spelling():
    parser = _parser()
    train = next(iter(parser._subparsers._group_actions)).choices["train"]
    flags = {action.dest: action for action in train._actions}
    for name, spec in options().items():
        assert spec.metadata["help"]
        dest = "dataset_option" if name == "dataset_options" else name
        assert dest in flags and flags[dest].default in (None, []), name
    fields = {spec.name for spec in dataclasses.fields(RunConfig)}
    assert len(inspect.signature(saferl.train).parameters) <= 12
    assert not fields & set(inspect.signature(saferl.train).parameters) - {
        "dataset",
        "env",
        "guard",
    }


def test_what_cannot_be_meant_is_one_line():
    for wrong, line in (
        ({"steps": 0}, "steps must be 1 or more, got 0"),
        ({"members": 0}, "members must be 1 or more, got 0"),
        ({"eval_interval": -1}, "eval_interval must be 0 or more steps, got -1"),
        ({"cost_limits": [-1.0]}, "a cost limit is a number of 0 or more per episode, got -1"),
        ({"cost_limits": [float("nan")]}, "a cost limit is a number of 0 or more per episode"),
    ):
        with pytest.raises(SaferlError, match=line):
            RunConfig(**wrong)
    with pytest.raises(SaferlError, match="unknown option 'stepz': did you mean 'steps'"):
        saferl.train("bc", point_dataset(), stepz=3)


def test_members_have_names_with_all_their_digits():
    assert str(Member(3)) == "seed=3"
    assert str(Member(0, {"alpha": 2.5, "cost_limit": 1000001.0})) == (
        "alpha=2.5 cost_limit=1000001 seed=0"
    )
    assert plain(1e-05) == "1e-05" and plain(float("inf")) == "inf" and plain(20.0) == "20"
    group = Member(0, {"alpha": 2.5, "cost_limit": 20.0}).group
    assert group.cost_limit == 20 and group.family == "alpha=2.5"
    assert Member(0, {"cost_limit": float("inf")}).group.cost_limit is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 99}, "format 99, this version reads up to 2: upgrade"),
        ({"steps": "many"}, "steps: 'many', which is no whole number"),
        ({"members": [{"seed": "abc"}]}, "a seed is a whole number from 0"),
        ({"members": [{"seed": -1}]}, "a seed is a whole number from 0"),
        ({"members": ["seed 1"]}, "members are not a list of seed and values"),
        ({"members": [{"seed": 0, "alpha": 1}]}, "members are not a list of seed and values"),
    ],
)
def test_a_damaged_record_is_one_line_that_says_what_to_do(changes, message):
    record = RunConfig(members=(Member(0),)).to_dict()
    assert RunConfig.from_dict(record).who == (Member(0),)
    with pytest.raises(SaferlError, match=message):
        RunConfig.from_dict(record | changes)


@pytest.mark.parametrize("threads", [0, 99_999_999])
def test_threads_have_one_range_for_all_commands(threads, capsys):
    with pytest.raises(SaferlError, match=f"threads must be .* got {threads}"):
        RunConfig(threads=threads)
    assert main(["evaluate", "run", "--threads", str(threads)]) == 2
    assert f"got {threads}" in capsys.readouterr().err
