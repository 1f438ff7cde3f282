"""How much of a difference between two policies is rounding: one policy computed twice, rounded otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding

from megatron_pmd.actor.batching import Microbatches
from megatron_pmd.batch import RolloutBatch

_ROUNDING = 2.0**-8
"""Of bf16: the distance of neighbouring numbers is between once and twice this, relative to them."""


@dataclass(frozen=True)
class FloorReport:
    """Sums over some sequences of this rank, with x the difference of the two log-probabilities of a token.

    absolute  |Σ x|; k2  Σ x²/2; k3  Σ (eˣ − 1 − x): the sums in a sequence are over its counted tokens, nats
    """

    sequences: int
    absolute: float
    k2: float
    k3: float

    @classmethod
    def of(
        cls, batch: RolloutBatch, microbatches: Microbatches, once: torch.Tensor, again: torch.Tensor
    ) -> FloorReport:
        """once, again: fp32 [tokens here], NaN where another rank computes them."""
        difference = (again.double() - once.double()).numpy()
        sums = []
        for sample in (number for microbatch in microbatches for number in microbatch):
            own = slice(*batch.tokens.offsets[sample : sample + 2].tolist())
            x = difference[own][batch.tokens.counted[own]]
            if not np.isnan(x).any():
                sums.append((abs(x.sum()), (x**2).sum() / 2, (np.expm1(x) - x).sum()))
        absolute, k2, k3 = np.sum(sums, axis=0).tolist() if sums else (0.0, 0.0, 0.0)
        return cls(len(sums), absolute, k2, k3)


@contextmanager
def rounded_anew(chunks: list[torch.nn.Module]) -> Iterator[None]:
    """Move the input embeddings by a rounding error: all that follows is rounded otherwise.

    A mere repetition shows nothing where kernels are deterministic, though two steps that differ by as good
    as nothing differ by the rounding of every activation.
    """

    def moved(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        # every tensor-parallel rank must move its copy of the embeddings alike
        generator = torch.Generator(output.device).manual_seed(0)
        noise = torch.rand(output.shape, generator=generator, device=output.device)
        return (output.float() * (1 + _ROUNDING * (2 * noise - 1))).to(output.dtype)

    with ExitStack() as hooks:
        for chunk in chunks:
            for module in chunk.modules():
                if isinstance(module, LanguageModelEmbedding):
                    hooks.callback(module.register_forward_hook(moved).remove)
        yield
