"""The optimizer of the actor and its learning rate."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer

from megatron_pmd.actor import muon
from megatron_pmd.actor.optimizer_state import parts_by_device
from megatron_pmd.actor.settings import optimizer_fields
from megatron_pmd.config import Optimizer, RunConfig


def build(chunks: list[Any], config: RunConfig) -> ChainedOptimizer:
    """megatron-core's distributed Adam, or Muon beside it: fp32 main parameters and states, shared by the
    data-parallel ranks.

    Weight decay is decoupled from the gradient and leaves biases and norms alone.
    """
    settings = OptimizerConfig(**optimizer_fields(config))
    make = muon.build if config.optimizer.name == "muon" else get_megatron_optimizer
    optimizer = make(settings, chunks)
    # megatron-core makes a part for dense layers although only experts have adapters, and cannot save it
    optimizer.chained_optimizers = [
        part for part in optimizer.chained_optimizers if not getattr(part, "is_stub_optimizer", False)
    ]
    # megatron-core leaves this to its learning-rate scheduler: without it every parameter decays, norms too
    for group in optimizer.param_groups:
        group["weight_decay"] = config.optimizer.weight_decay * group["wd_mult"]
    return optimizer


def learning_rate(settings: Optimizer, step: int) -> float:
    """Linear warm-up from 0 over warmup_steps, then constant. `step` counts from 0 over the whole run."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    return settings.learning_rate


def set_learning_rate(optimizer: ChainedOptimizer, value: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = value


def reset_state(optimizer: ChainedOptimizer) -> None:
    """Moments, momentum and step counts back to zero, as if no step had been taken."""
    for part in optimizer.chained_optimizers:
        for state in part.optimizer.state.values():
            # the precision-aware and the host's Adam keep the fp32 parameters there, too
            for name in state.keys() & {"exp_avg", "exp_avg_sq", "momentum_buffer", "step"}:
                if torch.is_tensor(state[name]):
                    state[name].zero_()
        # Transformer Engine's and apex's fused Adam count steps per group, torch's per parameter
        for counting in (part.optimizer, *parts_by_device(part.optimizer)):
            for group in counting.param_groups:
                if "step" in group:
                    group["step"] = 0
