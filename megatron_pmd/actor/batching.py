"""Which samples go together in which forward pass, on which rank: pure functions of lengths."""

from __future__ import annotations

import heapq
import math

import numpy as np

from megatron_pmd.errors import ConfigError

Microbatches = list[list[int]]
"""Sample indices, one inner list a micro-batch; an inner list may be empty."""


def attention_cost_tokens(lengths: np.ndarray, tokens_at_equal_cost: float) -> np.ndarray:
    """A sample's forward and backward work in units of one token's linear layers: n + n² / tokens_at_equal_cost.

    tokens_at_equal_cost: length at which causal attention costs as much as the linear layers; with hidden size h and
    the usual 12 h² parameters a layer, 24 h² n against 2 h n² operations a layer gives 12 h.
    """
    return lengths + lengths.astype(np.float64) ** 2 / tokens_at_equal_cost


def pack(lengths: np.ndarray, costs: np.ndarray, *, ranks: int, max_tokens: int) -> list[Microbatches]:
    """Share samples out to `ranks` equally many micro-batches each, none over `max_tokens`, costs balanced.

    Greedy, the dearest sample first, each to the cheapest micro-batch that still has room. Megatron's schedule and
    expert-parallel collectives need the same number of micro-batches on every rank, so one more on each rank is tried
    until everything fits. The order of the samples does not matter but for ties.

    Returns one list of micro-batches a rank. Raises ConfigError for a sample longer than `max_tokens`.
    """
    if len(lengths) and lengths.max() > max_tokens:
        raise ConfigError(
            f"a sample of {lengths.max()} tokens does not fit batch.max_tokens_per_microbatch={max_tokens}"
        )
    order = np.argsort(-costs, kind="stable")
    count = max(1, math.ceil(lengths.sum() / (ranks * max_tokens)))
    while (bins := _fill(order, lengths, costs, ranks * count, max_tokens)) is None:
        count += 1
    # micro-batch i of every rank runs at the same time: neighbours in cost belong together
    bins.sort(key=lambda bin_: -costs[bin_].sum() if bin_ else 0.0)
    return [bins[rank::ranks] for rank in range(ranks)]


def _fill(
    order: np.ndarray, lengths: np.ndarray, costs: np.ndarray, bins: int, capacity: int
) -> Microbatches | None:
    """Greedy assignment to `bins` bins, or None when a sample found no room."""
    heap = [(0.0, b) for b in range(bins)]
    tokens = [0] * bins
    content: Microbatches = [[] for _ in range(bins)]
    for sample in order.tolist():
        skipped = []
        while heap and tokens[heap[0][1]] + lengths[sample] > capacity:
            skipped.append(heapq.heappop(heap))
        if not heap:
            return None
        cost, b = heapq.heappop(heap)
        content[b].append(sample)
        tokens[b] += int(lengths[sample])
        heapq.heappush(heap, (cost + float(costs[sample]), b))
        for entry in skipped:
            heapq.heappush(heap, entry)
    return content


def steps_of_groups(groups: np.ndarray, prompts_per_step: int) -> list[np.ndarray]:
    """Sample indices of each optimizer step: whole groups, in the rollout's order."""
    distinct = list(dict.fromkeys(groups.tolist()))
    return [
        np.flatnonzero(np.isin(groups, distinct[start : start + prompts_per_step]))
        for start in range(0, len(distinct), prompts_per_step)
    ]
