"""Python examples of README.md and docs/ run as they are printed; links lead somewhere."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

import saferl
from saferl.data import save_dataset
from saferl.envs import dmc
from tests.replay.test_frames import make as frames

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "benchmarks/README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
EXAMPLES = {
    str(page.relative_to(ROOT)): blocks
    for page in PAGES
    if page.is_file()
    and (blocks := BLOCK.findall(page.read_text()))
    and page.parent.name != "extend"  # whole files: tests/test_extend.py has them
}
README = EXAMPLES["README.md"]
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)]*))?\)")


@pytest.fixture
def workplace(request, tmp_path, monkeypatch):
    """A folder of its own, and fewer generated rows, updates and episodes than are printed."""
    monkeypatch.chdir(tmp_path)
    page = request.node.callspec.params.get("page")
    caps = {"size": {None: 10_000, "docs/guardians.md": 20_000}.get(page, 3_000), "episodes": 200}
    whole, train, evaluate = saferl.data.load_dataset, saferl.train, saferl.evaluate

    def smaller(name, **options):
        if str(name).startswith("saferl/"):
            most = "episodes" if "icu" in str(name) else "size"
            options[most] = min(options.get(most, caps[most]), caps[most])
        return whole(name, **options)

    def shorter(*args, steps, **options):
        return train(*args, steps=min(steps, 300), **{"eval_episodes": 1} | options)

    def fewer(*args, episodes, **options):
        return evaluate(*args, episodes=min(episodes, 2), **options)

    for module in (saferl, saferl.data):
        monkeypatch.setattr(module, "load_dataset", smaller)
    monkeypatch.setattr(saferl, "train", shorter)
    monkeypatch.setattr(saferl, "evaluate", fewer)
    return tmp_path


@pytest.mark.parametrize("number", range(len(README)))
def test_example_of_the_readme(number, workplace, capsys):
    """Each by itself."""
    exec(compile(README[number], f"README example {number}", "exec"), {"__name__": "example"})
    assert list(workplace.glob("runs/*/config.yaml"))


def test_the_readme_has_four():
    assert len(README) == 4


def a_run_of_caps(monkeypatch) -> None:
    data = saferl.load_dataset("saferl/hopper-velocity-mixed-v0", size=2000)
    small = {"hidden": [8, 8], "batch_size": 16}
    saferl.train("caps", data, steps=20, members=3, eval_interval=0, settings=small)


def pixels(monkeypatch) -> None:
    """Files of the layout that the page names, and no rendering."""
    for home in (Path(), Path(os.environ["SAFERL_DATA_DIR"]) / "vd4rl/main"):
        save_dataset(frames(), home / "walker_walk/expert/64px")
    monkeypatch.setattr(dmc, "record", lambda env, episodes, policy=None: frames())


FOUND = {"docs/agents/caps.md": a_run_of_caps, "docs/environments.md": pixels}
"""What a page takes for granted."""


@pytest.mark.parametrize("page", [page for page in EXAMPLES if page != "README.md"])
def test_examples_of_a_page(page, workplace, monkeypatch, capsys):
    """One after the other, as a reader types them."""
    FOUND.get(page, lambda monkeypatch: None)(monkeypatch)
    told = {"__name__": "example"}
    for number, block in enumerate(EXAMPLES[page]):
        exec(compile(block, f"{page} example {number}", "exec"), told)


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for file, anchor in LINK.findall(page.read_text()):
        if file.startswith("http"):
            continue
        target = page.parent / file if file else page
        assert target.exists(), f"{file} is not there"
        if anchor:
            assert anchor in anchors(target), f"{file} has no heading for #{anchor}"


def test_every_page_is_linked_to():
    linked = {
        (page.parent / file).resolve()
        for page in PAGES
        for file, _ in LINK.findall(page.read_text())
        if file and not file.startswith("http")
    }
    assert not {page for page in PAGES if page.name != "README.md"} - linked
