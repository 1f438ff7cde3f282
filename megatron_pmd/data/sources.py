"""Where problems come from: JSON lines, Parquet, or a reasoning-gym generator. Nothing is tokenised here."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_pmd.config import Data, FileSource, ReasoningGymSource, Source
from megatron_pmd.data.problems import Problem
from megatron_pmd.errors import DataError

ROLES = ("system", "user", "assistant", "tool")


def load_problems(source: Source, data: Data) -> list[Problem]:
    """Read every problem of a source, in its order, with data.system_prompt and data.prompt_suffix applied.

    Raises DataError for a missing, empty or malformed file (with its line or row, from 1), an unknown
    reasoning-gym task, or parameters that the task refuses.
    """
    if isinstance(source, ReasoningGymSource):
        return _generate(source, data)
    return _read_file(source, data)


def check_source(source: Source, data: Data) -> None:
    """Raise what load_problems would, as far as the first problem of a file tells; a task is not made yet."""
    if isinstance(source, FileSource):
        next(_problems_of(source, data))


def _read_file(source: FileSource, data: Data) -> list[Problem]:
    return list(_problems_of(source, data))


def _problems_of(source: FileSource, data: Data) -> Iterator[Problem]:
    path = Path(source.path)
    readers = {".jsonl": _json_lines, ".parquet": _parquet_rows}
    if path.suffix.lower() not in readers:
        raise DataError(f"{path}: unknown kind of file {path.suffix!r}; use .jsonl (JSON lines) or .parquet")
    if not path.is_file():
        raise DataError(f"{path}: no such file (relative paths start at {Path.cwd()})")
    rows = readers[path.suffix.lower()](path, source)
    index = -1
    for index, (where, row) in enumerate(rows):
        yield _from_row(index, where, row, source, data)
    if index < 0:
        raise DataError(f"{path}: the file holds no problems")


def _json_lines(path: Path, source: FileSource) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each object of the file with its place, `file:line`."""
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                where = f"{path}:{number}"
                if not line.strip():
                    raise DataError(f"{where}: the line is blank; remove it")
                try:
                    row = json.loads(line.decode())
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{where}: not JSON: {error}") from None
                if not isinstance(row, dict):
                    raise DataError(f"{where}: a {_kind(row)} where an object with a prompt is expected")
                for key in (source.prompt_key, source.answer_key):
                    _require(key, row, where, "key")
                yield where, row
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


def _parquet_rows(path: Path, source: FileSource) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row of the file with its place, `file, row N`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for key in (source.prompt_key, source.answer_key):
                _require(key, file.schema_arrow.names, str(path), "column")
            number = 0
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: not a readable Parquet file: {error}") from None


def _require(key: str, present: Iterable[str], where: str, noun: str) -> None:
    names = sorted(present)
    if key not in names:
        has = ", ".join(names) if names else "nothing"
        raise DataError(f"{where}: no {noun} {key!r}, only {has}; set the source's prompt_key and answer_key")


def _from_row(index: int, where: str, row: dict[str, Any], source: FileSource, data: Data) -> Problem:
    answer = row[source.answer_key]
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise DataError(
            f"{where}: {source.answer_key!r} is a {_kind(answer)}; a string or a number is expected"
        )
    budget = _number(row, source.token_budget_key, where)
    if budget is not None and (budget < 1 or budget != int(budget)):
        raise DataError(
            f"{where}: {source.token_budget_key!r} is {budget:g}; a whole number of tokens is expected"
        )
    return Problem(
        index=index,
        messages=_chat(row[source.prompt_key], f"{where}: {source.prompt_key!r}", data),
        answer=str(answer),
        metadata={k: v for k, v in row.items() if k not in (source.prompt_key, source.answer_key)},
        difficulty=_number(row, source.difficulty_key, where),
        token_budget=None if budget is None else int(budget),
    )


def _number(row: dict[str, Any], key: str | None, where: str) -> float | None:
    """The row's number under `key`; None where no key is asked for, or the row has null there."""
    if key is None:
        return None
    if key not in row:
        raise DataError(f"{where}: no {key!r}, only {', '.join(sorted(row))}")
    value = row[key]
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"{where}: {key!r} is {value!r}; a number is expected")
    return float(value)


def _chat(prompt: Any, where: str, data: Data) -> tuple[dict[str, str], ...]:
    """The messages of one prompt; the suffix goes to the last one, the system prompt before the first."""
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list):
        raise DataError(f"{where} is a {_kind(prompt)}; a string or a list of chat messages is expected")
    if not prompt:
        raise DataError(f"{where} is an empty list of messages")
    messages = [_message(message, f"{where}, message {i}") for i, message in enumerate(prompt, start=1)]
    if messages[-1]["role"] != "user":
        raise DataError(f"{where} ends with a {messages[-1]['role']} message; the last must be the user's")
    messages[-1]["content"] += data.prompt_suffix
    if data.system_prompt is not None:
        if any(message["role"] == "system" for message in messages):
            raise DataError(
                f"{where} has a system message of its own; leave data.system_prompt unset, or remove it"
            )
        messages.insert(0, {"role": "system", "content": data.system_prompt})
    return tuple(messages)


def _message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, dict) or set(message) != {"role", "content"}:
        found = (
            f"has {', '.join(map(str, message))}" if isinstance(message, dict) else f"is a {_kind(message)}"
        )
        raise DataError(f"{where} {found}; an object with exactly role and content is expected")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise DataError(f"{where} has the role {role!r}; use one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise DataError(f"{where} has a {_kind(content)} as content; a string is expected")
    if not content.strip():
        raise DataError(f"{where} is empty")
    return {"role": role, "content": content}


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "boolean", str: "string", list: "list", dict: "object"}
    return names.get(type(value), type(value).__name__)


def _generate(source: ReasoningGymSource, data: Data) -> list[Problem]:
    """Problems of a reasoning-gym task; metadata has `task`, `parameters` and `entry`, enough to score."""
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if source.task not in DATASETS:
        near = difflib.get_close_matches(source.task, DATASETS, n=3, cutoff=0.4)
        raise DataError(f"{source.task!r} is not a reasoning-gym task{_did_you_mean(near)}")
    known = {field.name for field in dataclasses.fields(DATASETS[source.task][1])} - {"size", "seed"}
    for name in source.parameters:
        if name in ("size", "seed"):
            raise DataError(f"reasoning-gym task {source.task}: set {name} beside `parameters`, not in it")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise DataError(
                f"reasoning-gym task {source.task} has no parameter {name!r}{_did_you_mean(near)}; "
                f"it has {', '.join(sorted(known))}"
            )
    parameters = {**source.parameters, "size": source.size, "seed": source.seed}
    try:
        dataset = reasoning_gym.create_dataset(source.task, **parameters)
        entries = [dataset[i] for i in range(source.size)]
    except Exception as error:  # each task validates with whatever exception it likes, assertions included
        raise DataError(
            f"reasoning-gym task {source.task} refuses {parameters}: {type(error).__name__}: {error}"
        ) from error
    return [
        Problem(
            index=i,
            messages=_chat(entry["question"], f"reasoning-gym task {source.task}, entry {i}: question", data),
            # a task with many right answers has none of its own: only its scorer can tell
            answer="" if entry["answer"] is None else str(entry["answer"]),
            metadata={"task": source.task, "parameters": parameters, "entry": entry},
        )
        for i, entry in enumerate(entries)
    ]


def _did_you_mean(near: list[str]) -> str:
    return f" (did you mean {' or '.join(near)}?)" if near else ""
