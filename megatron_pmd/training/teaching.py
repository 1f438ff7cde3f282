"""What a teacher adds to an iteration: how far its log-probabilities of the responses are from log π_t."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from megatron_pmd.batch import RolloutBatch
from megatron_pmd.training.subproblem import Subproblem

if TYPE_CHECKING:
    from megatron_pmd.actor.actor import AnchorReport
    from megatron_pmd.training.state import Iteration
    from megatron_pmd.training.trainer import Trainer

LogRatios = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Numbers of samples, and of each: Σ d over its counted tokens, d = log π_T − log π_t, and Σ |d|; nats."""


def taught(run: Trainer, iteration: Iteration, batch: RolloutBatch, anchor: AnchorReport) -> RolloutBatch:
    """The batch with the teacher in its rewards and advantages; as it is where there is no teacher.

    Collective. Only here is log π_t known, and a baseline is over whole groups, whose responses may be
    trained on by several ranks.
    """
    if run.config.algorithm.teacher is None:
        return batch
    found = run.control.all_gather(log_ratios(batch, anchor.log_probs.numpy()))
    values, iteration_values = together(batch, found)
    iteration.values |= iteration_values
    samples = Subproblem(run.config, iteration.number).taught(batch, values)
    return dataclasses.replace(batch, samples=samples)


def log_ratios(batch: RolloutBatch, anchor: np.ndarray) -> LogRatios:
    """Of the responses whose log π_t this rank has computed.

    anchor: fp32 [tokens here], NaN where another rank computes it
    """
    assert batch.tokens.teacher_log_probs is not None
    difference = batch.tokens.teacher_log_probs.astype(np.float64) - anchor
    here = batch.here[batch.here < batch.sampled]
    ends = batch.tokens.offsets[here + 1]
    spans = [
        slice(end - length, end)
        for end, length in zip(ends, batch.samples.response_lengths[here], strict=True)
    ]
    parts = [difference[span][batch.tokens.counted[span]] for span in spans]
    known = np.array([not np.isnan(part).any() for part in parts], bool)
    sums = np.array([(part.sum(), np.abs(part).sum()) for part in parts]).reshape(-1, 2)[known]
    return here[known], sums[:, 0], sums[:, 1]


def together(batch: RolloutBatch, found: Sequence[LogRatios]) -> tuple[np.ndarray, dict[str, float]]:
    """d of every response, and what is logged of them; found: of all ranks.

    teacher/kl             −mean d: an estimate of KL(π_t ‖ π_T) from samples of π_t, nats per response
    teacher/kl/per_token   the same, nats per counted token
    teacher/mean_abs       mean |log π_T − log π_t| of the counted tokens, nats
    """
    values, absolute = np.full(batch.sampled, np.nan), np.zeros(batch.sampled)
    for samples, sums, magnitudes in found:
        values[samples], absolute[samples] = sums, magnitudes
    assert not np.isnan(values).any(), "each response's log π_t is computed by some rank"
    tokens = max(1, int(batch.samples.counted_lengths[: batch.sampled].sum()))
    return values, {
        "teacher/kl": float(-values.sum() / max(1, batch.sampled)),
        "teacher/kl/per_token": float(-values.sum() / tokens),
        "teacher/mean_abs": float(absolute.sum() / tokens),
    }
