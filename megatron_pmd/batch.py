"""What a rollout is: samples, their file, and the packed arrays that travel to the actor ranks."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_pmd.errors import DataError, StaleWeights

NOT_SAMPLED = -1
"""In place of a weight version: the token is the prompt's, or was inserted (tool output)."""


@dataclass(frozen=True)
class Segment:
    """Consecutive response tokens of one origin."""

    tokens: int
    """How many."""
    weight_version: int
    """The weights that sampled them; NOT_SAMPLED for inserted ones."""
    counted: bool = True
    """Whether they count in the loss: not those that were inserted, nor what a setting excludes."""


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
    """log π_b of each response token at the sampling temperature; 0 for inserted ones."""
    finish_reason: str
    """`stop`, `length` or `repetition`."""
    weight_version: int
    """The weights that sampled its last token."""
    seed: int
    reward: float = 0.0
    shaped_reward: float = 0.0
    """The reward with what length and truncation add or take; the advantage is measured in it."""
    advantage: float = 0.0
    reward_error: str | None = None
    """Why the reward is 0 although the grader gave no verdict."""
    segments: list[Segment] = field(default_factory=list)
    """The response in order; if none are given, one: sampled under weight_version, all of it counted."""
    routed_experts: bytes | None = None
    """Which experts each token but the last went to: uint16 [prompt + response − 1, layers, top-k]."""

    def __post_init__(self) -> None:
        if not self.segments:
            self.segments = [Segment(len(self.response_tokens), self.weight_version)]


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
        ("shaped_reward", pa.float64()),
        ("advantage", pa.float64()),
        ("reward_error", pa.string()),
        (
            "segments",
            pa.list_(
                pa.struct([("tokens", pa.int32()), ("weight_version", pa.int64()), ("counted", pa.bool_())])
            ),
        ),
        ("routed_experts", pa.binary()),
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
        rows = table.to_pylist()
        samples = [Sample(**row | {"segments": [Segment(**s) for s in row["segments"]]}) for row in rows]
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
    rewards, advantages float64 [samples]  rewards are the shaped ones
    weight_version   the engines' weights when the rollout was taken: those of the actor's log π_t
    token_versions   int32   [tokens]  the weights that sampled it; NOT_SAMPLED: prompt, or inserted
    counted          bool    [tokens]  whether it counts in the loss; False at prompt tokens
    temperature      of the policy that all log-probabilities are of
    examples         the last so many samples are supervised examples, not sampled responses
    routed_experts   uint16  [tokens, layers · top-k]  None: not recorded. A sample's last token, which goes
                             nowhere in the engine, has its predecessor's
    """

    tokens: np.ndarray
    engine_log_probs: np.ndarray
    offsets: np.ndarray
    prompt_lengths: np.ndarray
    groups: np.ndarray
    rewards: np.ndarray
    advantages: np.ndarray
    weight_version: int
    token_versions: np.ndarray
    counted: np.ndarray
    temperature: float
    examples: int = 0
    routed_experts: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    @property
    def sampled(self) -> int:
        """Responses of the policy: samples before the supervised examples."""
        return len(self) - self.examples

    @property
    def lengths(self) -> np.ndarray:
        """Prompt plus response tokens of each sample."""
        return np.diff(self.offsets)

    @property
    def response_lengths(self) -> np.ndarray:
        return self.lengths - self.prompt_lengths

    @classmethod
    def pack(
        cls,
        samples: list[Sample],
        temperature: float,
        *,
        examples: Sequence[Sample] = (),
        weight_version: int | None = None,
    ) -> RolloutBatch:
        """Sampled responses, then supervised examples, as arrays.

        weight_version: see there; None: the newest that any sample has.
        """
        samples = [*samples, *examples]
        lengths = [len(s.prompt_tokens) + len(s.response_tokens) for s in samples]
        pieces = [
            piece
            for s in samples
            for piece in (Segment(len(s.prompt_tokens), NOT_SAMPLED, counted=False), *s.segments)
        ]
        piece_lengths = [piece.tokens for piece in pieces]
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
            rewards=np.array([s.shaped_reward for s in samples], np.float64),
            advantages=np.array([s.advantage for s in samples], np.float64),
            weight_version=(
                max(s.weight_version for s in samples) if weight_version is None else weight_version
            ),
            token_versions=np.repeat(np.array([p.weight_version for p in pieces], np.int32), piece_lengths),
            counted=np.repeat(np.array([p.counted for p in pieces], bool), piece_lengths),
            temperature=temperature,
            examples=len(examples),
            routed_experts=_routing(samples, lengths),
        )

    def check_routing(self, width: int) -> None:
        """DataError unless each token has `width` recorded experts: layers · top-k."""
        found = 0 if self.routed_experts is None else self.routed_experts.shape[1]
        if found != width:
            raise DataError(
                f"actor.experts.replay_routing: the rollout has {found} recorded experts a token, "
                f"this model chooses {width}; was it drawn with the setting on, by the same model?"
            )

    def refuse_undeclared_versions(self, max_staleness: int) -> None:
        """StaleWeights unless every sampled token is of the batch's weights or of at most so many before."""
        sampled = self.token_versions[self.token_versions != NOT_SAMPLED]
        oldest = self.weight_version - max_staleness
        found = sorted(set(sampled[(sampled < oldest) | (sampled > self.weight_version)].tolist()))
        if found:
            raise StaleWeights(
                f"the rollout of weight version {self.weight_version} has tokens sampled under {found}; "
                + (
                    f"rollout.partial.max_staleness={max_staleness} declares {oldest} the oldest"
                    if max_staleness
                    else "without rollout.partial all of it must be of one version"
                )
            )


def _routing(samples: list[Sample], lengths: list[int]) -> np.ndarray | None:
    """The samples' recorded experts, a row a token; None if any sample has none."""
    parts = []
    for sample, length in zip(samples, lengths, strict=True):
        recorded = np.frombuffer(sample.routed_experts or b"", np.uint16)
        if not len(recorded) or len(recorded) % (length - 1):
            return None
        rows = recorded.reshape(length - 1, -1)
        parts += [rows, rows[-1:]]
    return np.concatenate(parts) if len({part.shape[1] for part in parts}) == 1 else None
