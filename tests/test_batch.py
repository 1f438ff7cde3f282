"""A rollout's file and its packed arrays say of every token where it is from and whether it counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from megatron_pmd.batch import NOT_SAMPLED, RolloutBatch, Sample, Segment
from megatron_pmd.errors import StaleWeights
from megatron_pmd.rollout_file import read_rollout, write_rollout


def sample(response: int, **changes: Any) -> Sample:
    values: dict[str, Any] = dict(
        group=0, number=0, problem=4, prompt="?", response="!", answer="!", prompt_tokens=[1, 2],
        response_tokens=list(range(10, 10 + response)), engine_log_probs=[-0.5] * response,
        finish_reason="stop", weight_version=7, seed=3,
    )  # fmt: skip
    return Sample(**values | changes)


def plain(s: Sample) -> dict[str, Any]:
    """All that is in it, in lists."""
    return {
        name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in vars(s).items()
    }


MIXED = [Segment(2, 5, counted=False), Segment(1, NOT_SAMPLED, counted=False), Segment(1, 7)]


def test_packed_tokens_carry_version_and_count_of_their_segment():
    batch = RolloutBatch.pack([sample(4, segments=MIXED), sample(3, number=1)], 1.0)
    assert batch.tokens.ids.tolist() == [1, 2, 10, 11, 12, 13, 1, 2, 10, 11, 12]
    assert batch.tokens.policies.tolist() == [-1, -1, 5, 5, -1, 7, -1, -1, 7, 7, 7]
    assert batch.tokens.counted.tolist() == [False] * 5 + [True] + [False] * 2 + [True] * 3
    assert batch.weight_version == 7


def test_what_was_sampled_over_a_cache_of_earlier_weights_is_of_no_policy_and_counts_in_file_and_loss(
    tmp_path,
):
    stale = [Segment(2, 6), Segment(2, 7, stale_cache=True), Segment(1, 7)]
    batch = RolloutBatch.pack([written := sample(5, segments=stale)], 1.0)
    assert batch.tokens.policies.tolist() == [-1, -1, 6, 6, -2, -2, 7]
    assert batch.tokens.counted.tolist() == [False] * 2 + [True] * 5 and batch.sampled_versions == [6, 7]
    write_rollout(tmp_path / "7.parquet", [written], 7)
    assert read_rollout(tmp_path / "7.parquet")[0][0].segments == stale


def test_packed_tokens_carry_the_teachers_log_probabilities_where_all_responses_have_them():
    scored, example = sample(2, teacher_log_probs=np.array([-1.0, -2.0], np.float32)), sample(3, number=1)
    given = RolloutBatch.pack([scored], 1.0, examples=[example]).tokens.teacher_log_probs
    assert given is not None and given.tolist() == [0, 0, -1, -2, *[0] * 5]
    assert RolloutBatch.pack([scored, example], 1.0).tokens.teacher_log_probs is None


def test_a_rollout_file_keeps_the_segments(tmp_path):
    written = [sample(4, segments=MIXED, reward=1.0), sample(3, number=1)]
    write_rollout(tmp_path / "7.parquet", written, 7)
    read, iteration = read_rollout(tmp_path / "7.parquet")
    assert iteration == 7 and [plain(s) for s in read] == [plain(s) for s in written]


def test_mixed_versions_are_refused_unless_declared_and_named():
    batch = RolloutBatch.pack([sample(4, segments=MIXED)], 1.0)
    with pytest.raises(
        StaleWeights, match=r"version 7 has tokens sampled under \[5\]; without rollout\.part"
    ):
        batch.refuse_undeclared_versions(0)
    with pytest.raises(StaleWeights, match=r"under \[5\].*staleness=1 declares 6 the oldest"):
        batch.refuse_undeclared_versions(1)
    batch.refuse_undeclared_versions(2)
    newer = RolloutBatch.pack([sample(3)], 1.0, weight_version=6)
    with pytest.raises(StaleWeights, match=r"\[7\]"):
        newer.refuse_undeclared_versions(2)


def routed(response: int, largest: int, **changes: Any) -> Sample:
    """With three recorded experts a token; the largest number is in the last row."""
    tokens = response + 1
    recorded = np.arange(3 * tokens, dtype=np.uint16)
    recorded[-1] = largest
    return sample(response, routed_experts=recorded.reshape(tokens, 3), **changes)


@pytest.mark.parametrize(("largest", "dtype"), [(255, np.uint8), (256, np.uint16)])
def test_recorded_experts_take_one_byte_each_where_their_numbers_fit(largest, dtype):
    batch = RolloutBatch.pack([routed(2, 4), routed(2, largest, number=1)], 1.0)
    rows = [
        [0, 1, 2],
        [3, 4, 5],
        [6, 7, 4],
        [6, 7, 4],
        [0, 1, 2],
        [3, 4, 5],
        [6, 7, largest],
        [6, 7, largest],
    ]
    assert batch.tokens.routed_experts is not None and batch.tokens.routed_experts.tolist() == rows
    assert batch.tokens.routed_experts.dtype == dtype
    assert batch.share_bytes(np.array([1])) == 4 * (4 + 4 + 4 + 1 + 3 * np.dtype(dtype).itemsize)


def test_a_share_has_the_numbers_of_every_sample_and_the_tokens_of_its_own():
    samples = [sample(4, segments=MIXED), sample(3, number=1), sample(1, number=2)]
    known = RolloutBatch.describe(samples, 1.0, examples=1)
    assert (len(known), len(known.tokens), known.here.tolist()) == (3, 0, [])
    mine = np.array([0, 2])
    share = known.share(mine, np.zeros(known.share_bytes(mine), np.uint8))
    share.fill(samples)
    assert share.here.tolist() == [0, 2] and share.tokens.offsets.tolist() == [0, 6, 6, 9]
    assert share.tokens.ids.tolist() == [1, 2, 10, 11, 12, 13, 1, 2, 10]
    assert share.tokens.policies.tolist() == [-1, -1, 5, 5, -1, 7, -1, -1, 7]
    for batch in (known, share):
        assert batch.samples.lengths.tolist() == [6, 5, 3] and batch.samples.counted_lengths.tolist() == [
            1,
            3,
            1,
        ]
        assert batch.sampled_versions == [5, 7] and batch.sampled == 2
