"""Rows of problem files: JSON lines or Parquet, plain or compressed, several files, slices of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

from megatron_pmd.errors import DataError

Row = tuple[str, dict[str, Any]]
"""Its place, as `file:line` or `file, row N`, counted from 1; and its columns."""

SLICE = re.compile(r"(?P<path>.+)@\[(?P<start>-?\d*):(?P<stop>-?\d*)\]")
"""slime's way to name a part of a file: `problems.jsonl@[0:100]`."""
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
JSON_LINES, PARQUET = (".jsonl", ".json"), (".parquet",)


def read_rows(paths: str | tuple[str, ...]) -> Iterator[Row]:
    """Every row of the files, one file behind the other.

    Of `path@[start:stop]` only the rows of this slice, as Python counts.
    Raises DataError for a file that is missing, of an unknown kind, or not what its name says.
    """
    for path in (paths,) if isinstance(paths, str) else paths:
        part = SLICE.fullmatch(path)
        if part is None:
            yield from _rows_of(Path(path))
            continue
        start, stop = (int(part[name]) if part[name] else None for name in ("start", "stop"))
        rows = list(_rows_of(Path(part["path"])))
        if not rows[start:stop]:
            raise DataError(f"{path}: none of the {len(rows)} rows of {part['path']} is in this slice")
        yield from rows[start:stop]


def is_problem_file(path: str) -> bool:
    """Whether a name is that of a problem file, or of a slice of one; a run's config.json is none."""
    part = SLICE.fullmatch(path)
    file = Path(part["path"] if part else path)
    return file.name != "config.json" and _kind(file)[0] in JSON_LINES + PARQUET


def _kind(path: Path) -> tuple[str, str | None]:
    """The file's suffix, and how it is compressed."""
    compression = COMPRESSIONS.get(path.suffix.lower())
    return Path(path.stem if compression else path.name).suffix.lower(), compression


def _rows_of(path: Path) -> Iterator[Row]:
    kind, compression = _kind(path)
    if kind not in JSON_LINES and (compression or kind not in PARQUET):
        raise DataError(
            f"{path}: unknown kind of file {''.join(path.suffixes[-2:])!r}; use .jsonl or .json (JSON lines, "
            "also as .jsonl.gz or .jsonl.zst) or .parquet"
        )
    if path.is_dir():
        raise DataError(f"{path}: a folder; name the files in it, as a JSON list")
    if not path.is_file():
        raise DataError(f"{path}: no such file (relative paths start at {Path.cwd()})")
    return _parquet_rows(path) if kind in PARQUET else _json_lines(path, compression)


def _json_lines(path: Path, compression: str | None) -> Iterator[Row]:
    import pyarrow as pa

    try:
        with BufferedReader(pa.input_stream(path, compression=compression)) as lines:
            for number, line in enumerate(lines, start=1):
                where = f"{path}:{number}"
                if not line.strip():  # editors and `cat` leave blank lines, most often the last
                    continue
                row = _parsed(line, where, first=number == 1)
                if isinstance(row, list):
                    raise DataError(
                        f"{where}: a list where an object with a prompt is expected; one problem a line "
                        f"(`jq -c '.[]' {path.name}` writes a list so)"
                    )
                if not isinstance(row, dict):
                    raise DataError(f"{where}: a {kind_of(row)} where an object with a prompt is expected")
                yield where, row
    except (OSError, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read: {reason}; is the file complete?") from None


def _parsed(line: bytes, where: str, *, first: bool) -> Any:
    try:
        # Windows programs begin a file with a byte order mark, which is no part of the JSON
        return json.loads(line.decode("utf-8-sig" if first else "utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON: {error}; one object a line, in UTF-8, is expected") from None


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from None


def value_at(row: dict[str, Any], key: str, where: str, setting: str) -> Any:
    """What the row has under a key: a column's name, or a path as `reward_model.ground_truth` or `choices.0`.

    setting: which names the key. DataError, with the keys that there are, if the row has nothing there.
    """
    if key in row:
        return row[key]
    value: Any = row
    for part in key.split("."):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif (
            isinstance(value, list) and re.fullmatch(r"-?\d+", part) and -len(value) <= int(part) < len(value)
        ):
            value = value[int(part)]
        else:
            has = ", ".join(_keys(row)) or "nothing"
            raise DataError(f"{where}: no key {key!r}, only {has}; set {setting} to the right one")
    return value


def _keys(row: dict[str, Any]) -> list[str]:
    """What a row can be asked for, objects by what is in them."""
    return sorted(
        name
        for column, value in row.items()
        for name in (
            [f"{column}.{inner}" for inner in value] if isinstance(value, dict) and value else [column]
        )
    )


def kind_of(value: Any) -> str:
    """The value's type in JSON's words."""
    names = {type(None): "null", bool: "boolean", str: "string", list: "list", dict: "object"}
    names |= {int: "number", float: "number"}
    return names.get(type(value), type(value).__name__)
