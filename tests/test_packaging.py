"""What is installed is what lies in the folders, and imports stay as light as is said."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def python(code: str, cwd: Path = ROOT, **environment: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True,
                            env=os.environ | environment)  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_package_is_listed():
    folders = {"saferl": "saferl", "agents": "saferl.agents", "envs": "saferl.envs",
               "configs": "saferl.configs"}  # fmt: skip
    found = set()
    for folder, package in folders.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            parts = init.parent.relative_to(ROOT / folder).parts
            found.add(".".join([package, *parts]))
    assert found == set(PROJECT["tool"]["setuptools"]["packages"])


def test_constraints_lie_in_the_declared_ranges():
    from packaging.requirements import Requirement

    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    extras = PROJECT["project"]["optional-dependencies"]
    for line in [
        *PROJECT["project"]["dependencies"],
        *extras["mazes"],
        *extras["dmc"],
        *extras["test"],
    ]:
        requirement = Requirement(line)
        if requirement.name in pins:
            assert requirement.specifier.contains(pins[requirement.name]), line


def test_import_is_light():
    heavy = "{'torch', 'gymnasium', 'mujoco', 'matplotlib', 'pandas', 'h5py', 'minari'}"
    assert python(f"import sys, saferl; print({heavy} & set(sys.modules))").strip() == "set()"
    code = (
        "import sys, contextlib, saferl.cli\n"
        "with contextlib.suppress(SystemExit): saferl.cli.main(['--help'])\n"
        f"print({heavy} & set(sys.modules))"
    )
    assert python(code).strip().endswith("set()")


def test_the_library_loads_no_simulator():
    code = "import sys, saferl; saferl.train, saferl.load_dataset, saferl.make_agent; " \
           "print({'mujoco', 'matplotlib', 'minari'} & set(sys.modules))"  # fmt: skip
    assert python(code).strip() == "set()"


def test_the_core_never_names_agents_or_environments():
    pattern = re.compile(r"^\s*(from|import) +saferl\.(agents|envs)\b", re.MULTILINE)
    offenders = [f.name for f in (ROOT / "saferl").rglob("*.py") if pattern.search(f.read_text())]
    assert offenders == []


@pytest.mark.slow
def test_wheel_and_sdist_work_from_another_folder(tmp_path):
    """Both build; the sdist holds what the wheel needs; the wheel's code trains from elsewhere."""
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), "."]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    assert len(list(tmp_path.glob("saferl-*.tar.gz"))) == 1
    (wheel,) = tmp_path.glob("saferl-*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
        held = archive.namelist()
    for needed in ("saferl/py.typed", "saferl/agents/td3_bc.py", "saferl/configs/cql.yaml",
                   "saferl/envs/behaviours/hopper.safetensors"):  # fmt: skip
        assert needed in held
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    code = (
        "import saferl, saferl.agents, sys; assert saferl.__file__.startswith(sys.argv[1])\n"
        "assert saferl.agents.__file__.startswith(sys.argv[1])\n"
        "from saferl.cli import main\n"
        "sys.exit(main(['train', 'bc', '--dataset', 'saferl/hopper-velocity-random-v0',"
        "'--dataset-option', 'size=2000', '--steps', '20', '--eval-episodes', '1']))"
    )
    subprocess.run([sys.executable, "-c", code, str(site)], cwd=elsewhere, check=True,
                   env=os.environ | {"PYTHONPATH": str(site)})  # fmt: skip
    assert list(elsewhere.glob("runs/*/checkpoints/*.safetensors"))
