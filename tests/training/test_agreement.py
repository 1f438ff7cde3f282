"""When engines and actor disagree about the rollout's tokens too much to be of the same weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_pmd.actor.actor import AnchorReport
from megatron_pmd.algorithm.diagnostics import magnitude_histogram
from megatron_pmd.config.run import LOG_PROB_BOUNDS
from megatron_pmd.errors import StaleWeights
from megatron_pmd.training.metrics import anchor_values
from megatron_pmd.training.phases import refuse_disagreement

TOKENS = 400_000


def differences(mean: float) -> np.ndarray:
    """|d| of this mean, with the tail of an exponential distribution."""
    return np.random.default_rng(0).exponential(mean, TOKENS)


def judge(values: np.ndarray, precision: str) -> dict[str, float]:
    """The check of a rollout with these differences, half of them on each of two ranks."""
    reports = [
        AnchorReport(
            torch.empty(0), float(d.sum()), float(d.max()), magnitude_histogram(d), 0.0, len(d), len(d)
        )
        for d in np.split(values, 2)
    ]
    found = anchor_values(reports)
    refuse_disagreement(found, LOG_PROB_BOUNDS[precision], 7, TOKENS, "a cause")
    return found


def test_one_token_of_many_that_differs_by_20_nats_ends_nothing_and_is_reported():
    values = differences(0.03)
    values[7] = 20.0
    assert judge(values, "bf16")["sync/max_abs_difference"] == 20.0


@pytest.mark.parametrize(("precision", "mean"), [("fp32", 1e-6), ("bf16", 0.045), ("fp8", 0.15)])
def test_what_kernels_explain_is_let_through(precision, mean):
    """fp32: docs/benchmarks.md. bf16: most of the demo's. FP8: the middle of its range."""
    judge(differences(mean), precision)


def test_few_tokens_far_off_are_found_by_the_quantile_where_the_mean_sees_nothing():
    """One token in fifty differs by 4 nats: 0.08 on average, which the mean would let through."""
    values = differences(0.01)
    values[::50] = 4.0
    with pytest.raises(StaleWeights) as raised:
        judge(values, "bf16")
    mean = values.mean()
    assert mean < LOG_PROB_BOUNDS["bf16"][0]
    words = f"{mean:.2e} on average, by 4.* at the 99th percentile and by 4.00e\\+00 at most over 400000"
    assert raised.match(words) and "version 7" in str(raised.value) and "a cause" in str(raised.value)


def test_all_tokens_off_by_a_little_too_much_are_found_by_the_mean():
    with pytest.raises(StaleWeights, match=r"bounds on the first two: 0\.1 and 2"):
        judge(differences(0.11), "bf16")


def test_a_difference_that_is_no_number_is_refused():
    values = differences(0.01)
    report = AnchorReport(torch.empty(0), float("nan"), 0.0, magnitude_histogram(values), 0.0, TOKENS, TOKENS)
    with pytest.raises(StaleWeights):
        refuse_disagreement(anchor_values([report]), LOG_PROB_BOUNDS["bf16"], 0, TOKENS, "")
