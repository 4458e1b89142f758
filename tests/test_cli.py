"""Commands as a user types them, mistakes included: one line on stderr, exit status 2."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from saferl.cli import main
from saferl.data import save_dataset
from saferl.runs.folder import RunFolder
from tests.conftest import point_dataset

ENV = "tests.conftest:PointTest-v0"
QUICK = ["--steps", "30", "--members", "2", "--set", "hidden=8", "--set", "batch_size=16",
         "--eval-episodes", "3", "--device", "cpu", "--threads", "1"]  # fmt: skip


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_dataset(point_dataset(env_id=ENV), tmp_path / "point.npz")
    return "point.npz"


def test_train_evaluate_report_inspect_collect(data, tmp_path, capsys):
    assert main(["train", "bc", "--dataset", data, "--cost-limit", "5", *QUICK]) == 0
    out = capsys.readouterr().out
    assert "limit" in out and "members" in out and "runs/bc-point" in out
    run = "runs/bc-point"
    assert main(["evaluate", run, "--episodes", "4", "--cost-limit", "2", "8"]) == 0
    out = capsys.readouterr().out
    assert out.count("cannot tell") + out.count("met") >= 2
    assert main(["report", run]) == 0
    assert (tmp_path / run / "report.html").stat().st_size > 10_000
    assert main(["inspect", data, "--plot", "plot.png"]) == 0
    assert "point" in capsys.readouterr().out and (tmp_path / "plot.png").exists()
    assert main(["collect", run, "--out", "again.npz", "--steps", "50"]) == 0
    assert main(["collect", "random", "--out", "random.npz", "--env", ENV, "--steps", "50"]) == 0
    assert main(["train", "bc", "--dataset", "again.npz", *QUICK, "--quiet"]) == 0
    capsys.readouterr()
    assert main(["list"]) == 0
    out = capsys.readouterr().out
    for word in ("td3_bc", "discrete_cql", "hopper-medium-v2", "HopperVelocity-v0", "EpiCare1-v0"):
        assert word in out


@pytest.mark.parametrize("columns", [80, 120])
def test_the_list_is_aligned_and_fits_the_terminal(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= columns
    heads = [line for line in lines if re.match(r"  \w+ +(continuous|discrete) ", line)]
    assert len(heads) >= 21
    for word in (r"(continuous|discrete)", r"(vectors|pixels|both)"):
        assert len({re.search(rf" {word}( |$)", line).start() for line in heads}) == 1
    starts = {len(line) - len(line.lstrip()) for line in lines[1 : lines.index("datasets:")]}
    assert len(starts) == 2, "names, and the text beside or below them"


def test_members_are_split_and_merged(data, tmp_path, capsys):
    assert main(["train", "bc", "--dataset", data, *QUICK]) == 0
    capsys.readouterr()
    assert main(["split", "runs/bc-point", "--out", "parts"]) == 0
    parts = capsys.readouterr().out.split()
    assert [Path(part).name for part in parts] == ["member-0", "member-1"]
    assert main(["merge", *reversed(parts), "--out", "both"]) == 0
    assert capsys.readouterr().out.strip() == "both"
    assert RunFolder("both").config().names == ["seed=1", "seed=0"]
    assert main(["evaluate", "both", "--episodes", "2"]) == 0
    capsys.readouterr()
    assert main(["split", "both", "--out", "one", "--member", "2"]) == 2
    assert main(["merge", parts[0], parts[0], "--out", "twin"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 2 and "independent seed" in error


def test_the_embedded_default_keeps_a_limit_that_its_data_break(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ["--dataset-option", "size=5000", "--steps", "20", "--eval-interval", "0",
             "--eval-episodes", "2", "--device", "cpu"]  # fmt: skip
    assert main(["train", *small]) == 0
    out = capsys.readouterr().out
    assert "cost limit 40, best 10%: clones" in out and "verdict" in out
    run = RunFolder("runs/bc_safe-hopper-velocity-mixed-v0")
    config = run.config()
    assert config.cost_limits == (40.0,) and config.agent_settings["cost_limit"] == [40.0] * 3
    assert run.card()["summary"]["cost_mean"] > 40
    # Another agent has its own settings, another limit is trained for.
    assert main(["train", "bc", "--cost-limit", "9", "--quiet", *small]) == 0
    assert RunFolder("runs/bc-hopper-velocity-mixed-v0").config().cost_limits == (9.0,)


def test_a_table_trains_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    lines = ["patient,age,pressure,dose,survived,harm"]
    for row in range(60):
        age, pressure = rng.normal(size=2)
        lines.append(f"{row // 6},{age:.3f},{pressure:.3f},{rng.integers(3)},1,{row % 2}")
    (tmp_path / "patients.csv").write_text("\n".join(lines) + "\n")
    columns = {"observations": "age,pressure", "actions": "dose", "rewards": "survived",
               "costs": "harm", "episode": "patient"}  # fmt: skip
    arguments = [word for role, name in columns.items() for word in ("--column", f"{role}={name}")]
    quick = ["--steps", "20", "--set", "hidden=8", "--cost-limit", "2", "--out", "run"]
    command = ["train", "discrete_cql", "--dataset", "patients.csv", *arguments, *quick]
    assert main(command) == 0
    assert main(["train", "--resume", "run", "--steps", "30"]) == 0
    assert main(["inspect", "patients.csv", *arguments, "--plot", "p.png"]) == 0
    assert "10 terminal" in capsys.readouterr().out
    assert main(["inspect", "patients.csv", "--column", "observations=agee"]) == 2
    assert "'age'" in capsys.readouterr().err


def test_bare_command_prints_help(capsys):
    assert main([]) == 0
    assert "train" in capsys.readouterr().out


def test_resume_refuses_what_it_would_pass_over(capsys):
    """Every option of train but those that it heeds, with a value like the default's or empty."""
    from saferl.cli import _parser

    commands = next(a for a in _parser()._actions if a.dest == "command").choices
    heeded = {"--steps", "--device", "--engine", "--memory-map", "--quiet", "--resume", "--help"}
    values = {"--set": "a=1", "--dataset-option": "a=1", "--column": "actions=a", "--dataset": ""}
    tried = set()
    for action in commands["train"]._actions:
        name = action.option_strings[-1] if action.option_strings else action.dest.upper()
        if name in heeded:
            continue
        value = values.get(name, "0")
        words = [value] if name == "AGENT" else [name] if action.nargs == 0 else [name, value]
        assert main(["train", "--resume", "runs/x", *words]) == 2
        error = capsys.readouterr().err
        assert f"--resume takes {name} from the run's" in error and error.count("\n") == 1
        tried.add(name)
    assert {"AGENT", "--seed", "--members", "--threads", "--from", "--out"} < tried


MISTAKES = {
    "dataset": (["train", "--dataset", "saferl/hoper-velocity-random-v0"], "hopper-velocity"),
    "family": (["train", "--dataset", "d4lr/hopper-medium-v2"], "'d4rl'"),
    "d4rl id": (["train", "--dataset", "d4rl/hopper-meduim-v2"], "hopper-medium-v2"),
    "file": (["train", "--dataset", "nowhere.npz"], "no such file"),
    "agent": (["train", "td3", "--dataset", "point.npz"], "'td3_bc'"),
    "env": (["train", "--dataset", "point.npz", "--env", "saferl/HoperVelocity-v0"],
            "HopperVelocity"),
    "key": (["train", "--dataset", "point.npz", "--set", "alpa=1"], "'alpha'"),
    "set": (["train", "--dataset", "point.npz", "--set", "alpha"], "KEY=VALUE"),
    "words": (["train", "iql_finetune", "--dataset", "point.npz", "--set",
               "sampling=mixed,block"], "sampling cannot differ between members"),
    "twice": (["train", "--dataset", "point.npz", "--set", "alpha=1,2,1"], "has a value twice"),
    "nan": (["train", "--dataset", "point.npz", "--set", "alpha=nan"], "nan is not a number"),
    "batch": (["train", "--dataset", "point.npz", "--set", "batch_size=0"],
              "batch_size must be 1 or more, got 0"),
    "interval": (["train", "--dataset", "point.npz", "--set", "policy_interval=0"],
                 "policy_interval must be 1 or more, got 0"),
    "units": (["train", "--dataset", "point.npz", "--set", "hidden=8,0"],
              "hidden takes numbers of 1 or more"),
    "device": (["train", "--dataset", "point.npz", "--device", "meta"], "'meta' cannot be used"),
    "option": (["train", "--dataset", "point.npz", "--dataset-option", "horizn=3"], "'horizon'"),
    "spaces": (["train", "--dataset", "point.npz", "--env", "CartPole-v1"], "4 numbers"),
    "threads": (["train", "--dataset", "point.npz", "--threads", "0"], "threads must be 1"),
    "steps": (["train", "--dataset", "point.npz", "--steps", "0"], "steps must be 1"),
    "not a run": (["evaluate", "."], "not a run folder"),
    "no run": (["report", "nowhere"], "nowhere"),
    "collect from what": (["collect", "nowhere", "x.npz"], "not a run folder"),
    "resume what": (["train", "--resume", "nowhere"], "not a run folder"),
    "resume and set": (["train", "--resume", "runs/x", "--set", "alpha=2"], "--resume takes --set"),
    "resume and more": (
        ["train", "cql", "--resume", "runs/x", "--members", "3", "--cost-limit", "4"],
        "--resume takes AGENT, --members, --cost-limit from the run's config.yaml",
    ),
    "map without rows": (
        ["train", "sac", "--env", ENV, "--memory-map", "rows"], "there is no dataset: leave it out",
    ),
    "engine": (["train", "--engine", "cuda_graph", "--device", "cpu"], "cuda_graph needs a GPU"),
    "precision": (["train", "--precision", "fp8"], "unknown precision 'fp8'"),
    "collect env": (["collect", "random", "x.npz"], "--env"),
    "collect suffix": (["collect", "random", "x.txt", "--env", ENV, "--steps", "9"], "x.txt"),
    "truncated": (["inspect", "half.hdf5"], "half.hdf5"),
    "nan in data": (["inspect", "nan.npz"], "row 3, column 1"),
    "length": (["inspect", "short.npz"], "rewards"),
    "missing": (["inspect", "missing.npz"], "rewards"),
    "action": (["inspect", "wild.npz"], "actions[2, 0]"),
    "negative limit": (["train", "bc", "--dataset", "point.npz", "--cost-limit", "-1"],
                       "number of 0 or more per episode, got -1"),
    "nan limit": (["train", "bc", "--dataset", "point.npz", "--cost-limit", "nan"],
                  "number of 0 or more per episode, got nan"),
    "no limit": (["train", "--cost-limit", "ten"], "invalid float value: 'ten': see saferl train"),
    "no option": (["evaluate", "runs/x", "--limit", "3"],
                  "unrecognized arguments: --limit 3: see saferl evaluate --help"),
    "nan limit to learn under": (
        ["train", "cpq", "--dataset", "point.npz", "--set", "cost_limit=5,nan"],
        "number of 0 or more per episode (or inf for no limit), got nan",
    ),
    "no costs": (["train", "bc", "--dataset", "costless.npz", "--cost-limit", "3"],
                 "costless.npz has no costs: attach them with Dataset.with_costs"),
    "no costs to learn from": (["train", "cpq", "--dataset", "costless.npz"], "has no costs"),
    "outside the table": (
        ["train", "discrete_bc", "--dataset", "treated.npz", "--dataset-option", "n_actions=3"],
        "actions[4] is 3: discrete actions must be whole numbers 0 … 2",
    ),
    "levels": (
        ["train", "discrete_cql", "--dataset", "treated.npz", "--set", "guardian=knn", "--set",
         "levels=2,3"],
        "levels = 2,3 make 6 actions, but the task has 4",
    ),
    "fallback alone": (["evaluate", "nowhere", "--fallback", "runs/x"], "not a run folder"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_and_status_2(case, data, tmp_path, capsys):
    good = {n: np.array(getattr(point_dataset(), n)) for n in
            ("observations", "actions", "rewards", "costs", "terminals", "timeouts")}  # fmt: skip
    bounds = {"action_low": [-2.0], "action_high": [2.0]}
    broken = {name: {k: v.copy() for k, v in good.items()} for name in ("nan", "short", "wild")}
    broken["nan"]["observations"][3, 1] = np.nan
    broken["short"]["rewards"] = broken["short"]["rewards"][:-2]
    broken["wild"]["actions"][2] = 50.0
    broken["missing"] = {k: v for k, v in good.items() if k != "rewards"}
    broken["costless"] = {k: v for k, v in good.items() if k != "costs"}
    broken["treated"] = good | {"actions": np.minimum(np.arange(len(good["rewards"])) % 5, 3)}
    broken["treated"]["actions"][:4] = 0
    for name, arrays in broken.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
    (tmp_path / "half.hdf5").write_bytes(b"\x89HDF\r\n\x1a\n" + b"\0" * 50)
    arguments, word = MISTAKES[case]
    if case == "action":
        arguments = [*arguments]
        for key, value in bounds.items():
            arguments += ["--dataset-option", f"{key}={value[0]}"]
    assert main(arguments) == 2
    captured = capsys.readouterr()
    message = captured.err.strip().splitlines()[-1]
    assert message.startswith("saferl: ") and word in message, message
    assert "Traceback" not in captured.err
    assert not (tmp_path / "runs").exists()


def test_a_limit_in_another_unit_and_a_run_to_judge(data, capsys):
    assert main(["train", "bc", "--dataset", data, *QUICK, "--cost-limit", "0.25", "90"]) == 0
    assert "the cost limit 90 can never bind: 20 steps of at most 1" in capsys.readouterr().out
    run = "runs/bc-point"
    for words, message in (
        (["--cost-limit", "nan"], "number of 0 or more per episode, got nan"),
        (["--cost-limit", "5", "-1"], "number of 0 or more per episode, got -1"),
        (["--fallback", run], "pass --guard"),
        (["--guardian", "knm"], "unknown guardian 'knm'"),
        (["--alpha", "0", "--guardian", "kde"], "between 0 and 1"),
    ):
        assert main(["evaluate", run, "--episodes", "2", *words]) == 2
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith("saferl: ") and message in last
    assert main(["evaluate", run, "--episodes", "2", "--cost-limit", "90", "--guard"]) == 0
    out = capsys.readouterr().out
    assert "the cost limit 90 binds on no logged episode" in out
    assert "guarded" in out and "interventions" in out and "OOD" in out
    assert main(["evaluate", run, "--episodes", "2", "--guardian", "none"]) == 0
    assert "OOD" not in capsys.readouterr().out
