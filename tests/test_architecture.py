"""The arrows of the house: which top-level unit of the package may import which, read from the source."""

from __future__ import annotations

import ast
import itertools
import re
from collections import defaultdict
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import pytest

from megatron_pmd import errors

PROJECT = Path(__file__).parents[1]
PACKAGE = PROJECT / "megatron_pmd"
OTHERS_NAMES = ("engine/cpu", "engine/contained", "engine/plugins")
"""Folders that are put on an import path of their own: their modules bear the names of other packages."""

LEAVES = {"errors", "plugins"}
MAY_IMPORT = {
    "algorithm": LEAVES,
    "config": LEAVES | {"algorithm"},
    "objectives": LEAVES | {"algorithm", "config"},
    "simulator": {"config", "errors", "observe", "planner", "rollout_file"},
}
"""The mathematics stands on the ground; the configuration names its types, the objectives join the two. The
simulator plays what the planner costs, and touches nothing that runs."""

ONLY_IN = {
    "megatron": {"actor", "convert"},
    "sglang": {"engine", "rollout", "weight_sync"},
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
def test_mathematics_configuration_objectives_and_simulator_import_nothing_of_the_rest(unit: str) -> None:
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


def test_a_rank_imports_no_megatron_before_its_environment_is_set() -> None:
    """megatron-core imports Transformer Engine, which reads some variables while it is imported."""
    seen: set[str] = set()
    waiting = ["megatron_pmd.node.worker", "megatron_pmd.actor.environment"]
    while waiting:
        name = waiting.pop()
        path = PROJECT / f"{name.replace('.', '/')}.py"
        if name in seen or not path.exists():
            continue
        seen.add(name)
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom):
                waiting += [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                waiting += [alias.name for alias in node.names]
            wrong = [name for name in waiting if name.split(".")[0] in ("megatron", "transformer_engine")]
            assert wrong == [], f"{path}:{node.lineno}"
    assert len(seen) > 10, "this rule watches nothing"


def _definitions(kind: type[ast.AST]) -> Iterator[tuple[str, Any]]:
    """(where, node) of every class or function of the package outside config, which is made of fields."""
    for unit, path in _sources():
        if unit != "config":
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, kind):
                    yield f"{path.relative_to(PROJECT)}: {node.name}", node  # type: ignore[attr-defined]


def test_no_file_is_too_long_to_be_read() -> None:
    folders = ("megatron_pmd", "recipes", "tools", "tests")
    files = [path for folder in folders for path in (PROJECT / folder).rglob("*.py")]
    assert [str(path) for path in files if path.read_text().count("\n") > 400] == []


def test_no_class_is_too_long_or_takes_too_many_arguments() -> None:
    """Pure records, whose rows are files or messages, may have more fields: they are made by name."""
    classes = list(_definitions(ast.ClassDef))
    assert [where for where, node in classes if node.end_lineno - node.lineno >= 250] == []
    assert [where for where, node in classes if _arguments(node) > 10] == []


def _arguments(node: ast.ClassDef) -> int:
    """Of a class's constructor; a dataclass with methods has one, too."""
    methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
    written = [len(m.args.args) + len(m.args.kwonlyargs) - 1 for m in methods if m.name == "__init__"]
    if _is_dataclass(node) and not all(map(_is_property, methods)):
        return len(_given_fields(node))
    return max(written, default=0)


def _is_property(function: ast.FunctionDef) -> bool:
    names = {ast.unparse(decorator).split(".")[-1] for decorator in function.decorator_list}
    return bool(names & {"property", "cached_property", "classmethod"}) or function.name == "__post_init__"


def _is_dataclass(node: ast.ClassDef) -> bool:
    return any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list)


def _given_fields(node: ast.ClassDef) -> list[ast.AnnAssign]:
    fields = [part for part in node.body if isinstance(part, ast.AnnAssign)]
    return [part for part in fields if part.value is None or "init=False" not in ast.unparse(part.value)]


def test_no_function_is_longer_than_a_screen() -> None:
    functions = [*_definitions(ast.FunctionDef), *_definitions(ast.AsyncFunctionDef)]
    assert len(functions) > 1000
    assert [where for where, node in functions if node.end_lineno - node.lineno >= 60] == []


def test_every_kind_of_failure_is_where_node_ranks_looks_for_it() -> None:
    """A failure that errors.py does not know is told as that of one rank (node/ranks.py)."""
    kinds = {name for name, kind in vars(errors).items() if isinstance(kind, type)}
    failures = [
        where
        for where, node in _definitions(ast.ClassDef)
        if any(isinstance(base, ast.Name) and base.id in kinds for base in node.bases)
    ]
    elsewhere = [where for where in failures if not where.startswith("megatron_pmd/errors.py")]
    # a reward worker's own, caught where it calls the sandbox
    assert failures and elsewhere == ["megatron_pmd/rewards/sandbox.py: SandboxDied"]
