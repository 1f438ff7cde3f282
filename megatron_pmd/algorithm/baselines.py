"""What is subtracted from a reward before it reaches the loss: four baselines over one prompt's responses."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Indices = NDArray[np.intp]


def advantages(rewards: ArrayLike, groups: ArrayLike, *, baseline: str, tau: ArrayLike) -> Floats:
    """Reward minus baseline, A_i = r_i − b_i.

    rewards   [samples]  any real numbers
    groups    [samples]  integer label of the sample's prompt; any labels, any order, groups of any sizes
    baseline  `mean`           b_i = (1/K) Σ_j r_j
              `mean_loo`       b_i = (1/(K−1)) Σ_{j≠i} r_j
              `partition`      b_i = τ [logsumexp_j(r_j/τ) − log K]
              `partition_loo`  b_i = τ [logsumexp_{j≠i}(r_j/τ) − log(K−1)]
    tau       regularisation strength τ, in reward units: one number, or [samples], the same within a group;
              the two means do not use it

    Returns [samples], float64, in reward units and in the order given. Equal rewards give exactly 0.
    Raises ValueError for an unknown baseline, τ ≤ 0, rewards that are not finite, labels that are not
    integers, and for a leave-one-out baseline on a group of one (naming the group).
    Source: docs/algorithm.md, "Baselines".
    """
    if baseline not in BASELINES:
        raise ValueError(f"baseline {baseline!r} is not one of {', '.join(BASELINES)}")
    values = np.asarray(rewards, dtype=np.float64)
    taus = np.broadcast_to(np.asarray(tau, np.float64), values.shape)
    if not (taus > 0).all():
        raise ValueError(f"tau must be positive, got {taus.min() if taus.size else tau!r}")
    labels = np.asarray(groups)
    if values.shape != labels.shape:
        raise ValueError(f"{values.shape} rewards for {labels.shape} group labels: one label a sample")
    if not np.isfinite(values).all():
        at = int(np.flatnonzero(~np.isfinite(values))[0])
        raise ValueError(f"the reward of sample {at} (group {labels[at]}) is {values[at]}")

    result = np.empty_like(values)
    for rows in rows_by_size(labels):
        if rows.shape[1] == 1 and baseline.endswith("_loo"):
            raise ValueError(
                f"group {labels[rows[0, 0]]} has one sample: baseline {baseline} leaves one out, it needs two"
            )
        # Measured from the group's maximum no exponential overflows, and equal rewards are exact zeros.
        below = values[rows] - values[rows].max(axis=1, keepdims=True)
        result[rows] = below - BASELINES[baseline](below, taus[rows[:, :1]])
    return result


def per_standard_deviation(values: ArrayLike, groups: ArrayLike, *, epsilon: float = 1e-6) -> Floats:
    """Advantages over their group's sample standard deviation plus `epsilon`: GRPO's optional normalisation.

    values [samples], groups [samples] as in `advantages`; returns [samples]. A group of one is left as it is.
    Source: arXiv 2402.03300, with the n−1 deviation of the public implementations.
    """
    result = np.array(values, dtype=np.float64)
    for rows in rows_by_size(np.asarray(groups)):
        if rows.shape[1] > 1:
            result[rows] /= result[rows].std(axis=1, ddof=1, keepdims=True) + epsilon
    return result


def rows_by_size(groups: NDArray[np.generic]) -> list[Indices]:
    """Sample indices of the groups, one array [groups of that size, K] for each group size K that occurs.

    Within a row the samples keep their order. Raises ValueError for labels that are not integers.
    """
    if groups.ndim != 1 or (groups.size and groups.dtype.kind not in "iu"):
        raise ValueError(
            f"group labels must be integers [samples], got {groups.dtype} of shape {groups.shape}"
        )
    _, inverse, counts = np.unique(groups, return_inverse=True, return_counts=True)
    order = np.argsort(inverse, kind="stable")
    starts = np.cumsum(counts) - counts
    return [order[starts[counts == size][:, None] + np.arange(size)] for size in np.unique(counts)]


# The four functions below take `below` [groups, K], each row's maximum already subtracted (so it is 0), and
# tau [groups, 1]; they return the baseline measured from that maximum.


def _mean(below: Floats, tau: Floats) -> Floats:
    return below.mean(axis=1, keepdims=True)


def _mean_loo(below: Floats, tau: Floats) -> Floats:
    return (below.sum(axis=1, keepdims=True) - below) / (below.shape[1] - 1)


def _partition(below: Floats, tau: Floats) -> Floats:
    # log1p and expm1 keep all digits as τ → ∞, where this tends to the mean.
    return tau * np.log1p(np.expm1(below / tau).mean(axis=1, keepdims=True))


def _partition_loo(below: Floats, tau: Floats) -> Floats:
    groups, size = below.shape
    excess = np.expm1(below / tau)
    rest = (excess.sum(axis=1, keepdims=True) - excess) / (size - 1)

    # Without its largest term a row has another maximum. Shifting by the old one would underflow to log(0) at
    # small τ: the lone success among failures would lose its advantage.
    top = below.argmax(axis=1)[:, None]
    others = below[np.arange(size) != top].reshape(groups, size - 1)
    second = others.max(axis=1, keepdims=True)
    np.put_along_axis(rest, top, 0.0, axis=1)
    baseline = tau * np.log1p(rest)
    np.put_along_axis(baseline, top, second + _partition(others - second, tau), axis=1)
    return baseline


BASELINES: dict[str, Callable[[Floats, Floats], Floats]] = {
    "mean": _mean,
    "mean_loo": _mean_loo,
    "partition": _partition,
    "partition_loo": _partition_loo,
}
