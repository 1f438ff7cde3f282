"""What is added to a grader's reward before the baseline is taken: length and truncation."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from megatron_pmd.algorithm.baselines import Floats, rows_by_size


def length_rewards(lengths: ArrayLike, correct: ArrayLike, groups: ArrayLike) -> Floats:
    """The group length reward of Kimi K1.5, before its weight: short correct responses gain, long ones lose.

    With λ_i = 0.5 − (len_i − min)/(max − min) over the response's group: λ_i for a correct response,
    min(0, λ_i) for a wrong one, so that being short is no merit by itself; 0 where max = min.

    lengths  [samples]  response tokens
    correct  [samples]  bool
    groups   [samples]  integer label of the sample's prompt

    Returns [samples], float64, between −0.5 and 0.5. Raises ValueError for arrays of different lengths.
    Source: arXiv 2501.12599, section 2.3.3.
    """
    tokens, right, labels = np.asarray(lengths, np.float64), np.asarray(correct, bool), np.asarray(groups)
    if not tokens.shape == right.shape == labels.shape:
        raise ValueError(f"{tokens.shape} lengths, {right.shape} verdicts, {labels.shape} group labels")
    result = np.zeros_like(tokens)
    for rows in rows_by_size(labels):
        within = tokens[rows]
        shortest = within.min(axis=1, keepdims=True)
        spread = within.max(axis=1, keepdims=True) - shortest
        share = np.divide(within - shortest, spread, out=np.full_like(within, 0.5), where=spread > 0)
        value = 0.5 - share
        result[rows] = np.where(right[rows], value, np.minimum(value, 0.0))
    return result
