"""docs/bad_input.md, row by row: each input is refused with the message there, and nothing is lost."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_pmd.cli.main import app
from megatron_pmd.errors import PmdError
from megatron_pmd.outcome import RunOutcome
from tests import bad_files

PAGE = Path(__file__).parents[1] / "docs" / "bad_input.md"
ROW = re.compile(
    r"\| (?P<what>[^|]+) \| `(?P<command>[^`]+)` \| (?P<tick>`+) ?(?P<message>.+?) ?(?P=tick) \|"
)
ROWS = [row.groupdict() for row in map(ROW.fullmatch, PAGE.read_text().splitlines()) if row]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("bad-input")
    bad_files.write(made)
    return made


def contents(folder: Path) -> dict[Path, bytes | None]:
    """Of compiled recipes nobody would miss anything."""
    return {
        path: path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if "__pycache__" not in path.parts
    }


def test_the_page_has_a_row_for_each_of_at_least_60_inputs() -> None:
    written = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    assert len(ROWS) == len(written) - 1 >= 60  # the first is the table's head
    assert f"This page lists {len(ROWS)} inputs" in PAGE.read_text()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["what"])
def test_an_input_that_is_wrong_is_refused_in_these_words(
    folder: Path, monkeypatch: pytest.MonkeyPatch, row: dict[str, str]
) -> None:
    monkeypatch.chdir(folder)
    before = contents(folder)
    with pytest.raises(PmdError) as caught:
        app(row["command"].split(" "), standalone_mode=False)
    said = str(RunOutcome.of(caught.value)).partition(": ")[2]
    expected = ".*".join(re.escape(part) for part in row["message"].split("…"))
    assert re.fullmatch(expected, said, re.DOTALL), said
    assert contents(folder) == before
