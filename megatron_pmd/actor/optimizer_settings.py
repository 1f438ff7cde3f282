"""From this project's settings to those of megatron-core's optimizer."""

from __future__ import annotations

from typing import Any

import torch

from megatron_pmd.actor.settings import DTYPES
from megatron_pmd.config import RunConfig


def optimizer_fields(config: RunConfig) -> dict[str, Any]:
    """Fields of OptimizerConfig."""
    settings, precision, actor = config.optimizer, config.model.precision, config.actor
    fields: dict[str, Any] = dict(
        optimizer="adam",
        lr=settings.learning_rate,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.epsilon,
        weight_decay=settings.weight_decay,
        clip_grad=settings.gradient_clip,
        bf16=DTYPES[precision] is torch.bfloat16,
        params_dtype=DTYPES[precision],
        use_distributed_optimizer=True,
    )
    if settings.name == "muon":
        fields.update(_muon_fields(config))
    if actor.fp8:
        fields.update(
            fp8_recipe=actor.fp8.recipe,
            reuse_grad_buf_for_mxfp8_param_ag=actor.fp8.recipe == "mxfp8" and actor.fp8.parameter_gather,
        )
    if settings.moments == "bf16":
        fields.update(
            use_precision_aware_optimizer=True,
            exp_avg_dtype=torch.bfloat16,
            exp_avg_sq_dtype=torch.bfloat16,
            # a checkpoint holds whole fp32 parameters: the 16 bits that bf16 lacks are not read back from it
            store_param_remainders=False,
        )
    if settings.offload:
        fields.update(
            optimizer_cpu_offload=True,
            # else the fp32 parameters stay on the device, beside those of the host, and no checkpoint can be
            # loaded: HybridDeviceOptimizer looks for an fp32 copy of each of its own parameters
            use_precision_aware_optimizer=True,
            optimizer_offload_fraction=settings.offload,
            overlap_cpu_optimizer_d2h_h2d=True,
        )
    return fields


def _muon_fields(config: RunConfig) -> dict[str, Any]:
    """Fields of OptimizerConfig.

    Five steps of Newton-Schulz with the coefficients of Keller Jordan's Muon, Nesterov's momentum, and an
    update of n x m scaled by 0.2 √max(n, m), which gives it the root mean square of Adam's: Moonlight's
    report (arXiv 2502.16982), section 2.2, which Kimi K2's follows.
    """
    return dict(
        optimizer="muon",
        # for what Adam keeps, get_megatron_optimizer sets it
        use_distributed_optimizer=False,
        use_layer_wise_distributed_optimizer=True,
        muon_momentum=config.optimizer.momentum,
        muon_nesterov=True,
        muon_coefficient_type="simple",
        muon_num_ns_steps=5,
        muon_scale_mode="spectral",
        muon_extra_scale_factor=0.2,
        # each matrix is gathered from the tensor-parallel ranks, not orthogonalised by parts
        muon_tp_mode="duplicated",
        # `medium` is bf16
        muon_fp32_matmul_prec="medium" if config.model.precision == "bf16" else "highest",
    )
