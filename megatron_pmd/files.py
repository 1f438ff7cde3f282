"""Files that are there whole or not at all, and JSON as it is read back from a run directory."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from megatron_pmd.errors import DataError

JsonObject = dict[str, Any]


def read_records(path: Path) -> list[JsonObject]:
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


def read_object(path: Path) -> JsonObject | None:
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
