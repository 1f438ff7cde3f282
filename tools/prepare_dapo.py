"""DAPO-Math-17k and AIME, from local copies of the published files to this project's JSON lines.

    python tools/prepare_dapo.py --train dapo-math-17k.parquet --held-out aime-2024.parquet aime-2025.jsonl

Reads Parquet and JSON lines; a row has its question under `prompt` (text, or chat messages), `problem` or
`question`, and its answer under `answer` or `reward_model.ground_truth`. The published DAPO file repeats its
problems a hundred times, the AIME one 32 times: each problem is kept once. A question with two answers cannot
be graded and is dropped. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_pmd.errors import DataError, PmdError

QUESTION_KEYS = ("prompt", "problem", "question")


@dataclass(frozen=True)
class Prepared:
    """What one output file holds."""

    path: Path
    rows: int
    """Read, before duplicates were dropped."""
    problems: int
    ambiguous: list[str]
    """Where questions were met again with another answer, the first place of each."""
    sha256: str

    def __str__(self) -> str:
        duplicates = self.rows - self.problems - len(self.ambiguous)
        dropped = f"{duplicates:,} duplicates dropped"
        if self.ambiguous:
            dropped += f", {len(self.ambiguous):,} questions with two answers dropped ({self.ambiguous[0]})"
        counts = f"{self.problems:,} problems from {self.rows:,} rows ({dropped})"
        return f"{self.path}: {counts}, sha256 {self.sha256}"


def prepare(sources: Iterable[Path], output: Path) -> Prepared:
    """Write the sources' distinct problems, in the order of their first appearance.

    Raises DataError for a file or row that cannot be read.
    """
    problems: dict[str, dict[str, Any]] = {}
    ambiguous: dict[str, str] = {}
    rows = 0
    for source in sources:
        for where, row in read(source):
            rows += 1
            problem = {"prompt": question(row, where), "answer": answer(row, where)}
            key = json.dumps(problem["prompt"], sort_keys=True)
            if problems.setdefault(key, problem)["answer"] != problem["answer"]:
                ambiguous.setdefault(key, where)
    kept = [problem for key, problem in problems.items() if key not in ambiguous]
    if not kept:
        raise DataError("the files hold no problems")
    text = "".join(json.dumps(problem, ensure_ascii=False) + "\n" for problem in kept)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text, encoding="utf-8")
    return Prepared(output, rows, len(kept), [*ambiguous.values()], hashlib.sha256(text.encode()).hexdigest())


def read(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row with its place."""
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    if path.suffix == ".parquet":
        import pyarrow.parquet as parquet

        number = 0
        for batch in parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row
        return
    if path.suffix != ".jsonl":
        raise DataError(f"{path}: unknown kind of file {path.suffix!r}; use .parquet or .jsonl")
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield f"{path}:{number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(f"{path}:{number}: not JSON: {error}") from None


def question(row: dict[str, Any], where: str) -> str | list[dict[str, str]]:
    """The question as text, or as the chat messages it was published in."""
    value = next((row[key] for key in QUESTION_KEYS if row.get(key)), None)
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, list) and all(
        isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value
    ):
        return [{"role": m["role"], "content": m["content"]} for m in value]
    raise DataError(f"{where}: no question under {', '.join(QUESTION_KEYS)}; it has {', '.join(row)}")


def answer(row: dict[str, Any], where: str) -> str:
    """The reference answer as text; AIME files have it as a number, too."""
    value = row.get("answer")
    if value is None:
        value = (row.get("reward_model") or {}).get("ground_truth")
    if value is None or str(value).strip() == "":
        raise DataError(f"{where}: no answer under answer or reward_model.ground_truth")
    return str(value).strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--train", type=Path, required=True, help="DAPO-Math-17k, .parquet or .jsonl")
    parser.add_argument("--held-out", type=Path, nargs="+", required=True, help="AIME 2024 and 2025")
    parser.add_argument("--output", type=Path, default=Path("data"), help="folder")
    given = parser.parse_args()
    try:
        print(prepare([given.train], given.output / "dapo-math-17k.jsonl"))
        print(prepare(given.held_out, given.output / "aime-2024-2025.jsonl"))
    except PmdError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
