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


def test_links_lead_to_the_folders():
    """Type checkers and editors find `saferl.agents` in a checkout by these."""
    for name in ("agents", "envs", "configs"):
        link = ROOT / "saferl" / name
        assert link.is_symlink() and os.readlink(link) == f"../{name}"


def type_check(site: Path | None, tmp_path: Path, script: str) -> str:
    """What mypy says of a script in a neutral folder, saferl being in a site folder."""
    (tmp_path / "script.py").write_text(script)
    path = {"MYPYPATH": str(site)} if site else {}
    result = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", os.devnull, "--ignore-missing-imports",
         "--cache-dir", os.devnull, "--follow-imports", "silent", "script.py"],
        cwd=tmp_path, env=os.environ | path, capture_output=True, text=True,
    )  # fmt: skip
    return result.stdout + result.stderr


CONSUMER = (ROOT / "tests" / "typing" / "consumer.py").read_text()


@pytest.mark.slow
def test_a_typed_project_is_checked_against_the_editable_install(tmp_path):
    assert "Success" in type_check(None, tmp_path, CONSUMER)
    wrong = CONSUMER.replace("agent.config.alpha", "agent.config.alpa")
    assert 'has no attribute "alpa"' in type_check(None, tmp_path, wrong)


@pytest.mark.slow
def test_a_checkout_without_links_still_installs(tmp_path):
    """As on a file system that has none: a link is then a small text file."""
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True,
                           text=True).stdout.split()  # fmt: skip
    copy = tmp_path / "checkout"
    for name in files:
        source, target = ROOT / name, copy / name
        if not name.startswith(
            ("saferl", "agents", "envs", "configs", "pyproject", "README", "LICENSE")
        ) or not (source.exists() or source.is_symlink()):
            continue  # fmt: skip
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            target.write_text(os.readlink(source))
        else:
            target.write_bytes(source.read_bytes())
    site = tmp_path / "site"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index",
                    "--no-build-isolation", "--target", str(site), str(copy)],
                   check=True, capture_output=True)  # fmt: skip
    code = "import saferl.agents.td3_bc, saferl.envs, saferl; print(saferl.agents.__file__)"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert str(site) in python(code, elsewhere, PYTHONPATH=str(site))


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
    typed = tmp_path / "typed"
    typed.mkdir()
    assert "Success" in type_check(site, typed, CONSUMER)
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
