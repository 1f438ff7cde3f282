"""A run directory as it is read back: by a resuming run, by the report, by the closing screen."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_pmd.errors import DataError
from megatron_pmd.files import JsonObject, read_object, read_records


def flatten(tree: Any, prefix: str = "") -> JsonObject:
    """Leaves of a tree of dictionaries, and lists of them, by dotted key; an empty dictionary is a leaf."""
    if isinstance(tree, list) and any(isinstance(entry, dict) for entry in tree):
        tree = dict(enumerate(tree))
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
    config: JsonObject
    versions: JsonObject
    summary: JsonObject | None
    """None while the run is under way, and after it was killed."""
    metrics: list[JsonObject]
    ledger: list[JsonObject]

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

    def of_kind(self, kind: str) -> list[JsonObject]:
        return [m for m in self.metrics if m.get("kind") == kind]

    @cached_property
    def iterations(self) -> list[JsonObject]:
        return self.of_kind("iteration")

    @cached_property
    def evaluations(self) -> list[JsonObject]:
        return self.of_kind("evaluation")

    def sample_files(self, kind: str) -> dict[int, Path]:
        """Parquet files under `rollouts` or `evaluations`, by iteration.

        Files beyond the iteration under way are left over from before a resume: no line speaks of them.
        """
        under_way = max((m["iteration"] for m in self.iterations), default=-1) + 1
        files = {int(f.stem): f for f in (self.path / kind).glob("*.parquet") if f.stem.isdecimal()}
        return {t: files[t] for t in sorted(files) if t <= under_way}


def seconds_by_phase(ledger: list[JsonObject]) -> dict[str, float]:
    """Total seconds of each phase, in the order in which the phases first ran."""
    total: dict[str, float] = {}
    for line in ledger:
        total[line["phase"]] = total.get(line["phase"], 0.0) + (line["seconds"] or 0.0)
    return total
