"""`evaluate_run`: what is counted, guarded, predicted and exact, and what the folder then says."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch

import saferl
from saferl.errors import SaferlError
from saferl.evaluation import Evaluation, write_report
from saferl.evaluation.results import Known, RunResults
from saferl.runs.folder import RunFolder
from saferl.safety.guardians.fitting import fit_guardian, guardian_for, split
from saferl.training.train import resume
from tests.conftest import point_dataset

from .test_train import ENV, quick


def quietly(run, **options):
    options = {"env": ENV, "episodes": 4, "device": "cpu", "progress": False} | options
    return saferl.evaluate_run(run, **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return quick(point_dataset(40), tmp_path_factory.mktemp("runs") / "run", env=ENV, steps=20).path


def test_a_guardian_of_the_data_counts_unsupported_steps(run):
    dataset = point_dataset(40)
    lines: list[str] = []
    found = quietly(run, dataset=dataset, alpha=0.2, cost_limits=[3.0, 7.0], say=lines.append)
    assert lines[0].startswith("guardian: KNN of 640 rows, alpha 0.2 by 8 episodes")
    assert found.known.guardian == "KNN of 640 rows of point, alpha 0.2"
    assert found.limits == [3.0, 7.0] == RunResults.read(run).limits
    guardian = guardian_for("knn", dataset)
    fit_guardian(guardian, *split(dataset, 0.2), 0.2, lines.append)
    policy = saferl.load_agent(run).policy()
    seen: list[np.ndarray] = [[], []]

    class Watched:
        members = 2

        def __call__(self, observations):
            actions = policy(observations)
            for m in range(2):
                seen[m].append(guardian.is_ood(observations[m], actions[m].clamp(-2, 2)).numpy())
            return actions

    # All episodes last 20 steps, so no dummy observation of a finished one is counted here.
    again = saferl.evaluate(Watched(), ENV, 4, seed=20_000)
    assert (again.lengths == 20).all()
    counted = found.evaluation.at().matrix("ood")
    assert counted.sum(1).tolist() == [np.sum(flags) for flags in seen]
    row = found.table[0]
    assert row["ood_rate"] == pytest.approx(counted.sum() / 160) and row["replaced_rate"] is None
    assert "OOD" in found.text() and "interventions" not in found.text()


def test_a_guard_is_played_beside_the_policies_as_they_are(run, tmp_path):
    dataset = point_dataset(40)
    found = quietly(run, dataset=dataset, guard=True, alpha=0.2, say=lambda line: None)
    assert [guard.name for guard in found.known.guards] == ["guarded"]
    bare, guarded = found.evaluation.at(), found.guarded[0]
    assert bare.replaced is None and guarded.matrix("replaced").shape == (2, 4)
    assert (guarded.matrix("ood") <= guarded.matrix("lengths")).all()
    # A guard with the best supported action as its fallback leaves the data no more often.
    assert guarded.ood.sum() <= bare.ood.sum()
    assert {row["group"] for row in found.table} == {"bare", "guarded"}
    assert "interventions" in found.text()

    careful = quick(point_dataset(40), tmp_path / "careful", env=ENV, steps=10, agent="bc").path
    found = quietly(
        run, guardian="none", guard=True, fallback=careful, cost_limits=[0.0, 1e6], say=print
    )
    none, plenty = found.guarded
    assert [g.limit for g in found.known.guards] == [0, 1e6]
    assert (none.replaced == none.lengths).all()  # nothing may be spent: the fallback acts
    assert (plenty.replaced == 0).all()
    np.testing.assert_array_equal(plenty.returns, found.evaluation.at().returns)
    clone = saferl.evaluate(saferl.load_agent(careful).policy(), ENV, 4, seed=20_000)
    np.testing.assert_allclose(none.returns, clone.returns, rtol=1e-5)
    rows = [row for row in found.table if row["member"] is None]
    assert [(row["group"], row["limit"]) for row in rows] == [
        ("bare", 0), ("bare", 1e6), ("guarded, limit 0", 0), ("guarded, limit 1e+06", 1e6)
    ]  # fmt: skip
    files = {file.name for file in run.glob("guarded*")}
    assert files == {"guarded-limit-0.csv", "guarded-limit-1e+06.csv"}
    page = write_report(run).read_text()
    assert "guarded, limit 0" in page and "Return-cost frontier" in page
    assert quietly(run, guardian="none").guarded == [] and not list(run.glob("guarded*"))


def test_members_under_limits_of_their_own_are_guarded_by_them(tmp_path):
    dataset = point_dataset(20)
    settings = {"cost_limit": [0.0, 5.0], "batch_size": 16, "hidden": [8], "vae_hidden": [8]}
    mine = quick(dataset, tmp_path / "cpq", "cpq", env=ENV, members=1, steps=5, settings=settings)
    found = quietly(mine.path, guardian="none", guard=True, fallback=mine.path)
    assert [guard.limit for guard in found.known.guards] == [None]
    first, second = found.guarded[0].matrix("replaced")
    assert (first == 0).all() and (second == 0).all()  # by themselves: the fallback is the policy
    groups = {(row["group"], row["limit"]) for row in found.table}
    assert groups == {
        ("cost_limit=0", 0), ("cost_limit=5", 5),
        ("cost_limit=0, guarded", 0), ("cost_limit=5, guarded", 5),
    }  # fmt: skip


def test_what_a_model_predicts_stands_beside_what_was_measured(tmp_path):
    dataset = point_dataset(20)
    settings = {"hidden": [8], "episodes": 4, "horizon": 5, "cost_limit": 4.0, "margin_models": 0,
                "clone_updates": 0, "critic_updates": 1}  # fmt: skip
    trained = quick(dataset, tmp_path / "ogsrl", "ogsrl", env=ENV, steps=2, settings=settings)
    agent = saferl.load_agent(trained.path)
    returns, costs = agent.predict(6)
    assert returns.shape == costs.shape == (2, 6)
    found = quietly(trained.path, episodes=6)
    assert found.known.values["predicted_return"] == returns.mean(1).tolist()
    row = found.table[0]
    assert row["predicted_cost"] == pytest.approx(float(costs.mean()))
    assert found.known.guardian.startswith("the agent's own (KNN, alpha ")
    text = found.text()
    assert "predicted − measured" in text and "promises too much" in text
    state = {key: tensor.clone() for key, tensor in agent.state_dict().items()}
    agent.predict(2)
    assert all(torch.equal(state[key], tensor) for key, tensor in agent.state_dict().items())
    assert "predicted − measured" in write_report(trained.path).read_text()


def test_values_of_another_step_are_not_shown(run):
    quietly(run, guardian="none")
    assert Known.read(run).step == 20 and RunResults.read(run).known is not None
    later = Evaluation.read(run / "evaluation.csv")
    since = saferl.evaluate(lambda o: 0 * o[..., :1], ENV, 2, step=30)
    more = Evaluation.concatenate([later, since])
    before = (run / "evaluation.csv").read_bytes()
    more.write(run / "evaluation.csv")
    assert RunResults.read(run).known is None
    (run / "evaluation.csv").write_bytes(before)
    (run / "evaluation.json").write_text("{")
    with pytest.raises(SaferlError, match=r"evaluation\.json cannot be read"):
        RunResults.read(run)
    (run / "evaluation.json").unlink()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"cost_limits": [float("nan")]}, "cost limit is a number of 0 or more"),
        ({"cost_limits": [-1.0]}, "cost limit is a number of 0 or more"),
        ({"fallback": "elsewhere"}, "under a guard only"),
        ({"guard": True, "guardian": "none"}, "nothing to guard by"),
        ({"guardian": "knm"}, "Python object as dataset"),
        ({"guardian": "knm", "dataset": True}, "'knn'"),
        ({"guardian": "kde", "dataset": True, "alpha": 1.5}, "between 0 and 1"),
        ({"dataset": point_dataset(3, seed=9), "guardian": "knn"}, "other data than"),
        ({"episodes": 0}, "1 or more"),
    ],
)
def test_mistakes_are_one_line(run, options, message):
    if options.get("dataset") is True:
        options = options | {"dataset": point_dataset(40)}
    before = {file.name for file in run.iterdir()}
    with pytest.raises(SaferlError, match=message) as error:
        quietly(run, **options)
    assert "\n" not in str(error.value)
    assert {file.name for file in run.iterdir()} == before


def test_no_data_for_a_guardian_is_said_and_nothing_is_counted(run):
    lines: list[str] = []
    found = quietly(run, say=lines.append)
    assert len(lines) == 1 and lines[0].startswith("no OOD rate: the run was started with a Python")
    assert found.evaluation.at().ood is None or np.isnan(found.evaluation.at().ood).all()


def test_a_checkpoint_of_another_version_is_told(run, tmp_path):
    copy = tmp_path / "old"
    shutil.copytree(run, copy)
    folder = RunFolder(copy)
    state, header = folder.load()
    state = {key: value for key, value in state.items() if "actor" not in key}
    folder.save(header.pop("step"), state, header)
    with pytest.raises(SaferlError, match="does not fit this version's td3_bc") as error:
        quietly(copy)
    assert "\n" not in str(error.value)
    with pytest.raises(SaferlError, match="does not fit this version's td3_bc"):
        resume(copy, dataset=point_dataset(40), steps=30, progress=False)
