"""Files that are there whole or not at all, and JSON as it is read back from a run directory."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_pmd.errors import DataError

JsonObject = dict[str, Any]
FULL_BYTES = 2**20
"""A disk with less room left is why something could not be written."""


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


def iterations_in(folder: Path) -> dict[int, Path]:
    """The folders iteration-N in it by N, in their order; not iteration-N.partial, nor a copy of a user."""
    found = ((re.fullmatch(r"iteration-(\d+)", path.name), path) for path in folder.glob("iteration-*"))
    return dict(sorted((int(name[1]), path) for name, path in found if name and path.is_dir()))


@contextmanager
def whole_file(path: Path, mode: int | None = None) -> Iterator[Path]:
    """Where to write a file. It takes its own name when the block ends, and is then on the disk.

    mode: 0o600 keeps the file from all other users from its first byte on. For one writer at a time.
    """
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)  # one that a killed process left would keep its mode
    if mode is not None:
        os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))
    yield partial
    with partial.open("rb+") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def write_whole(path: Path, content: str | bytes, mode: int | None = None) -> None:
    """Write a file of this text (as UTF-8) or these bytes; see whole_file."""
    with whole_file(path, mode) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def full_disk(folder: Path) -> str:
    """What to add to the message of a failure where the folder's disk has no room left; else nothing."""
    disk = os.statvfs(folder)
    if disk.f_bavail * disk.f_frsize > FULL_BYTES:
        return ""
    return f"; the disk of {folder} is full: make room, the same command then goes on"


def read_object(path: Path) -> JsonObject | None:
    """A JSON object file; None if there is no such file. DataError if it is there and is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))  # perhaps with a byte order mark
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not JSON: {error}; is the file whole, and in UTF-8?") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}: not a JSON object")
    return value
