"""How samples are laid out in a row, and which part of it each context-parallel rank holds."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from megatron_pmd.actor.packing import Row, pack_microbatch
from megatron_pmd.batch import RolloutBatch, Segment
from tests.actor.tiny_models import TEMPERATURE, rollout, with_routing


@pytest.fixture
def batch() -> RolloutBatch:
    samples = rollout()
    for sample in samples:
        sample.engine_log_probs = np.zeros(len(sample.response_tokens), np.float32)
    return RolloutBatch.pack(samples, TEMPERATURE)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("samples", [[3, 0, 9], [7], []])
def test_context_ranks_hold_every_token_once_and_as_many_each(batch, size, samples):
    parts = [pack_microbatch(batch, samples, Row(4, rank, size), "cpu") for rank in range(size)]
    assert len({part.tokens.shape for part in parts}) == 1
    assert parts[0].tokens.size(1) % 4 == 0
    real = sum(int(batch.samples.lengths[s]) for s in samples)
    held = np.concatenate([part.tokens[0].numpy() for part in parts])
    whole = np.concatenate(
        [batch.tokens.ids[batch.tokens.offsets[s] : batch.tokens.offsets[s + 1]] for s in samples]
        or [np.zeros(0, np.int64)]
    )
    assert sorted(held[held > 0]) == sorted(whole[whole > 0]) and len(held) >= real
    assert parts[0].bounds[-1] == len(held)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_logits_of_each_response_token_are_on_one_rank_where_its_predecessor_is(batch, size):
    samples = [5, 11, 2]
    parts = [pack_microbatch(batch, samples, Row(1, rank, size), "cpu") for rank in range(size)]
    found = {}
    for part in parts:
        for row, which in zip(part.rows.tolist(), part.here.tolist(), strict=True):
            assert which not in found
            source = int(part.source[which])
            found[which] = (int(part.tokens[0, row]), int(part.targets[which]))
            assert found[which] == (batch.tokens.ids[source - 1], batch.tokens.ids[source])
    assert len(found) == batch.samples.response_lengths[samples].sum()


def test_a_share_gives_the_micro_batches_of_the_whole_batch_and_refuses_others():
    samples = with_routing(rollout())
    for sample in samples:
        sample.engine_log_probs = np.zeros(len(sample.response_tokens), np.float32)
    whole, mine = RolloutBatch.pack(samples, TEMPERATURE), np.array([2, 5, 11])
    share = whole.share(mine, np.zeros(whole.share_bytes(mine), np.uint8))
    share.fill(samples)
    for numbers in ([5, 11], [2], []):
        ours, expected = (pack_microbatch(batch, numbers, Row(4), "cpu") for batch in (share, whole))
        for name in ("tokens", "positions", "bounds", "rows", "here", "targets", "sequence", "experts"):
            assert getattr(ours, name).tolist() == getattr(expected, name).tolist(), name
        assert share.tokens.ids[ours.source].tolist() == whole.tokens.ids[expected.source].tolist()
    with pytest.raises(IndexError, match=r"has not all of the samples \[5, 6\]"):
        pack_microbatch(share, [5, 6], Row(4), "cpu")


def test_padding_goes_to_the_experts_of_the_first_token_of_the_rollout():
    samples = with_routing(rollout())
    for sample in samples:
        sample.engine_log_probs = np.zeros(len(sample.response_tokens), np.float32)
    batch = RolloutBatch.pack(samples, TEMPERATURE)
    assert samples[0].routed_experts is not None
    length, first = int(batch.samples.lengths[3]), samples[0].routed_experts[0]
    packed = pack_microbatch(batch, [3], Row(64), "cpu")
    assert packed.experts is not None and len(packed.experts) > length
    assert packed.experts[length:].tolist() == [first.tolist()] * (len(packed.experts) - length)


def test_two_ranks_hold_the_outer_and_the_inner_quarters_of_a_sequence():
    bounds = np.array([0, 8, 12])
    assert Row(rank=0, size=2).held(bounds).tolist() == [0, 1, 6, 7, 8, 11]
    assert Row(rank=1, size=2).held(bounds).tolist() == [2, 3, 4, 5, 9, 10]


def test_eight_ranks_share_out_a_row_of_128k_tokens_evenly_and_know_each_tokens_position():
    """A row of the long-context recipe: tokens, and pairs of them that attention compares, of each rank."""
    lengths = [133_119, 17_003, 12_001]
    rng = np.random.default_rng(0)
    samples = [
        dataclasses.replace(
            sample,
            prompt_tokens=rng.integers(1, 512, 2048),
            response_tokens=rng.integers(1, 512, length - 2048),
            engine_log_probs=np.zeros(length - 2048, np.float32),
            segments=[Segment(length - 2048, 2)],
        )
        for sample, length in zip(rollout(), lengths, strict=False)
    ]
    batch = RolloutBatch.pack(samples, TEMPERATURE)
    parts = [pack_microbatch(batch, [0, 1, 2], Row(4, rank, 8), "cpu") for rank in range(8)]
    pairs = [int((part.positions + 1).sum()) for part in parts]
    assert max(pairs) / min(pairs) < 1.001
    for part in parts:
        assert part.tokens.size(1) * 8 == int(part.bounds[-1]) <= 163_840
        assert all(length % 16 == 0 for length in np.diff(part.bounds.numpy()))
        assert part.longest == 133_120
    held = np.sort(np.concatenate([part.positions[0].numpy() for part in parts]))
    padded = sum(int(part.tokens.size(1)) for part in parts) - sum(lengths)
    expected = np.concatenate([*map(np.arange, lengths), np.zeros(padded, np.int64)])
    assert np.array_equal(held, np.sort(expected))
