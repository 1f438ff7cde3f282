"""What a rollout costs on its way from responses to shares; the figures are in docs/benchmarks.md."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from megatron_pmd.batch import RolloutBatch
from megatron_pmd.rollout_file import read_rollout, write_rollout
from tools.bench.batch import EXPERTS, LAYERS, TOP_K, Responses

TOKENS = 4096


@pytest.mark.parametrize(("count", "routing"), [(64, False), (16, True)])
def test_responses_become_shares_in_at_most_twice_the_shares_bytes(count: int, routing: bool) -> None:
    """A number as a Python object in a list is 40 bytes; a packed token is 13."""
    responses = Responses.make(count, TOKENS, routing)
    everything = np.arange(count)
    tracemalloc.start()
    try:
        samples = responses.samples()
        known = RolloutBatch.describe(samples, 1.0)
        nbytes = known.share_bytes(everything)
        share = known.share(everything, np.empty(nbytes, np.uint8))
        share.fill(samples)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert nbytes == count * TOKENS * (13 + routing * LAYERS * TOP_K)
    assert peak <= 2 * nbytes
    assert share.tokens.engine_log_probs.min() < 0
    if routing:
        assert share.tokens.routed_experts is not None and share.tokens.routed_experts.max() < EXPERTS


def test_what_is_drawn_of_responses_is_in_the_rollouts_file(tmp_path: Path) -> None:
    samples = Responses.make(32, TOKENS, routing=False).samples()
    write_rollout(tmp_path / "0.parquet", samples, 0)
    read, _ = read_rollout(tmp_path / "0.parquet")
    for before, after in zip(samples, read, strict=True):
        assert np.array_equal(before.tokens, after.tokens)
        assert np.array_equal(before.engine_log_probs, after.engine_log_probs)
