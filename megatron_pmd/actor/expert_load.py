"""How evenly a mixture of experts uses them: tokens that each layer's router sends to each expert."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from megatron.core.transformer.moe.router import TopKRouter

ExpertTokens = dict[int, np.ndarray]
"""Layer, from 0 -> int64 [experts]."""


class ExpertLoad:
    """Counts what the routers of this rank's chunks choose for the tokens of this rank, padding too."""

    def __init__(self, chunks: list[Any]) -> None:
        self._counts: dict[int, torch.Tensor] | None = None
        for chunk in chunks:
            for router in chunk.modules():
                if isinstance(router, TopKRouter):
                    router.register_forward_hook(self._count)

    def _count(self, router: TopKRouter, _: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        if self._counts is not None:
            layer, chosen = router.layer_number - 1, output[1].sum(0)
            self._counts[layer] = self._counts[layer] + chosen if layer in self._counts else chosen

    @contextmanager
    def counting(self) -> Iterator[ExpertTokens]:
        """What is yielded is filled at the end."""
        tokens: ExpertTokens = {}
        self._counts = {}
        try:
            yield tokens
            tokens |= {layer: count.cpu().numpy() for layer, count in sorted(self._counts.items())}
        finally:
            self._counts = None


def imbalance(parts: list[ExpertTokens]) -> dict[str, float]:
    """The busiest expert's tokens over the mean expert's, by layer and as their mean; {} without experts.

    parts: every rank's counts. 1 is balance; the number of experts over top-k is all tokens to the same ones.
    """
    layers = sorted({layer for part in parts for layer in part})
    totals = {layer: np.sum([part[layer] for part in parts if layer in part], axis=0) for layer in layers}
    ratios = {layer: float(total.max() / total.mean()) for layer, total in totals.items()}
    if not ratios:
        return {}
    by_layer = {f"experts/busiest_over_mean/{layer}": ratio for layer, ratio in ratios.items()}
    return {"experts/busiest_over_mean": float(np.mean(list(ratios.values()))), **by_layer}
