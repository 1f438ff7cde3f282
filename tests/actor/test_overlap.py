"""What GPUs do beside the backward pass, done on gloo: the steps are those of doing it afterwards."""

from __future__ import annotations

import pytest

from tests.actor.launch import launch
from tests.actor.tiny_models import WEIGHT_TOLERANCE

LAYOUTS = [dict(data=2, expert=2), dict(pipeline=2)]


@pytest.mark.slow
def test_gradients_reduced_bucket_by_bucket_during_the_backward_pass_give_the_same_steps(models):
    """Shards of the optimizer are others then, so that sums over ranks round differently, in the last bit."""
    ranks = launch("overlapped", ranks=2, path=models / "qwen3moe", layouts=LAYOUTS)
    for i, layout in enumerate(LAYOUTS):
        for rank in ranks:
            (buckets, steps, weights), (whole, expected, right) = rank[i]
            assert (buckets > 1) == (rank is ranks[0] or "data" in layout) and whole == 1
            numbers, same = ([value for step in which for value in step] for which in (steps, expected))
            assert numbers == pytest.approx(same, rel=1e-5)
            difference = [float((weights[name] - right[name]).abs().max()) for name in right]
            assert max(difference, default=0.0) < WEIGHT_TOLERANCE, layout


def test_no_micro_batch_asks_the_device_for_a_number(models):
    """The host would wait for the device there, and the device for the host's next kernels."""
    (asked,) = launch("numbers_asked_for", path=models / "qwen3")
    assert len(asked["update"]) == len(asked["log_probs"]) > 3
    assert sum(asked["update"]) == sum(asked["log_probs"]) == 0
