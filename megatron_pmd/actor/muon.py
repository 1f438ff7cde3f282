"""Muon for the matrices of the policy, as Kimi K2 has it; Adam keeps embeddings, output layer and vectors.

megatron-core and emerging-optimizers do the arithmetic. A data-parallel rank has whole matrices, with their
momentum, and updates those alone (LayerWiseDistributedOptimizer); Adam's states are shared out as ever.
"""

from __future__ import annotations

import re
from typing import Any
from unittest import mock

import megatron.core.optimizer
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.layer_wise_optimizer import (
    LayerWiseDistributedOptimizer,
    tag_params_for_buffer_routing,
)
from megatron.core.optimizer.optimizer import FP32Optimizer
from megatron.core.optimizer.param_layout import FullParamLayout
from megatron.core.ssm.gated_delta_net import GatedDeltaNet

from megatron_pmd.config import RunConfig
from megatron_pmd.errors import ConfigError

FUSED_GATE_AND_UP = re.compile(r"\.linear_fc1\.weight\d*$")


def fields(config: RunConfig) -> dict[str, Any]:
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


def attention_fields(config: RunConfig) -> dict[str, Any]:
    """Fields of TransformerConfig for QK-clip (Kimi K2's report, arXiv 2507.20534, section 2.1).

    Transformer Engine's attention then notes each head's largest score of all passes since the last step.
    """
    threshold = config.optimizer.qk_clip_threshold
    return dict(qk_clip=True, qk_clip_threshold=threshold) if threshold else {}


def layout(chunk: torch.nn.Module, ddp: DistributedDataParallelConfig) -> FullParamLayout:
    """Where each parameter lies in the buffers of a chunk: whole matrices on one data-parallel rank.

    Raises ConfigError for a model whose experts have parameters that are not matrices.
    """
    for name, parameter in chunk.named_parameters():
        # get_megatron_optimizer has no Adam for parameters that expert-parallel ranks share out
        if not getattr(parameter, "allreduce", True) and parameter.dim() != 2:
            raise ConfigError(
                f"optimizer.name=muon: {name} of the experts is no matrix, and megatron-core gives such "
                "parameters no Adam beside Muon under layout.expert > 1; set optimizer.name=adam"
            )
    tag_params_for_buffer_routing([chunk])
    behind_first_stage = parallel_state.get_pipeline_model_parallel_rank() > 0
    data = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    # as DistributedDataParallel fills buckets where it is not told a size
    bucket = ddp.bucket_size or max(40_000_000, 1_000_000 * data)
    return LayerWiseDistributedOptimizer.compute_full_param_layout(
        list(chunk.parameters()),
        bucket if ddp.overlap_grad_reduce and not behind_first_stage else None,
        data,
        ddp,
        expert_data_parallel_world_size=parallel_state.get_expert_data_parallel_world_size(),
    )


def build(settings: OptimizerConfig, chunks: list[Any]) -> MegatronOptimizer:
    """The two optimizers, chained: Muon's, then Adam's."""
    for chunk in chunks:
        _tell_matrices_apart(chunk)
        _tell_whole_matrices(chunk)
    if settings.bf16:
        return get_megatron_optimizer(settings, chunks)
    with mock.patch.object(megatron.core.optimizer, "LayerWiseDistributedOptimizer", _LayerWiseInFp32):
        return get_megatron_optimizer(settings, chunks)


def _tell_matrices_apart(chunk: Any) -> None:
    """Have Muon take the matrices that share a parameter one at a time, by the marks it knows queries and
    keys by: gate and up of a gated layer, and the six that read the input of a gated delta net.

    megatron-core splits only linear_qkv by itself (get_megatron_optimizer): queries, their output gate, keys
    and values.
    """
    for name, parameter in chunk.named_parameters():
        if chunk.config.gated_linear_unit and FUSED_GATE_AND_UP.search(name):
            _mark(parameter, [parameter.size(0) // 2] * 2)
    for module in chunk.modules():
        if isinstance(module, GatedDeltaNet):
            _mark(module.in_proj.weight, list(module.in_proj_split_sections))


def _tell_whole_matrices(chunk: Any) -> None:
    """Have Muon take as they are the matrices that every tensor-parallel rank holds whole: latent attention's
    projections down.

    Transformer Engine marks the weight of each linear as a part along dimension 0 (module/linear.py,
    reset_parameters). megatron-core says of these that they are no part (extensions/transformer_engine.py,
    TELinear), but leaves the dimension, by which TensorParallelMuon would make one tall matrix of the copies.
    """
    for parameter in chunk.parameters():
        if getattr(parameter, "tensor_model_parallel", None) is False:
            parameter.partition_dim = -1


def _mark(parameter: Any, rows: list[int]) -> None:
    """rows: of each matrix, on this rank."""
    parameter.is_qkv, parameter.qkv_split_shapes = True, rows


class _Fp32(FP32Optimizer):
    """With its state one level down, where LayerWiseDistributedOptimizer looks for it in a checkpoint."""

    def sharded_state_dict(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        return {"optimizer": super().sharded_state_dict(*arguments, **options)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict["optimizer"])


class _LayerWiseInFp32(LayerWiseDistributedOptimizer):
    """megatron-core's, for models in fp32.

    Answers its __init__, which makes Megatron's optimizers of torch's under bf16 alone: without this class
    get_megatron_optimizer fails in the chain of the two optimizers, which asks both for their settings.
    """

    def __init__(
        self,
        optimizers: list[torch.optim.Optimizer],
        config: OptimizerConfig,
        pg_collection: Any,
        init_state_fn_list: list[Any],
        model_chunks: list[Any],
    ) -> None:
        super().__init__(optimizers, config, pg_collection, init_state_fn_list, model_chunks)
        self.config = config
        self.chained_optimizers = [
            _Fp32(optimizer, config, begin)
            for optimizer, begin in zip(optimizers, init_state_fn_list, strict=True)
        ]
