"""What should make a person look at a run: pure functions of an iteration's values and of earlier ones.

An iteration's values are those of its `iteration` line in metrics.jsonl. Each alarm returns what it saw, or
None. Source: docs/algorithm.md, "Alarms".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median

Values = Mapping[str, float]

LEAST_HISTORY = 3
"""Iterations that a comparison with earlier ones needs."""
NEGLIGIBLE_NATS = 1e-3
"""Differences of log-probabilities below this are numerics or stand-still: their growth means nothing."""


def mismatch_growth(now: Values, earlier: Sequence[Values], threshold: float) -> str | None:
    """|log π_t − log π_b| per token over `threshold` times its median so far: engine and trainer drift
    apart."""
    return _grown("mismatch/mean_abs", now, earlier, threshold)


def mismatch_max(now: Values, earlier: Sequence[Values], threshold: float) -> str | None:
    """|log π_t − log π_b| of one of the rollout's tokens over `threshold` nats: the two disagree about it."""
    return _above("sync/max_abs_difference", now, threshold)


def kl_jump(now: Values, earlier: Sequence[Values], threshold: float) -> str | None:
    """KL(π_t ‖ π_θ) at the iteration's last step over `threshold` times its median so far: an update too
    large. Times what rounding alone makes of it, where that is more."""
    return _grown("pmd/kl_anchor_k3", now, earlier, threshold, floor=now.get("pmd/kl_anchor_k3/floor", 0.0))


def progress(now: Values, earlier: Sequence[Values], threshold: float) -> str | None:
    """PMD progress over the iteration's steps over `threshold`: the regression overshoots its target."""
    return _above("pmd/progress", now, threshold)


def zero_advantage_groups(now: Values, earlier: Sequence[Values], threshold: float) -> str | None:
    """More than `threshold` of the groups have equal rewards: most of the rollout teaches nothing."""
    return _above("pmd/zero_advantage_groups", now, threshold)


def entropy_collapse(now: Values, earlier: Sequence[Values], threshold: float) -> str | None:
    """Entropy per token under `threshold` times the first iteration's: nothing is left to explore."""
    if not earlier or "entropy" not in now or "entropy" not in earlier[0]:
        return None
    bound = threshold * earlier[0]["entropy"]
    if now["entropy"] >= bound:
        return None
    return f"entropy is {now['entropy']:.3g} nats a token, under {threshold:g} of the first iteration's"


def _above(key: str, now: Values, threshold: float) -> str | None:
    if key not in now or now[key] <= threshold:
        return None
    return f"{key} is {now[key]:.3g}, over {threshold:g}"


def _grown(
    key: str, now: Values, earlier: Sequence[Values], threshold: float, floor: float = 0.0
) -> str | None:
    before = [values[key] for values in earlier if key in values]
    if len(before) < LEAST_HISTORY or key not in now:
        return None
    usual = max(median(before), floor, NEGLIGIBLE_NATS)
    if now[key] <= threshold * usual:
        return None
    return f"{key} is {now[key]:.3g}, over {threshold:g} times its median so far ({median(before):.3g})"


ALARMS: dict[str, Callable[[Values, Sequence[Values], float], str | None]] = {
    "mismatch_growth": mismatch_growth,
    "mismatch_max": mismatch_max,
    "progress": progress,
    "kl_jump": kl_jump,
    "zero_advantage_groups": zero_advantage_groups,
    "entropy_collapse": entropy_collapse,
}


def raised(now: Values, earlier: Sequence[Values], thresholds: Mapping[str, float]) -> dict[str, str]:
    """Name and reason of each alarm that iteration `now` sets off, `earlier` holding the ones before it.

    thresholds: one number for each alarm that is on. Raises KeyError for a name that is not in ALARMS.
    """
    found = {name: ALARMS[name](now, earlier, threshold) for name, threshold in thresholds.items()}
    return {name: reason for name, reason in found.items() if reason is not None}
