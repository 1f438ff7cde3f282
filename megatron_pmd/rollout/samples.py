"""What a rollout is: samples, their file, and the packed arrays that travel to the actor ranks."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_pmd.errors import DataError


@dataclass
class Sample:
    """One response to one prompt."""

    group: int
    """Which prompt of this rollout, from 0; samples of one prompt share it."""
    number: int
    """Which response of its group, from 0."""
    problem: int
    """The problem's index in its data source."""
    prompt: str
    """The rendered prompt text, for people."""
    response: str
    """The decoded response, without special tokens; this is what is graded."""
    answer: str
    prompt_tokens: list[int]
    response_tokens: list[int]
    engine_log_probs: list[float]
    """log π_b of each response token at the sampling temperature."""
    finish_reason: str
    """`stop` or `length`."""
    weight_version: int
    seed: int
    reward: float = 0.0
    advantage: float = 0.0
    reward_error: str | None = None
    """Why the reward is 0 although the grader gave no verdict."""


SCHEMA = pa.schema(
    [
        ("group", pa.int32()),
        ("number", pa.int32()),
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
        ("advantage", pa.float64()),
        ("reward_error", pa.string()),
    ]
)


def write_rollout(path: Path, samples: list[Sample], iteration: int) -> None:
    """Write a rollout as Parquet, one row a sample, under its final name only when complete."""
    schema = SCHEMA.with_metadata({"iteration": json.dumps(iteration)})
    table = pa.Table.from_pylist([dataclasses.asdict(s) for s in samples], schema=schema)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    pq.write_table(table, partial)
    partial.rename(path)


def read_rollout(path: Path) -> tuple[list[Sample], int]:
    """Read a rollout written by write_rollout; returns its samples and its iteration."""
    try:
        table = pq.read_table(path)
        iteration = json.loads(table.schema.metadata[b"iteration"])
        samples = [Sample(**row) for row in table.to_pylist()]
    except (OSError, pa.ArrowException, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a rollout file of this program: {error}") from None
    if not samples:
        raise DataError(f"{path}: the rollout holds no samples")
    return samples, iteration


@dataclass
class RolloutBatch:
    """A rollout as packed arrays: sample i owns tokens[offsets[i] : offsets[i + 1]], prompt first.

    tokens           int32   [tokens]
    engine_log_probs float32 [tokens]  0 at prompt tokens
    offsets          int64   [samples + 1]
    prompt_lengths   int64   [samples]
    groups           int64   [samples]
    rewards, advantages float64 [samples]
    weight_versions  int64   [samples]
    """

    tokens: np.ndarray
    engine_log_probs: np.ndarray
    offsets: np.ndarray
    prompt_lengths: np.ndarray
    groups: np.ndarray
    rewards: np.ndarray
    advantages: np.ndarray
    weight_versions: np.ndarray

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    @property
    def lengths(self) -> np.ndarray:
        """Prompt plus response tokens of each sample."""
        return np.diff(self.offsets)

    @property
    def response_lengths(self) -> np.ndarray:
        return self.lengths - self.prompt_lengths

    @classmethod
    def pack(cls, samples: list[Sample]) -> RolloutBatch:
        lengths = [len(s.prompt_tokens) + len(s.response_tokens) for s in samples]
        return cls(
            tokens=np.concatenate(
                [np.asarray(s.prompt_tokens + s.response_tokens, np.int32) for s in samples]
            ),
            engine_log_probs=np.concatenate(
                [np.asarray([0.0] * len(s.prompt_tokens) + s.engine_log_probs, np.float32) for s in samples]
            ),
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            prompt_lengths=np.array([len(s.prompt_tokens) for s in samples], np.int64),
            groups=np.array([s.group for s in samples], np.int64),
            rewards=np.array([s.reward for s in samples], np.float64),
            advantages=np.array([s.advantage for s in samples], np.float64),
            weight_versions=np.array([s.weight_version for s in samples], np.int64),
        )
