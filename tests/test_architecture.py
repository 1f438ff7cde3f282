"""The arrows of the house: which top-level unit of the package may import which, read from the source."""

from __future__ import annotations

import ast
import itertools
import re
from collections import defaultdict
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
PACKAGE = PROJECT / "megatron_pmd"
OTHERS_NAMES = ("stubs/packages", "engine/plugins")
"""Folders that are put on an import path of their own: their modules bear the names of other packages."""

LEAVES = {"errors", "plugins"}
MAY_IMPORT = {"algorithm": LEAVES, "config": LEAVES}
"""The mathematics and the configuration stand on the ground."""

ONLY_IN = {
    "megatron": {"actor", "convert"},
    "sglang": {"engine", "rollout", "weight_sync", "stubs"},
    "sglang_router": {"engine", "rollout"},
    "nemo_run": {"launch", "node"},
}
"""Library -> the units that may touch it."""


def _sources() -> Iterator[tuple[str, Path]]:
    """(unit, file) of the package and of the recipes, which it loads by name."""
    for path in sorted(PACKAGE.rglob("*.py")):
        inside = path.relative_to(PACKAGE)
        if not inside.as_posix().startswith(OTHERS_NAMES):
            yield inside.parts[0].removesuffix(".py"), path
    for path in sorted((PROJECT / "recipes").glob("*.py")):
        yield "recipes", path


def _imported(path: Path) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of every import in a file, also inside functions and under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def _unit(name: str) -> str | None:
    """The unit that a dotted name is in; None for another package's."""
    parts = name.split(".")
    if parts[0] == "recipes":
        return "recipes"
    return parts[1] if parts[0] == "megatron_pmd" and len(parts) > 1 else None


def _arrows() -> dict[tuple[str, str], list[str]]:
    """(unit, unit that it imports) -> the places where it does."""
    arrows: dict[tuple[str, str], list[str]] = defaultdict(list)
    for unit, path in _sources():
        for name, line in _imported(path):
            target = _unit(name)
            if target is not None and target != unit:
                arrows[unit, target].append(f"{path.relative_to(PROJECT)}:{line} imports {name}")
    return arrows


def _refuse_cycle(arrows: dict[tuple[str, str], list[str]]) -> None:
    graph: dict[str, set[str]] = defaultdict(set)
    for unit, target in arrows:
        graph[unit].add(target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        circle = error.args[1][::-1]  # graphlib names a node after what it depends on
        closing = [f"  {place}" for pair in itertools.pairwise(circle) for place in arrows[pair]]
        raise AssertionError("\n".join([" -> ".join(circle), *closing])) from None


def test_no_top_level_unit_imports_one_that_imports_it() -> None:
    _refuse_cycle(_arrows())


def test_a_cycle_is_found_and_the_imports_that_close_it_are_named() -> None:
    with pytest.raises(AssertionError, match=r"a\.py:1 imports megatron_pmd\.b(.|\n)*b\.py:9 imports"):
        _refuse_cycle(
            {
                ("a", "b"): ["a.py:1 imports megatron_pmd.b"],
                ("b", "a"): ["b.py:9 imports megatron_pmd.a"],
                ("a", "c"): ["a.py:2 imports megatron_pmd.c"],
            }
        )


@pytest.mark.parametrize("unit", MAY_IMPORT)
def test_mathematics_and_configuration_import_nothing_of_the_rest(unit: str) -> None:
    others = {pair: places for pair, places in _arrows().items() if pair[0] == unit}
    assert others or unit == "algorithm", "config raises errors, so it imports them"
    wrong = [
        place for (_, target), places in others.items() if target not in MAY_IMPORT[unit] for place in places
    ]
    assert wrong == []


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_is_touched_only_where_it_belongs(library: str) -> None:
    """Also in code that is kept as text, for another process, or that another process loads."""
    touches = re.compile(rf"\b(?:from|import) {library}\b|import_module\(.{library}\b")
    files = {path: path.relative_to(PACKAGE).parts[0] for path in PACKAGE.rglob("*.py")}
    found = {unit.removesuffix(".py") for path, unit in files.items() if touches.search(path.read_text())}
    assert found, f"nothing imports {library}: this rule watches nothing"
    assert found <= ONLY_IN[library]
