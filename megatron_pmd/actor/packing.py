"""Samples laid out in one row for a forward pass, and the part of it that a context-parallel rank holds."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_pmd.batch import RolloutBatch
from megatron_pmd.device import on_device


@dataclass(frozen=True)
class Row:
    """How rows are laid out on a rank.

    multiple    each rank's part of a row has a length that is a multiple of this
    rank, size  this rank's place among those that share out a row's sequences (context parallelism)
    """

    multiple: int = 1
    rank: int = 0
    size: int = 1

    @property
    def sequence_multiple(self) -> int:
        return 2 * self.size if self.size > 1 else 1

    def padded(self, lengths: np.ndarray) -> np.ndarray:
        """Tokens that samples of these lengths take in a row."""
        return -(-lengths // self.sequence_multiple) * self.sequence_multiple

    def whole(self, lengths: np.ndarray) -> int:
        """Tokens of the whole row that holds samples of these lengths, its padding included."""
        multiple = math.lcm(self.multiple * self.size, self.sequence_multiple)
        return -(-max(int(self.padded(lengths).sum()), 1) // multiple) * multiple

    def held(self, bounds: np.ndarray) -> np.ndarray:
        """Where the tokens of this rank stand in the whole row, in the order it holds them.

        Of 2·size equal chunks of each sequence rank r holds the r-th from either end, so that causal
        attention costs all ranks the same; this is the order that megatron-core's rotary embedding and
        Transformer Engine's attention expect.
        """
        parts = []
        for start, end in itertools.pairwise(bounds.tolist()):
            chunk = (end - start) // (2 * self.size)
            for first in (start + self.rank * chunk, end - (self.rank + 1) * chunk):
                parts.append(np.arange(first, first + chunk))
        return np.concatenate(parts)


@dataclass(frozen=True)
class PackedMicrobatch:
    """One forward pass: several samples in one row, without attention between them.

    tokens, positions   [1, row on this rank]  the row may end in padding, a sequence of its own
    bounds              int32 [sequences + 1]  of the whole row; a sequence may end in padding
    rows                [response tokens here]  where in this rank's row the token before a response token is:
                        its logits predict it
    here                [response tokens here]  which of the response tokens those are
    targets             [response tokens]  the response tokens
    sequence            [response tokens]  index of the token's sample in `samples`
    source              [response tokens]  index of the token in the batch's arrays of the tokens here; on the
                        host, as those are
    longest             tokens of the longest sequence
    experts             [row on this rank, layers · top-k]  as recorded, None where nothing was; at padding
                        those of the rollout's first token
    supervised          whether the samples are supervised examples, not responses of the policy
    """

    samples: list[int]
    tokens: torch.Tensor
    positions: torch.Tensor
    bounds: torch.Tensor
    rows: torch.Tensor
    here: torch.Tensor
    targets: torch.Tensor
    sequence: torch.Tensor
    source: torch.Tensor
    longest: int
    experts: torch.Tensor | None
    supervised: bool

    @property
    def attention(self) -> PackedSeqParams:
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=self.bounds,
            cu_seqlens_kv=self.bounds,
            max_seqlen_q=self.longest,
            max_seqlen_kv=self.longest,
        )


def pack_microbatch(
    batch: RolloutBatch, samples: list[int], row: Row, device: Any, *, supervised: bool = False
) -> PackedMicrobatch:
    """Lay samples one after another in a row, each and the row padded as `row` asks.

    Raises IndexError for a sample whose tokens are not here.
    """
    if not np.isin(samples, batch.here).all():
        raise IndexError(f"this rank's share of the batch has not all of the samples {samples}")
    lengths = batch.samples.lengths[samples]
    starts = np.concatenate([[0], np.cumsum(row.padded(lengths))]).astype(np.int64)
    whole = row.whole(lengths)
    bounds = np.append(starts, whole) if whole > starts[-1] else starts
    tokens, positions = np.zeros(whole, np.int64), np.zeros(whole, np.int64)
    # where in the batch's arrays a token of the row comes from, -1 at padding
    origin = np.full(whole, -1)
    # where in the row, and where in the batch's arrays, each sample's response stands
    empty = np.zeros(0, np.int64)
    answers, sources = [empty], [empty]
    for sample, start, length in zip(samples, starts.tolist(), lengths.tolist(), strict=False):
        offset, prompt = int(batch.tokens.offsets[sample]), int(batch.samples.prompt_lengths[sample])
        tokens[start : start + length] = batch.tokens.ids[offset : offset + length]
        positions[start : start + length] = np.arange(length)
        origin[start : start + length] = np.arange(offset, offset + length)
        answers.append(np.arange(start + prompt, start + length))
        sources.append(np.arange(offset + prompt, offset + length))
    held = row.held(bounds) if row.size > 1 else np.arange(whole)
    place = np.full(whole, -1)
    place[held] = np.arange(len(held))
    # the logits that predict a token stand one position before it
    rows = place[np.concatenate(answers) - 1]
    here = np.flatnonzero(rows >= 0)

    def tensor(array: Any, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return on_device(torch.as_tensor(array, dtype=dtype), device)

    return PackedMicrobatch(
        samples=samples,
        tokens=tensor(tokens[held])[None],
        positions=tensor(positions[held])[None],
        bounds=tensor(bounds, torch.int32),
        rows=tensor(rows[here]),
        here=tensor(here),
        targets=tensor(tokens[np.concatenate(answers)]),
        sequence=tensor(np.repeat(np.arange(len(samples)), [len(a) for a in answers[1:]])),
        source=torch.from_numpy(np.concatenate(sources)),
        longest=int(np.diff(bounds).max()),
        experts=None if (experts := _experts(batch, origin[held])) is None else tensor(experts),
        supervised=supervised,
    )


def _experts(batch: RolloutBatch, origin: np.ndarray) -> np.ndarray | None:
    """The recorded experts of these tokens of the batch, if there are any; -1: padding."""
    if batch.padding_experts is None or batch.tokens.routed_experts is None:
        return None
    experts = np.tile(batch.padding_experts, (len(origin), 1))
    experts[origin >= 0] = batch.tokens.routed_experts[origin[origin >= 0]]
    return experts
