"""Run folders of format 1, kept from before, are read, evaluated and continued."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import saferl
from saferl.evaluation.results import RunResults
from saferl.runs.folder import RunFolder
from tests.conftest import PointEnv, point_dataset

KEPT = Path(__file__).parent / "format_1"


@pytest.fixture
def folder(tmp_path):
    def copy(name: str) -> Path:
        return Path(shutil.copytree(KEPT / name, tmp_path / name))

    return copy


def test_members_come_from_their_values(folder):
    """Two limits were printed alike: values tell them apart."""
    run = folder("bc_safe")
    config = RunFolder(run).config()
    assert config.seeds == [0, 1, 0, 1]
    limits = [member.values["cost_limit"] for member in config.who]
    assert limits == [5.0, 5.0, 1000001.0, 1000001.0]
    assert config.settings["hidden"] == [4]
    rows = [row for row in RunResults.read(run).table if row["member"] is None]
    assert [row["limit"] for row in rows] == [5.0, 1000001.0]


def test_a_member_that_was_split_off_keeps_its_limit(folder):
    config = RunFolder(folder("bc_safe-member")).config()
    assert [(m.seed, dict(m.values)) for m in config.who] == [(1, {"cost_limit": 5.0})]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("bc_safe", {}),
        ("bc_safe-member", {}),
        ("sac", {"env": PointEnv}),
        ("ogsrl", {}),
    ],
)
def test_a_run_goes_on(folder, name, options):
    run = folder(name)
    before, header = RunFolder(run).load()
    longer = saferl.resume(
        run, dataset=point_dataset(), steps=header["step"] + 2, device="cpu", progress=False,
        **options,
    )  # fmt: skip
    assert RunFolder(longer.path).steps()[-1] == header["step"] + 2
    assert "format: 2" in (run / "config.yaml").read_text()
    after, _ = RunFolder(run).load()
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[key], after[key]) for key in before)


def test_an_agent_of_before_is_loaded(folder):
    agent = saferl.load_agent(folder("ogsrl"))
    rows = torch.zeros(1, 3, 2)
    assert agent.policy()(rows).shape == (1, 3, 1)
