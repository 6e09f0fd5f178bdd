"""Imports point one way, and each outside system enters in one place."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

LAYERS = {
    "web": {"workers", "tasks", "storage", "inference"},
    "workers": {"tasks", "storage", "inference"},
    "tasks": {"storage", "inference"},
    "storage": set(),
    "inference": set(),
}
LEAVES = {"config", "errors"}
ENTRANCES = {
    "grpc": {"inference"},
    "tritonclient": {"inference"},
    "sqlalchemy": {"storage"},
    "alembic": {"storage"},
    "redis": {"storage/redis_state.py"},
    "minio": {"storage/s3.py"},
    "flask": {"web"},
    "flask_smorest": {"web"},
    "celery": {"workers", "tasks"},
    "gevent": {"web/gunicorn.py", "web/draining.py", "web/bodies.py", "web/offload.py"},
}


def imports(path: Path) -> Iterator[str]:
    """The top-level names a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


def sources(root: Path) -> Iterator[Path]:
    for package in LAYERS:
        yield from (root / package).rglob("*.py")


@pytest.mark.parametrize("package", LAYERS)
def test_a_package_imports_only_what_lies_below_it(package: str, root: Path) -> None:
    ours = set(LAYERS) | LEAVES | {"ops", "tests"}
    for path in (root / package).rglob("*.py"):
        above = set(imports(path)) & ours - LAYERS[package] - LEAVES - {package}
        assert not above, f"{path.relative_to(root)} imports {sorted(above)}"


@pytest.mark.parametrize("leaf", sorted(LEAVES))
def test_the_leaves_import_nothing_of_ours(leaf: str, root: Path) -> None:
    assert not set(imports(root / f"{leaf}.py")) & (set(LAYERS) | LEAVES)


@pytest.mark.parametrize("library", ENTRANCES)
def test_an_outside_system_enters_in_one_place(library: str, root: Path) -> None:
    for path in sources(root):
        if library in imports(path):
            where = path.relative_to(root).as_posix()
            assert any(where == door or where.startswith(f"{door}/") for door in ENTRANCES[library])


def test_modules_do_not_import_each_other_in_a_ring(root: Path) -> None:
    """At import time: what a function imports when it runs is no ring."""
    graph: dict[str, set[str]] = {}
    known = {
        path.relative_to(root).with_suffix("").as_posix().replace("/", "."): path
        for path in sources(root)
    }
    for name, path in known.items():
        graph[name] = set()
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and node.module:
                targets = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
                graph[name] |= {target for target in targets if target in known}
            elif isinstance(node, ast.Import):
                graph[name] |= {alias.name for alias in node.names if alias.name in known}
    while free := [name for name, needs in graph.items() if not needs]:
        for name in free:
            del graph[name]
        for needs in graph.values():
            needs.difference_update(free)
    assert not graph, f"rings among {sorted(graph)}"


def test_nothing_in_the_product_imports_ops(root: Path) -> None:
    assert [path for path in sources(root) if "ops" in imports(path)] == []
