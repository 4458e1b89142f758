"""The loop: what a run leaves behind, resume to the bit, and every way it can go wrong."""

from __future__ import annotations

import csv
import dataclasses
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import saferl
from saferl.cli import main
from saferl.data import save_dataset
from saferl.errors import SaferlError
from saferl.registry import agent_class
from saferl.runs.config import groups_of
from saferl.runs.folder import RunFolder
from saferl.training.loop import Loop
from tests.conftest import PointEnv, point_dataset

ROOT = Path(__file__).parents[2]
ENV = "tests.conftest:PointTest-v0"  # module:id also works in another process
TINY = {"hidden": [8], "batch_size": 16}


def quick(data, out, agent="td3_bc", **options):
    options = {"steps": 60, "members": 2, "settings": TINY, "eval_episodes": 2, "progress": False,
               "device": "cpu"} | options  # fmt: skip
    return saferl.train(agent, data, out=out, **options)


def metrics(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def same_checkpoints(a: Path, b: Path) -> None:
    (left, _), (right, _) = RunFolder(a).load(), RunFolder(b).load()
    assert left.keys() == right.keys()
    for key in left:
        assert torch.equal(left[key], right[key]), key
    for name in ("metrics.csv", "evaluation.csv"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name


def test_a_run_folder_holds_everything(point, tmp_path):
    run = quick(point, tmp_path / "run", cost_limits=[3.0], settings=TINY | {"alpha": [1.0, 5.0]})
    folder = RunFolder(run.path)
    config = folder.config()
    assert config.names == ["alpha=1 seed=0", "alpha=1 seed=1", "alpha=5 seed=0", "alpha=5 seed=1"]
    assert config.agent_settings["alpha"] == [1.0, 1.0, 5.0, 5.0]
    assert folder.card()["fingerprint"] == point.fingerprint
    assert folder.steps() == [48, 60]
    rows = metrics(run.path)
    assert {int(row["member"]) for row in rows} == {0, 1, 2, 3}
    assert int(rows[-1]["step"]) == 60 and float(rows[-1]["critic_loss"]) > 0
    assert list(run.path.glob("events.out.tfevents.*"))
    evaluated = saferl.evaluation.Evaluation.read(run.path / "evaluation.csv")
    assert sorted(set(evaluated.steps.tolist())) == [12, 24, 36, 48, 60]
    assert evaluated.at().matrix("costs").shape == (4, 2)
    assert not list(run.path.rglob("*.tmp"))


def test_training_is_reproducible_and_loads_back(point, tmp_path):
    a, b = quick(point, tmp_path / "a"), quick(point, tmp_path / "b")
    same_checkpoints(a.path, b.path)
    observations = torch.tensor(point.observations[:5]).expand(2, -1, -1)
    loaded = saferl.load_agent(a.path).policy()
    assert torch.equal(loaded(observations), a.policy()(observations))


@pytest.mark.parametrize("agent", ["td3_bc", "iql"])
def test_resumed_equals_unbroken_after_kill_9(point, tmp_path, agent):
    data = tmp_path / "point.npz"
    save_dataset(point, data)
    command = ["train", agent, "--dataset", str(data), "--env", ENV,
               "--steps", "300", "--members", "2", "--set", "hidden=8", "--set", "batch_size=16",
               "--eval-episodes", "2", "--device", "cpu", "--threads", "1",
               "--log-interval", "7", "--checkpoint-interval", "40"]  # fmt: skip
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert main([*command, "--out", str(whole)]) == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "saferl.cli", *command, "--out", str(broken)],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    folder, deadline = RunFolder(broken), time.monotonic() + 60
    while not (folder.steps() and folder.steps()[-1] >= 80):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert folder.steps()[-1] < 300  # it was killed in the middle
    saferl.resume(broken, device="cpu", progress=False)
    same_checkpoints(whole, broken)


def test_interrupt_writes_a_checkpoint_and_resumes(point, tmp_path, monkeypatch, capsys):
    whole = quick(point, tmp_path / "whole", env=ENV)
    original = Loop._due

    def interrupt(loop, event):
        if event == "log" and loop.step == 25:
            os.kill(os.getpid(), signal.SIGINT)
        return original(loop, event)

    monkeypatch.setattr(Loop, "_due", interrupt)
    with pytest.raises(KeyboardInterrupt):
        quick(point, tmp_path / "broken", env=ENV, progress=True)
    monkeypatch.setattr(Loop, "_due", original)
    assert f"--resume {tmp_path / 'broken'}" in capsys.readouterr().out
    assert RunFolder(tmp_path / "broken").steps() == [24, 25]
    saferl.resume(tmp_path / "broken", dataset=point, device="cpu", progress=False)
    same_checkpoints(whole.path, tmp_path / "broken")


def test_a_full_disk_leaves_the_earlier_checkpoint(point, tmp_path, monkeypatch):
    import safetensors.torch

    save_file, calls = safetensors.torch.save_file, []

    def full(tensors, filename, metadata=None):
        calls.append(filename)
        if len(calls) == 3:
            Path(filename).write_bytes(b"half a checkpoint")
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, filename, metadata)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(SaferlError, match="disk is full.*--resume"):
        quick(point, tmp_path / "run", env=ENV)
    monkeypatch.undo()
    assert RunFolder(tmp_path / "run").steps() == [12, 24]
    assert not [f for f in (tmp_path / "run").rglob("*") if f.name.endswith(".tmp")]
    saferl.resume(tmp_path / "run", dataset=point, device="cpu", progress=False)
    same_checkpoints(quick(point, tmp_path / "whole", env=ENV).path, tmp_path / "run")


def test_a_damaged_checkpoint_falls_back_to_the_one_before(point, tmp_path):
    run = quick(point, tmp_path / "run")
    folder = RunFolder(run.path)
    last = folder.checkpoints / "step-000000060.safetensors"
    last.write_bytes(last.read_bytes()[:200])
    assert folder.load()[1]["step"] == 48
    (folder.checkpoints / "step-000000048.safetensors").write_bytes(b"")
    with pytest.raises(SaferlError, match="no checkpoint in .* can be read"):
        folder.load()


def test_as_many_checkpoints_stay_as_asked_for(point, tmp_path):
    run = quick(point, tmp_path / "run", keep_checkpoints=3)
    assert RunFolder(run.path).steps() == [36, 48, 60]
    saferl.resume(run.path, dataset=point, steps=80, device="cpu", progress=False)
    assert RunFolder(run.path).steps() == [60, 72, 80]
    assert saferl.load_agent(run.path, 72).updates == 72
    with pytest.raises(SaferlError, match="keep_checkpoints must be 1 or more, got 0"):
        quick(point, tmp_path / "none", keep_checkpoints=0)


def test_steps_may_grow(point, tmp_path):
    long = quick(point, tmp_path / "long", log_interval=5, eval_interval=20)
    short = quick(point, tmp_path / "short", steps=40, log_interval=5, eval_interval=20)
    saferl.resume(short.path, dataset=point, steps=60, device="cpu", progress=False)
    same_checkpoints(long.path, short.path)
    with pytest.raises(SaferlError, match="may grow, not shrink"):
        saferl.resume(short.path, dataset=point, steps=10, device="cpu")


def test_resume_refuses_other_data_and_other_configuration(point, tmp_path):
    run = quick(point, tmp_path / "run")
    with pytest.raises(SaferlError, match="Python object as dataset"):
        saferl.resume(run.path)
    with pytest.raises(SaferlError, match="other data"):
        saferl.resume(run.path, dataset=point_dataset(seed=1))
    folder = RunFolder(run.path)
    config = folder.config()
    folder.write_config(config.replace(settings=config.settings | {"alpha": 7.0}))
    with pytest.raises(SaferlError, match="another settings"):
        saferl.resume(run.path, dataset=point)


def test_online_training_learns_resumes_and_logs(tmp_path):
    options = {"env": ENV, "steps": 120, "settings": TINY | {"random_steps": 20}}
    run = quick(None, tmp_path / "run", "sac", **options)
    rows = metrics(run.path)
    assert any(row["train_return"] for row in rows)
    state, _ = RunFolder(run.path).load()
    assert state["engine.buffer.online.rows"].shape[:2] == (2, 120)  # members own their data
    longer = saferl.resume(run.path, steps=140, device="cpu", progress=False)
    assert longer.agent.updates == 120  # one per step after the 20 random ones


def test_custom_environment_and_dataset_objects(tmp_path):
    data = point_dataset(env_id=None)
    run = quick(data, tmp_path / "run", env=PointEnv)
    assert run.evaluation is not None and RunFolder(run.path).config().env == "a Python object"
    without = quick(data, tmp_path / "without")
    assert without.evaluation is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be 1 or more"),
        ({"members": 0}, "members must be 1 or more"),
        ({"eval_interval": -1}, "eval_interval must be 0 or more"),
        ({"cost_limits": [-1.0]}, "cost limit"),
        ({"cost_limits": [float("nan")]}, "cost limit"),
        ({"agent": "td3bc"}, "did you mean 'td3_bc'"),
        ({"agent": "discrete_cql"}, "is for discrete actions"),
        ({"settings": {"alhpa": 1}}, "did you mean 'alpha'"),
        ({"settings": {"alpha": "big"}}, "is not a number"),
        ({"settings": {"batch_size": 2.5}}, "is not a whole number"),
        ({"settings": {"hidden": [8], "tau": [0.1, 0.2]}}, "cannot differ between members"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used"),
        ({"env": "NoSuch-v0"}, "NoSuch"),
        ({"env": "CartPole-v1"}, "CartPole-v1 has observations of 4 numbers"),
    ],
)
def test_bad_input_is_one_line(point, tmp_path, options, message):
    with pytest.raises(SaferlError, match=message) as caught:
        quick(point, tmp_path / "run", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()  # nothing half made is left behind


def test_a_cost_limit_needs_costs(point, tmp_path):
    arrays = {n: getattr(point, n) for n in point.FIELDS if n != "costs"}
    with pytest.raises(SaferlError, match="with_costs"):
        quick(type(point)(**arrays, card=point.card), tmp_path / "run", cost_limits=[1.0])


def test_an_agent_under_a_limit_is_trained_for_what_it_is_judged_by(point, tmp_path, capsys):
    settings = {"hidden": [8], "critic_hidden": [8], "value_hidden": [8], "vae_hidden": [8]}
    run = quick(point, tmp_path / "a", "a2pr", cost_limits=[3.0, 9.0], settings=settings, members=1)
    config = RunFolder(run.path).config()
    assert config.agent_settings["cost_limit"] == [3.0, 9.0]
    assert config.names == ["cost_limit=3 seed=0", "cost_limit=9 seed=0"]
    table = run.evaluation.table([3.0, 9.0], groups=groups_of(config.who))
    assert [(r["group"], r["limit"]) for r in table if r["member"] is None] == [
        ("cost_limit=3", 3.0), ("cost_limit=9", 9.0),
    ]  # fmt: skip
    # The other way round: what is trained for is judged.
    run = quick(point, tmp_path / "b", "a2pr", settings=settings | {"cost_limit": 3}, members=1)
    assert RunFolder(run.path).config().cost_limits == (3.0,)
    # Its default is a limit like any other.
    run = quick(point, tmp_path / "d", "bc_safe", settings={"hidden": [8]}, members=1)
    config = RunFolder(run.path).config()
    assert config.cost_limits == (config.settings["cost_limit"],) == (10.0,)
    # An agent that knows no limits is judged all the same.
    capsys.readouterr()
    quick(point, tmp_path / "c", cost_limits=[1e6], members=1, progress=True)
    assert "warning: the cost limit 1e+06 can never bind" in capsys.readouterr().out


@pytest.mark.parametrize("agent", ["a2pr", "bc_safe", "cpq"])
def test_one_run_trains_members_for_four_limits_at_once(point, tmp_path, agent):
    names = {field.name for field in dataclasses.fields(agent_class(agent).Config)}
    networks = ("hidden", "critic_hidden", "value_hidden", "vae_hidden")
    settings = {name: [8] for name in networks if name in names} | {"batch_size": 16}
    limits = [5.0, 10.0, 20.0, 40.0]
    run = quick(point, tmp_path / agent, agent, cost_limits=limits, settings=settings, members=2)
    config = RunFolder(run.path).config()
    assert config.agent_settings["cost_limit"] == [x for x in limits for _ in range(2)]
    assert config.names == [f"cost_limit={x:g} seed={s}" for x in limits for s in (0, 1)]
    table = run.evaluation.table(config.cost_limits, groups=groups_of(config.who))
    together = [(r["group"], r["limit"], r["members"]) for r in table if r["member"] is None]
    assert together == [(f"cost_limit={x:g}", x, 2) for x in limits]
    assert run.policy().members == 8


def test_a_used_folder_is_not_overwritten(point, tmp_path):
    quick(point, tmp_path / "run")
    with pytest.raises(SaferlError, match="holds a run already"):
        quick("nowhere.npz", tmp_path / "run")  # said before the data are looked at


def test_divergence_is_told(point, tmp_path):
    with np.errstate(all="ignore"), pytest.raises(SaferlError, match="is not finite at step"):
        quick(point, tmp_path / "run", settings=TINY | {"critic_lr": 1e30}, steps=200, env=ENV)
