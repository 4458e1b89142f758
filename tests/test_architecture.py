"""Imports run one way, and no file imports itself by way of others."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOMES = {"saferl": ROOT / "saferl", "saferl.agents": ROOT / "agents", "saferl.envs": ROOT / "envs",
         "saferl.configs": ROOT / "configs"}  # fmt: skip
# From the ground up: a folder imports from its own and from those before it.
LAYERS = (
    ("errors", "io", "rng", "registry", "spec"),
    ("data",),
    ("replay", "nn"),
    ("models",),
    ("safety",),
    ("rollout", "runs", "ope"),
    ("evaluation",),
    ("training",),
    ("export", "testing"),
    ("cli",),
)


def modules() -> dict[str, Path]:
    """Every module by its name; links to agents, envs and configs are not followed."""
    found = {}
    for package, folder in HOMES.items():
        for file in sorted(folder.rglob("*.py")):
            inner = file.relative_to(folder)
            if package == "saferl" and inner.parts[0] in ("agents", "envs", "configs"):
                continue
            parts = [package, *inner.with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = file
    return found


MODULES = modules()


def imports(name: str) -> Iterator[str]:
    """The modules that a file imports, anywhere in it, whether at run time or for types."""
    file = MODULES[name]
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                if full in MODULES:
                    yield full
                elif base in MODULES:
                    yield base


GRAPH = {name: sorted(set(imports(name)) - {name}) for name in MODULES}


def circles() -> list[list[str]]:
    """Groups of files each of which imports the others, by way of whichever (Tarjan)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        order[name] = low[name] = len(order)
        stack.append(name)
        for other in GRAPH[name]:
            if other not in order:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], order[other])
        if low[name] == order[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                found.append(sorted(group))

    for name in GRAPH:
        if name not in order:
            visit(name)
    return found


def test_no_circle():
    assert circles() == []


def layer(name: str) -> int:
    """The place of a module of the core in `LAYERS`."""
    part = name.split(".")[1]
    return next(i for i, names in enumerate(LAYERS) if part in names)


CORE = [name for name in MODULES if not name.startswith(tuple(f"{h}." for h in HOMES if "." in h))
        and name not in HOMES]  # fmt: skip


@pytest.mark.parametrize("name", CORE)
def test_imports_go_downwards(name):
    for other in GRAPH[name]:
        assert other not in ("saferl.agents", "saferl.envs", "saferl.configs"), (
            f"{name} names {other}: the core finds agents and environments in the registry"
        )
        if other != "saferl":
            assert not other.startswith(("saferl.agents.", "saferl.envs.")), (name, other)
            assert layer(other) <= layer(name), f"{name} imports {other}, which stands above it"


def test_folders_of_one_layer_do_not_know_each_other():
    for name in CORE:
        for other in GRAPH[name]:
            if other == "saferl" or layer(other) != layer(name) or layer(name) == 0:
                continue
            assert other.split(".")[1] == name.split(".")[1], (name, other)


def test_environments_do_not_know_agents_nor_agents_environments():
    for name, others in GRAPH.items():
        for mine, theirs in (("saferl.agents", "saferl.envs"), ("saferl.envs", "saferl.agents")):
            if name.startswith(mine):
                assert not any(other.startswith(theirs) for other in others), (name, others)


def test_a_circle_is_found(monkeypatch):
    monkeypatch.setitem(GRAPH, "saferl.errors", ["saferl.io"])
    assert ["saferl.errors", "saferl.io"] in circles()
