"""The routers' own losses, turned on through actor.megatron: their weight beside the objective's gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_pmd.actor.batching import Microbatches
from megatron_pmd.actor.packing import Row
from megatron_pmd.algorithm.losses import Loss
from megatron_pmd.batch import RolloutBatch
from megatron_pmd.device import current_device


class RouterLosses:
    """Makes the auxiliary loss and the z-loss means over the tokens of a step.

    Of a micro-batch whose row has T tokens megatron-core adds T times such a loss (moe/router.py). The sum is
    divided by what the step's losses count, as the objective is (finalize_model_grads): tokens, megatron-core
    takes it. Here it is sequences, or the response tokens that count. Without the factor count / Σ T a loss
    would be as many times too strong as a sequence has tokens.
    """

    def __init__(self, provider: Any, row: Row) -> None:
        """provider: the TransformerConfig that the pipeline's schedule asks for the factor."""
        balanced = provider.num_moe_experts and provider.moe_router_load_balancing_type == "aux_loss"
        self._row, self._factor = row, torch.ones(1, device=current_device())
        self._on = bool(balanced or (provider.num_moe_experts and provider.moe_z_loss_coeff))
        if self._on:
            # a copy: megatron-core keeps the first one that it is given, and writes the later ones into it
            provider.moe_grad_scale_func = self._factor.clone

    def weigh(
        self, batch: RolloutBatch, microbatches: Microbatches, examples: Microbatches, objective: Loss
    ) -> None:
        """Before a step's passes, on all ranks; the arguments are those of this replica's step."""
        if not self._on:
            return
        samples = np.array([sample for microbatch in microbatches for sample in microbatch], np.int64)
        counted = batch.samples.counted_lengths[samples].sum()
        tokens = sum(self._row.whole(batch.samples.lengths[m]) for m in [*microbatches, *examples])
        sums = torch.tensor(
            [len(samples) if objective.counts == "sequences" else counted, tokens],
            dtype=torch.float64,
            device=self._factor.device,
        )
        dist.all_reduce(sums, group=parallel_state.get_data_parallel_group())
        self._factor.copy_(sums[0] / sums[1])
