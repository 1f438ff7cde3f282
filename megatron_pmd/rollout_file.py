"""The file of a rollout: Parquet, one row a sample, written from arrays and beside training."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as compute
import pyarrow.parquet as pq

from megatron_pmd.batch import Sample, Segment
from megatron_pmd.errors import DataError
from megatron_pmd.files import whole_file

TOKENS = {
    "prompt_tokens": np.int32,
    "response_tokens": np.int32,
    "engine_log_probs": np.float32,
    "teacher_log_probs": np.float32,
}
SEGMENTS = pa.struct(
    [
        ("tokens", pa.int32()),
        ("weight_version", pa.int64()),
        ("counted", pa.bool_()),
        ("stale_cache", pa.bool_()),
    ]
)
SCHEMA = pa.schema(
    [
        ("group", pa.int32()),
        ("number", pa.int32()),
        ("branch", pa.int32()),
        ("source", pa.string()),
        ("problem", pa.int64()),
        ("prompt", pa.string()),
        ("response", pa.string()),
        ("answer", pa.string()),
        ("prompt_tokens", pa.list_(pa.int32())),
        ("response_tokens", pa.list_(pa.int32())),
        ("engine_log_probs", pa.list_(pa.float32())),
        ("finish_reason", pa.string()),
        ("weight_version", pa.int64()),
        ("seed", pa.int64()),
        ("reward", pa.float64()),
        ("shaped_reward", pa.float64()),
        ("advantage", pa.float64()),
        ("reward_error", pa.string()),
        ("segments", pa.list_(SEGMENTS)),
        ("routed_experts", pa.binary()),
    ]
)
TEACHER = pa.field("teacher_log_probs", pa.list_(pa.float32()))
"""A further column, where a teacher has scored all responses."""
ROUTING_TYPE = "routed_experts"
"""Metadata: the type of the numbers in that column. A file without it has uint16."""
ROWS_TOGETHER, BYTES_TOGETHER = 256, 2**29
"""Samples of one row group, fewer where they have more bytes of recorded routing than this: what is copied
to be written, and less than the 2 GiB that a column of bytes can have."""


def write_rollout(path: Path, samples: Sequence[Sample], iteration: int) -> None:
    """Write a rollout as Parquet, one row a sample, under its final name only when complete."""
    routing = _routing_type(samples)
    scored = bool(samples) and all(sample.teacher_log_probs is not None for sample in samples)
    schema = (SCHEMA.append(TEACHER) if scored else SCHEMA).with_metadata(
        {"iteration": json.dumps(iteration), ROUTING_TYPE: routing.name}
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial, _writer(partial, schema) as writer:
        rows = _rows_together(samples, routing)
        for first in range(0, len(samples), rows):
            writer.write_table(_table(samples[first : first + rows], schema, routing))


def _writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    """Compressed but for the experts, which would take five times as long and become no smaller."""
    texts = [field.name for field in schema if pa.types.is_string(field.type)]
    single = [field.name for field in schema if not pa.types.is_nested(field.type)]
    return pq.ParquetWriter(
        path,
        schema,
        use_dictionary=texts,  # of numbers that hardly repeat it costs time and makes no file smaller
        write_statistics=[name for name in single if name != "routed_experts"],
        compression={name: "none" if name == "routed_experts" else "snappy" for name in _leaves(schema)},
    )


def _leaves(schema: pa.Schema) -> list[str]:
    """The columns as Parquet names them: one for each number of a list or of a list's records."""
    names = []
    for field in schema:
        inner = field.type.value_type if pa.types.is_list(field.type) else None
        if inner is None:
            names.append(field.name)
        elif pa.types.is_struct(inner):
            names += [f"{field.name}.list.element.{part.name}" for part in inner]
        else:
            names.append(f"{field.name}.list.element")
    return names


def _routing_type(samples: Iterable[Sample]) -> np.dtype:
    """The type that holds the recorded experts of all samples."""
    types = {s.routed_experts.dtype for s in samples if s.routed_experts is not None}
    return np.result_type(*types) if types else np.dtype(np.uint16)


def _rows_together(samples: Iterable[Sample], routing: np.dtype) -> int:
    largest = max((s.routed_experts.size for s in samples if s.routed_experts is not None), default=0)
    return min(ROWS_TOGETHER, max(1, BYTES_TOGETHER // max(1, largest * routing.itemsize)))


def _table(samples: Sequence[Sample], schema: pa.Schema, routing: np.dtype) -> pa.Table:
    columns: list[pa.Array] = []
    for field in schema:
        values = [getattr(sample, field.name) for sample in samples]
        if field.name in TOKENS:
            flat, offsets = _joined(values, TOKENS[field.name])
            columns.append(pa.ListArray.from_arrays(offsets, flat, type=field.type))
        elif field.name == "routed_experts":
            columns.append(_binary(values, routing))
        elif field.name == "segments":
            rows = [[vars(segment) for segment in segments] for segments in values]
            columns.append(pa.array(rows, field.type))
        else:
            columns.append(pa.array(values, field.type))
    return pa.Table.from_arrays(columns, schema=schema)


def _joined(arrays: Sequence[Any], dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    """The arrays one behind the other, and where each begins; the last number is where all end."""
    offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int32)
    return np.concatenate([np.empty(0, dtype), *arrays], dtype=dtype, casting="unsafe"), offsets


def _binary(arrays: Sequence[np.ndarray | None], routing: np.dtype) -> pa.Array:
    """Their bytes, in this type; null for None."""
    nothing = np.empty(0, np.uint8)
    flat, offsets = _joined(
        [nothing if a is None else a.astype(routing, copy=False).reshape(-1).view(np.uint8) for a in arrays],
        np.uint8,
    )
    there = np.packbits([a is not None for a in arrays], bitorder="little")
    buffers = [pa.py_buffer(there), pa.py_buffer(offsets), pa.py_buffer(flat)]
    return pa.Array.from_buffers(pa.binary(), len(arrays), buffers)


def read_rollout(path: Path) -> tuple[list[Sample], int]:
    """Read a rollout written by write_rollout; returns its samples and its iteration."""
    with _opened(path) as (file, iteration):
        metadata = file.schema_arrow.metadata
        routing = np.dtype(metadata.get(ROUTING_TYPE.encode(), b"uint16").decode())
        samples = [
            sample
            for number in range(file.num_row_groups)
            for sample in _samples(file.read_row_group(number), routing)
        ]
    if not samples:
        raise DataError(f"{path}: the rollout holds no samples")
    return samples, iteration


def read_lengths(path: Path) -> list[tuple[int, list[int]]]:
    """Of each group in a rollout file, or in all of a folder: tokens of its prompt, and of its responses.

    Raises DataError where there is no rollout.
    """
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    groups: dict[tuple[Path, int], tuple[int, list[int]]] = {}
    for name in files:
        with _opened(name) as (file, _):
            rows = file.read(columns=["group", "prompt_tokens", "response_tokens"])
        prompts, responses = (
            compute.list_value_length(rows[column]).to_pylist()
            for column in ("prompt_tokens", "response_tokens")
        )
        for group, prompt, response in zip(rows["group"].to_pylist(), prompts, responses, strict=True):
            groups.setdefault((name, group), (prompt, []))[1].append(response)
    if not groups:
        raise DataError(f"{path}: holds no rollout; a run writes them to runs/NAME/rollouts")
    return list(groups.values())


def check_rollouts(path: Path, iterations: range, *, scored: bool = False) -> None:
    """DataError unless a file, or a folder of files, has the rollout of each of these iterations.

    scored: with a teacher's log-probabilities. No samples are read: whoever trains on them finds out at the
    start, not after the last one that is there.
    """
    if not path.exists():
        raise DataError(f"{path}: no such rollout file or folder")
    for wanted in iterations:
        file = path / f"{wanted}.parquet" if path.is_dir() else path
        if not file.is_file():
            raise DataError(
                f"{file}: no such file; iterations {iterations[0]} to {iterations[-1]} are to be trained, "
                f"each on its own rollout: set iterations={wanted}, or give a folder that has them all"
            )
        with _opened(file) as (content, found):
            if scored and TEACHER.name not in content.schema_arrow.names:
                raise DataError(
                    f"{file}: the rollout has no teacher's log-probabilities, and algorithm.teacher is set: "
                    "give the rollouts of a run with a teacher, or set algorithm.teacher=null"
                )
            if found != wanted and wanted == iterations[0]:
                raise DataError(f"{file}: this is the rollout of iteration {found}, not of {wanted}")
            if found != wanted:
                raise DataError(
                    f"{file}: this is the rollout of iteration {found} alone, and iterations {iterations[0]} "
                    f"to {iterations[-1]} are to be trained: give the folder of all, or iterations={wanted}"
                )


@contextmanager
def _opened(path: Path) -> Iterator[tuple[pq.ParquetFile, int]]:
    """A rollout file and its iteration. DataError for another file, also where reading it goes wrong."""
    try:
        with pq.ParquetFile(path) as file:
            yield file, json.loads(file.schema_arrow.metadata[b"iteration"])
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: not a rollout file of this program: {error}") from None


def _samples(table: pa.Table, routing: np.dtype) -> Iterator[Sample]:
    """The rows of a row group; their arrays lie in its memory, or in what is read of it."""
    names = [name for name in TOKENS if name in table.column_names]
    arrays = {name: _rows(table[name].combine_chunks()) for name in names}
    recorded = table["routed_experts"]
    for number, row in enumerate(table.drop_columns([*names, "routed_experts"]).to_pylist()):
        row["segments"] = [Segment(**segment) for segment in row["segments"]]
        sample = Sample(**row | {name: rows[number] for name, rows in arrays.items()})
        if recorded[number].is_valid:
            tokens_sent = len(sample.prompt_tokens) + len(sample.response_tokens) - 1
            numbers = np.frombuffer(recorded[number].as_buffer(), routing)
            if tokens_sent and numbers.size % tokens_sent == 0:
                sample.routed_experts = numbers.reshape(tokens_sent, -1)
        yield sample


def _rows(column: pa.ListArray) -> list[np.ndarray]:
    values = column.values.to_numpy()
    return np.split(values, column.offsets.to_numpy()[1:])[: len(column)]


class RolloutWriter:
    """Writes rollouts in a thread, one after another, while the driver goes on."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollout-file")
        self._begun: Future[None] | None = None

    def begin(self, path: Path, samples: Sequence[Sample], iteration: int) -> None:
        """As write_rollout, which goes on after this returns: nobody may change the samples until wait().

        Waits for the file before it.
        """
        self.wait()
        self._begun = self._thread.submit(write_rollout, path, samples, iteration)

    def wait(self) -> None:
        """Return when the file is there. Raises what went wrong with it."""
        begun, self._begun = self._begun, None
        if begun is not None:
            begun.result()
