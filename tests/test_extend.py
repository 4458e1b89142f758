"""A stranger's package, written from the pages of docs/extend alone, passes `saferl check`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "docs" / "extend" / "example"


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> dict[str, str]:
    """An environment in which the package is installed, beside saferl."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for file in ("pyproject.toml", *(f"saferl_example/{n}.py" for n in
                 ("__init__", "agent", "environment", "dataset"))):  # fmt: skip
        (source / file).parent.mkdir(exist_ok=True)
        (source / file).write_text((EXAMPLE / file).read_text())
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation",
         "--no-index", "--disable-pip-version-check", "--target", str(target), str(source)],
        check=True, capture_output=True,
    )  # fmt: skip
    return os.environ | {"PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"}


def saferl(installed, *words: str, cwd=None) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "saferl.cli", *words], env=installed, cwd=cwd, capture_output=True,
        text=True,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["weighted_bc", "example/Tank-v0", "tank/careful"])
def test_the_examples_pass_every_check(installed, name):
    found = saferl(installed, "check", name)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "checks passed" in found.stdout and "FAILED" not in found.stdout


def test_they_work_together(installed, tmp_path):
    found = saferl(
        installed, "train", "weighted_bc", "--dataset", "tank/careless", "--steps", "20",
        "--members", "1", "--set", "hidden=8", "--set", "beta=0,1", "--cost-limit", "10",
        "--eval-episodes", "1", "--device", "cpu", cwd=tmp_path,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert "beta=1" in found.stdout and "run folder: runs/weighted_bc-careless" in found.stdout


@pytest.mark.parametrize("page", ["agent", "environment", "dataset"])
def test_pages_show_the_package(page):
    text = (ROOT / "docs" / "extend" / f"{page}.md").read_text()
    assert (EXAMPLE / "saferl_example" / f"{page}.py").read_text().rstrip() in text
    if page == "agent":
        assert (EXAMPLE / "pyproject.toml").read_text().rstrip() in text


def test_a_check_that_fails_says_what_to_do(capsys):
    import gymnasium

    from saferl.cli import main
    from tests.conftest import PointEnv

    if "broken/Point-v0" not in gymnasium.registry:
        gymnasium.register("broken/Point-v0", entry_point=PointEnv)  # nothing limits an episode
    assert main(["check", "broken/Point-v0"]) == 2
    out, error = capsys.readouterr()
    assert "FAILED  its episodes end" in out and "max_episode_steps" in out
    assert error.count("\n") == 1 and "checks failed" in error
