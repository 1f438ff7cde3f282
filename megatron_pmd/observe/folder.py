"""A run directory as it is read back: by a resuming run, by the report, by the closing screen."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_pmd.errors import DataError

Record = dict[str, Any]


def read_records(path: Path) -> list[Record]:
    """The lines of a JSON-lines file; one line cut off at its end, by a kill while writing, is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    if lines[-1] == "":
        lines.pop()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise DataError(f"{path}, line {number}: not JSON: {error}") from None
        if not isinstance(record, dict):
            raise DataError(f"{path}, line {number}: not a JSON object")
        records.append(record)
    return records


def write_whole(path: Path, text: str) -> None:
    """Write a file under its final name only when complete."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def read_object(path: Path) -> Record | None:
    """A JSON object file; None if there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: not a JSON object")
    return value


def flatten(tree: Any, prefix: str = "") -> Record:
    """Leaves of a tree of dictionaries by dotted key; an empty dictionary is a leaf."""
    if not isinstance(tree, dict) or (not tree and prefix):
        return {prefix: tree}
    leaves = {}
    for key, value in tree.items():
        leaves.update(flatten(value, f"{prefix}.{key}" if prefix else key))
    return leaves


@dataclass(frozen=True)
class RunFolder:
    """Everything a run has written so far; the configuration stays plain: reports outlive its schema."""

    path: Path
    config: Record
    versions: Record
    summary: Record | None
    """None while the run is under way, and after it was killed."""
    metrics: list[Record]
    ledger: list[Record]

    @classmethod
    def read(cls, path: Path) -> RunFolder:
        config = read_object(path / "config.json") if path.is_dir() else None
        if config is None:
            why = "no config.json in it" if path.is_dir() else "no such folder"
            raise DataError(
                f"{path}: not a run directory ({why}); give the folder of one run, e.g. runs/<name>"
            )
        return cls(
            path=path,
            config=config,
            versions=read_object(path / "versions.json") or {},
            summary=read_object(path / "summary.json"),
            metrics=read_records(path / "metrics.jsonl"),
            ledger=read_records(path / "ledger.jsonl"),
        )

    def of_kind(self, kind: str) -> list[Record]:
        return [m for m in self.metrics if m.get("kind") == kind]

    @cached_property
    def iterations(self) -> list[Record]:
        return self.of_kind("iteration")

    @cached_property
    def evaluations(self) -> list[Record]:
        return self.of_kind("evaluation")

    def sample_files(self, kind: str) -> dict[int, Path]:
        """Parquet files under `rollouts` or `evaluations`, by iteration.

        Files beyond the iteration under way are left over from before a resume: no line speaks of them.
        """
        under_way = max((m["iteration"] for m in self.iterations), default=-1) + 1
        files = {int(f.stem): f for f in (self.path / kind).glob("*.parquet") if f.stem.isdecimal()}
        return {t: files[t] for t in sorted(files) if t <= under_way}


def seconds_by_phase(ledger: list[Record]) -> dict[str, float]:
    """Total seconds of each phase, in the order in which the phases first ran."""
    total: dict[str, float] = {}
    for line in ledger:
        total[line["phase"]] = total.get(line["phase"], 0.0) + (line["seconds"] or 0.0)
    return total
