"""DAPO and AIME files in the shapes they were published in."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_pmd.config import Data, FileSource
from megatron_pmd.data.sources import load_problems
from megatron_pmd.errors import DataError
from tools.prepare_dapo import prepare

PROJECT = Path(__file__).parents[2]


def dapo(text: str, answer: str) -> dict[str, Any]:
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": f"Solve.\n\n{text}", "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
    }


@pytest.fixture
def published(tmp_path: Path) -> tuple[Path, Path]:
    train, held_out = tmp_path / "dapo-math-17k.parquet", tmp_path / "aime.jsonl"
    pq.write_table(pa.Table.from_pylist([dapo("1 + 1", "2"), dapo("2 + 2", "4")] * 100), train)
    rows = [{"problem": "Find m+n.", "answer": 73, "id": 60}, {"question": "Find x.", "answer": "025"}]
    held_out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return train, held_out


def test_each_problem_is_kept_once_with_its_messages_and_answer(
    published: tuple[Path, Path], tmp_path: Path
) -> None:
    done = prepare([published[0]], tmp_path / "out.jsonl")
    assert (done.rows, done.problems) == (200, 2)
    lines = [json.loads(line) for line in done.path.read_text().splitlines()]
    assert lines[0] == {"prompt": [{"role": "user", "content": "Solve.\n\n1 + 1"}], "answer": "2"}
    assert done.sha256 == hashlib.sha256(done.path.read_bytes()).hexdigest()


def test_the_command_writes_files_that_a_run_can_read(published: tuple[Path, Path], tmp_path: Path) -> None:
    tool, output = str(PROJECT / "tools" / "prepare_dapo.py"), str(tmp_path / "data")
    command = [sys.executable, tool, "--output", output, "--train", str(published[0])]
    command += ["--held-out", str(published[1])]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, env={"PYTHONPATH": str(PROJECT)}
    )
    assert done.returncode == 0, done.stderr
    assert "2 problems from 200 rows (198 duplicates dropped), sha256" in done.stdout
    source = FileSource(path=str(tmp_path / "data" / "aime-2024-2025.jsonl"))
    problems = load_problems(source, Data(train=source))
    assert [problem.answer for problem in problems] == ["73", "025"]


def test_a_question_with_two_answers_is_dropped_counted_and_placed(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    rows = [("1 + 1", 2), ("2 + 2", 4), ("1 + 1", 3)]
    path.write_text("".join(json.dumps({"prompt": q, "answer": a}) + "\n" for q, a in rows))
    done = prepare([path], tmp_path / "out.jsonl")
    assert (done.problems, done.ambiguous) == (1, [f"{path}:3"])
    assert "1 duplicates dropped, 1 questions with two answers dropped" in str(done)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"text": "1 + 1", "answer": 2}',
            "no question under prompt, problem, question; it has text, answer",
        ),
        ('{"prompt": "1 + 1"}', "no answer under"),
        ("{", "not JSON"),
    ],
)
def test_a_row_that_is_no_problem_is_refused(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(DataError, match=message):
        prepare([path], tmp_path / "out.jsonl")


def test_a_missing_file_and_an_unknown_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        prepare([tmp_path / "no.parquet"], tmp_path / "out.jsonl")
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(DataError, match="unknown kind of file"):
        prepare([tmp_path / "a.csv"], tmp_path / "out.jsonl")
