"""The files that the pages name are there, and the map leaves no folder out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
PAGES = [*PROJECT.glob("*.md"), *(PROJECT / "docs").rglob("*.md"), *(PROJECT / ".github").rglob("*.md")]
CODE = re.compile(r"`([^`\n]+)`")
FILE = re.compile(r"[\w./-]+\.(?:py|toml|sbatch|json|md|cff|yml|j2)")
ROOTS = ("megatron_pmd", "recipes", "slurm", "tools", "tests", "docs", "constraints")
NOT_OURS = {"CHANGELOG.md"}
"""It tells of files as they were called then."""


def named_files(page: Path) -> list[str]:
    """Paths in code that begin with a folder of the repository's root."""
    return [
        word
        for word in CODE.findall(page.read_text())
        if FILE.fullmatch(word) and word.split("/")[0] in ROOTS
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(PROJECT)))
def test_every_file_that_a_page_names_is_there(page: Path):
    if page.name not in NOT_OURS:
        assert [name for name in named_files(page) if not (PROJECT / name).exists()] == []


def cells(first_column: str) -> list[list[str]]:
    """The rows of ARCHITECTURE.md's table whose first column is called so."""
    lines = (PROJECT / "ARCHITECTURE.md").read_text().splitlines()
    start = next(
        i
        for i, line in enumerate(lines)
        if line.startswith(f"| {first_column} |") and lines[i + 1].startswith("|---")
    )
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_the_map_names_a_file_to_start_at_in_every_folder_of_the_package():
    starts = {row[0].strip("`/"): row[1].strip("`") for row in cells("folder")}
    assert [
        folder for folder, file in starts.items() if not (PROJECT / "megatron_pmd" / folder / file).exists()
    ] == []
    folders = {path.parent.name for path in (PROJECT / "megatron_pmd").glob("*/__init__.py")}
    assert folders - {folder.split("/")[0] for folder in starts} == set()


def test_the_map_names_every_file_beside_the_folders():
    named = {name for row in cells("file") for name in CODE.findall(row[0])}
    files = {path.name for path in (PROJECT / "megatron_pmd").glob("*.py")} - {"__init__.py"}
    assert named == files


def test_the_way_of_a_sample_goes_through_files_that_are_there():
    named = [name for row in cells("stop") for name in CODE.findall(row[2]) if FILE.fullmatch(name)]
    assert len(named) > 15
    assert [name for name in named if not (PROJECT / "megatron_pmd" / name).exists()] == []
