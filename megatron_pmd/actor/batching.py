"""Which samples go together in which forward pass, on which rank: pure functions of lengths."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from megatron_pmd.errors import ConfigError

Microbatches = list[list[int]]
"""Sample indices, one inner list a micro-batch; an inner list may be empty."""


def attention_cost_tokens(lengths: np.ndarray, tokens_at_equal_cost: float) -> np.ndarray:
    """A sample's training work in units of a token's linear layers: n + n² / tokens_at_equal_cost.

    tokens_at_equal_cost: see length_of_equal_cost.
    """
    return lengths + lengths.astype(np.float64) ** 2 / tokens_at_equal_cost


def length_of_equal_cost(
    tensors: Mapping[str, Sequence[int]], *, routed_share: float, score_width: int
) -> float:
    """The length at which causal attention costs as much as the linear layers of the tokens, in tokens.

    A token costs 2 operations a weight that it passes, so n tokens of P weights 2 P n. Each of n²/2 pairs of
    tokens costs 2 operations a number of its queries, keys and values: n² · score_width. Equal at
    n = 2 P / score_width. Embedding and output matrix are left out: prompts have no logits.

    tensors       the model's shapes by Hugging Face name
    routed_share  of its routed experts, those that one token passes
    score_width   Σ over layers of heads × (query-key width + value width)
    """
    passed = 0.0
    for name, shape in tensors.items():
        if ".layers." in name and len(shape) > 1:
            passed += math.prod(shape) * (routed_share if ".experts." in name else 1.0)
    return 2 * passed / score_width


def pack(
    lengths: np.ndarray, costs: np.ndarray, *, ranks: int, max_tokens: int, multiple: int = 1
) -> list[Microbatches]:
    """Share samples out to `ranks` equally many micro-batches each, none over `max_tokens`, costs balanced.

    Megatron's schedule and expert-parallel collectives need the same number of micro-batches on every rank.
    For each number, from the least that could do, two ways are tried: the dearest sample first into the
    cheapest micro-batch with room, which balances best; then the longest first into the fullest with room,
    which wastes least. The order of the samples does not matter but for ties. The number on a rank is a
    multiple of `multiple`.

    Returns one list of micro-batches a rank. Raises ConfigError for a sample longer than `max_tokens`.
    """
    if len(lengths) and lengths.max() > max_tokens:
        raise ConfigError(
            f"a sample of {lengths.max()} tokens does not fit a pass of {max_tokens}; raise "
            "batch.max_tokens_per_microbatch"
        )
    least = max(1, math.ceil(lengths.sum() / (ranks * max_tokens * multiple))) * multiple
    bins = next(
        content
        for count in itertools.count(least, multiple)
        for order_by, load in ((costs, costs), (lengths, -lengths))
        if (content := _fill(order_by, load, lengths, ranks * count, max_tokens)) is not None
    )
    return _share(bins, np.array([costs[bin_].sum() for bin_ in bins]), ranks)


def _fill(
    order_by: np.ndarray, load: np.ndarray, lengths: np.ndarray, bins: int, capacity: int
) -> Microbatches | None:
    """Each sample, the largest first, to the bin of least summed load with room; None when one finds none."""
    loads, room = np.zeros(bins), np.full(bins, capacity)
    content: Microbatches = [[] for _ in range(bins)]
    for sample in np.argsort(-order_by, kind="stable").tolist():
        chosen = int(np.where(room >= lengths[sample], loads, np.inf).argmin())
        if room[chosen] < lengths[sample]:
            return None
        content[chosen].append(sample)
        loads[chosen] += load[sample]
        room[chosen] -= lengths[sample]
    return content


def _share(bins: Microbatches, costs: np.ndarray, ranks: int) -> list[Microbatches]:
    """As many bins to each rank: those of like cost run at once, the dearest where least has gone so far."""
    order = np.argsort(-costs, kind="stable")
    shares: list[Microbatches] = [[] for _ in range(ranks)]
    given = np.zeros(ranks)
    for start in range(0, len(bins), ranks):
        together = order[start : start + ranks]
        for rank, chosen in zip(np.argsort(given, kind="stable").tolist(), together.tolist(), strict=True):
            shares[rank].append(bins[chosen])
            given[rank] += costs[chosen]
    return shares


def steps_of_groups(groups: np.ndarray, prompts_per_step: int) -> list[np.ndarray]:
    """Sample indices of each optimizer step: whole groups, in the rollout's order."""
    distinct = list(dict.fromkeys(groups.tolist()))
    return [
        np.flatnonzero(np.isin(groups, distinct[start : start + prompts_per_step]))
        for start in range(0, len(distinct), prompts_per_step)
    ]
