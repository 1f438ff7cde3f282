"""From this project's settings to those of megatron-core and Transformer Engine."""

from __future__ import annotations

from typing import Any

import torch

from megatron_pmd.actor import muon
from megatron_pmd.config import Actor, Experts, RunConfig
from megatron_pmd.errors import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# What only CUDA has, or what differs between gloo and NCCL
CPU_FIELDS = dict(
    use_cpu_initialization=True,
    bias_activation_fusion=False,
    bias_dropout_fusion=False,
    masked_softmax_fusion=False,
    gradient_accumulation_fusion=False,
    apply_rope_fusion=False,
    cross_entropy_loss_fusion=False,
    persist_layer_norm=False,
    tp_comm_overlap=False,
    moe_permute_fusion=False,
    moe_router_fusion=False,
    moe_shared_expert_overlap=False,
    # freeing a stage's output while gloo still sends it gives nondeterministic gradients
    deallocate_pipeline_outputs=False,
)

# Fields of TransformerConfig that a setting of ours decides: setting them in actor.megatron too would set the
# model against the ranks' groups, the optimizer or the engines
DECIDED_BY = {
    "tensor_model_parallel_size": "layout.tensor",
    "sequence_parallel": "layout.tensor",
    "context_parallel_size": "layout.context",
    "pipeline_model_parallel_size": "layout.pipeline",
    "virtual_pipeline_model_parallel_size": "layout.virtual_pipeline",
    "expert_model_parallel_size": "layout.expert",
    "expert_tensor_parallel_size": "layout.expert_tensor",
    "params_dtype": "model.precision",
    "pipeline_dtype": "model.precision",
    "autocast_dtype": "model.precision",
    "bf16": "model.precision",
    "fp16": "model.precision",
    "fp8": "actor.fp8.recipe",
    "fp8_recipe": "actor.fp8.recipe",
    "fp8_param": "actor.fp8.parameter_gather",
    "first_last_layers_bf16": "actor.fp8.first_layers_bf16",
    "num_layers_at_start_in_bf16": "actor.fp8.first_layers_bf16",
    "num_layers_at_end_in_bf16": "actor.fp8.last_layers_bf16",
    "recompute_granularity": "actor.recompute",
    "recompute_modules": "actor.recompute_modules",
    "recompute_num_layers": "actor.recompute_layers",
    "recompute_method": "actor.recompute_layers",
    "moe_token_dispatcher_type": "actor.experts.dispatcher",
    "moe_enable_routing_replay": "actor.experts.replay_routing",
    "moe_router_bias_update_rate": "actor.experts.bias_update_rate",
    "qk_clip": "optimizer.qk_clip_threshold",
    "qk_clip_threshold": "optimizer.qk_clip_threshold",
}

FIXED = {
    "calculate_per_token_loss": "losses are summed over a step's tokens, and gradients divided once",
    "variable_seq_lengths": "rows differ in length",
    "mtp_num_layers": "layers that predict further tokens are no part of the policy",
}
"""Fields that stay as they are, and why."""


def work(provider: Any) -> dict[str, Any]:
    """What batching.length_of_equal_cost asks of a model's Megatron configuration."""
    widths = 2 * provider.kv_channels
    if provider.multi_latent_attention:
        widths = provider.qk_head_dim + provider.qk_pos_emb_head_dim + provider.v_head_dim
    experts = provider.num_moe_experts
    return {
        "routed_share": provider.moe_router_topk / experts if experts else 1.0,
        "score_width": provider.num_layers * provider.num_attention_heads * widths,
    }


def refuse_without_cuda(config: RunConfig) -> None:
    """Raise ConfigError for settings that would do nothing on this machine."""
    settings = config.needs_cuda()
    if settings and not torch.cuda.is_available():
        raise ConfigError(
            f"{', '.join(settings)}: needs CUDA, and this machine has none; leave it at its default"
        )


def transformer_fields(config: RunConfig) -> dict[str, Any]:
    """Fields of TransformerConfig; raises ConfigError for one in actor.megatron that is decided elsewhere."""
    layout, dtype = config.layout, DTYPES[config.model.precision]
    fields: dict[str, Any] = dict(
        tensor_model_parallel_size=layout.tensor,
        context_parallel_size=layout.context,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.experts_tensor,
        sequence_parallel=layout.tensor > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        autocast_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        fp16=False,
        # packed micro-batches differ in length; pipeline stages tell each other the shape
        variable_seq_lengths=True,
        # the loss is a sum; finalize_model_grads divides by the global count: no mean of micro-batch means
        calculate_per_token_loss=True,
        attention_softmax_in_fp32=True,
        moe_router_dtype="fp32",
        # an auxiliary loss depends on how samples are packed; it is turned on through actor.megatron
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
        moe_z_loss_coeff=None,
        mtp_num_layers=None,  # layers that predict further tokens are no part of the policy
        **_recompute_fields(config.actor),
        **_fp8_fields(config.actor),
        **_expert_fields(config.actor),
        **muon.attention_fields(config),
    )
    if layout.virtual_pipeline > 1:
        # batched sends and receives of two stages cross each other over gloo: gradients are wrong, silently
        fields.update(overlap_p2p_comm=True, batch_p2p_comm=False)
    if torch.cuda.is_available():
        # Megatron-Bridge turns the fused accumulation on wherever Transformer Engine is; the output layer is
        # megatron-core's own, needs apex's kernel for it, and ends every rank that has it without
        fields["gradient_accumulation_fusion"] = _has_fused_accumulation()
    else:
        fields.update(CPU_FIELDS)
    if config.actor.experts.replay_routing:
        # Transformer Engine's fused top-k and the sinkhorn router know nothing of RouterReplay
        fields["moe_router_fusion"] = False
        chosen = config.actor.megatron
        if chosen.get("moe_router_fusion") or chosen.get("moe_router_load_balancing_type") == "sinkhorn":
            raise ConfigError(
                "actor.megatron: moe_router_fusion and sinkhorn choose experts by themselves; "
                "turn them off, or actor.experts.replay_routing"
            )
    for name in config.actor.megatron:
        if name in DECIDED_BY:
            raise ConfigError(f"actor.megatron.{name} is decided by {DECIDED_BY[name]}: set that")
        if name in FIXED:
            raise ConfigError(f"actor.megatron.{name} cannot be set: {FIXED[name]}; remove it")
    _check_router_losses(config.actor.megatron)
    _check_graphs(config.actor.megatron)
    return fields | config.actor.megatron


def _has_fused_accumulation() -> bool:
    """Whether apex's fused_weight_gradient_mlp_cuda imports: what megatron-core itself asks."""
    # not at the top: it imports Transformer Engine, which reads what environment.py sets
    from megatron.core.tensor_parallel import layers

    return layers._grad_accum_fusion_available


def _check_graphs(chosen: dict[str, Any]) -> None:
    """Raise ConfigError for CUDA graphs of the actor: they would go on with addresses and shapes they saw."""
    for name in ("cuda_graph_impl", "enable_cuda_graph", "external_cuda_graph"):
        if chosen.get(name, "none") not in ("none", False):
            raise ConfigError(
                f"actor.megatron.{name}={chosen[name]}: a CUDA graph reads weights where they were when it "
                "was recorded, and these leave the device and come back to another place; packed rows also "
                "differ in length. Leave it out"
            )


def _check_router_losses(chosen: dict[str, Any]) -> None:
    """Raise ConfigError for a loss of the routers that would not be what its name says."""
    kind = chosen.get("moe_router_load_balancing_type", "none")
    if chosen.get("moe_aux_loss_coeff") and kind == "none":
        raise ConfigError(
            "actor.megatron.moe_aux_loss_coeff does nothing alone; set "
            "actor.megatron.moe_router_load_balancing_type=aux_loss, too"
        )
    kinds = [kind] if isinstance(kind, str) else kind
    reasons = {
        "seq_aux_loss": "takes a packed row of samples for one sequence",
        "global_aux_loss": "grows weaker with the number of data-parallel replicas",
    }
    for wrong in reasons.keys() & set(kinds):
        raise ConfigError(
            f"actor.megatron.moe_router_load_balancing_type={wrong} {reasons[wrong]}; use aux_loss, which "
            "balances each packed row, or actor.experts.bias_update_rate"
        )
    if kind != kinds[0] or len(kinds) > 1:
        raise ConfigError(f"actor.megatron.moe_router_load_balancing_type={kind}: give one kind, as text")


def _recompute_fields(actor: Actor) -> dict[str, Any]:
    if actor.recompute == "none":
        return {}
    if actor.recompute == "selective":
        return dict(recompute_granularity="selective", recompute_modules=list(actor.recompute_modules))
    if actor.recompute_layers:
        return dict(
            recompute_granularity="full",
            recompute_method="block",
            recompute_num_layers=actor.recompute_layers,
        )
    return dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)


def _fp8_fields(actor: Actor) -> dict[str, Any]:
    """The FP8 fields, with the numbers of Megatron-Bridge's recipes (training/mixed_precision.py)."""
    fp8 = actor.fp8
    if fp8 is None:
        return {}
    fields: dict[str, Any] = dict(
        fp8="e4m3" if fp8.recipe == "mxfp8" else "hybrid",
        fp8_recipe=fp8.recipe,
        fp8_param=fp8.parameter_gather,
        fp8_dot_product_attention=False,
        fp8_multi_head_attention=False,
        first_last_layers_bf16=bool(fp8.first_layers_bf16 or fp8.last_layers_bf16),
        num_layers_at_start_in_bf16=fp8.first_layers_bf16,
        num_layers_at_end_in_bf16=fp8.last_layers_bf16,
    )
    if fp8.recipe == "delayed":
        fields.update(fp8_amax_history_len=1024, fp8_amax_compute_algo="max")
    return fields


def _expert_fields(actor: Actor) -> dict[str, Any]:
    fields: dict[str, Any] = dict(
        moe_token_dispatcher_type="alltoall",
        moe_router_bias_update_rate=actor.experts.bias_update_rate,
        moe_enable_routing_replay=actor.experts.replay_routing,
    )
    if actor.experts.dispatcher == "deepep":
        fields.update(moe_token_dispatcher_type="flex", moe_flex_dispatcher_backend="deepep")
    if actor.lora or "shared_experts" in actor.recompute_modules:
        # overlapped they give a part of a sum, to which every rank would add the whole of an adapter
        fields["moe_shared_expert_overlap"] = False
        if actor.megatron.get("moe_shared_expert_overlap"):
            raise ConfigError("actor.megatron.moe_shared_expert_overlap: not with actor.lora, nor recomputed")
    return fields


def row_multiple(config: RunConfig) -> int:
    """A packed row's length is a multiple of this on each context-parallel rank.

    Sequence parallelism shards the row; Transformer Engine's FP8 kernels take multiples of 16 tokens, of 32
    for mxfp8 (megatron-core's fp8_utils.get_fp8_align_size), of 128 for 128x128 blocks.
    """
    kernels = {"delayed": 16, "tensorwise": 16, "mxfp8": 32, "blockwise": 128}
    return config.layout.tensor * (kernels[config.actor.fp8.recipe] if config.actor.fp8 else 1)


def data_parallel_fields(config: RunConfig) -> dict[str, Any]:
    """Fields of DistributedDataParallelConfig."""
    fp8 = config.actor.fp8
    gather = bool(fp8 and fp8.parameter_gather)
    return dict(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=True,
        # Parameters are gathered at once all the same: a checkpoint or a sync reads them after the last step,
        # and would read what other ranks have not sent yet.
        overlap_grad_reduce=torch.cuda.is_available(),
        fp8_param_gather=gather,
        reuse_grad_buf_for_mxfp8_param_ag=gather and fp8.recipe == "mxfp8" if fp8 else False,
    )


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
        fields.update(muon.fields(config))
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


def check_device(config: RunConfig) -> None:
    """Raise ConfigError for an FP8 recipe that this GPU has no kernels for."""
    fp8 = config.actor.fp8
    if fp8 is None:
        return
    major, minor = torch.cuda.get_device_capability()
    least = {"blockwise": (9, 0), "mxfp8": (10, 0)}.get(fp8.recipe, (8, 9))
    if (major, minor) < least:
        raise ConfigError(
            f"actor.fp8.recipe={fp8.recipe} needs compute capability {least[0]}.{least[1]}; "
            f"{torch.cuda.get_device_name()} has {major}.{minor}"
        )


def lora_targets(provider: Any, config: RunConfig) -> list[str]:
    """Lora.targets_in of a model's Megatron configuration."""
    latent = getattr(provider, "multi_latent_attention", False)
    assert config.actor.lora is not None
    return config.actor.lora.targets_in(
        config.model.path,
        config.layout,
        latent=latent,
        compressed_queries=bool(latent and provider.q_lora_rank),
        experts=provider.num_moe_experts,
        post_norms=getattr(provider, "post_norms", False),
        biased_experts=bool(provider.num_moe_experts and provider.add_bias_linear),
    )


def check_model(provider: Any, config: RunConfig) -> None:
    """Raise LayoutError (Layout.check_model) or ConfigError where layout or settings do not fit the model."""
    layout, path, actor = config.layout, config.model.path, config.actor
    stages = layout.pipeline * layout.virtual_pipeline
    layers = None
    # megatron-core itself checks the rest when the first or last stage has a number of layers of its own
    if (
        not {"num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"}
        & actor.megatron.keys()
    ):
        key = "pipeline x virtual_pipeline" if stages > layout.pipeline else "pipeline"
        layers = (provider.num_layers, key, stages)
    latent = getattr(provider, "multi_latent_attention", False)
    linear = provider.experimental_attention_variant == "gated_delta_net"
    layout.check_model(
        path,
        heads=provider.num_attention_heads,
        vocabulary=provider.vocab_size,
        key_value_heads=None if latent else provider.num_query_groups,
        experts=provider.num_moe_experts,
        linear_key_heads=provider.linear_num_key_heads if linear else None,
        layers=layers,
    )
    if not provider.num_moe_experts and actor.experts != Experts():
        raise ConfigError(f"actor.experts is set, but {path} has no experts")
    if actor.experts.bias_update_rate and not provider.moe_router_enable_expert_bias:
        raise ConfigError(
            f"actor.experts.bias_update_rate={actor.experts.bias_update_rate:g}, but the router of {path} "
            "has no expert bias (models of the DeepSeek-V3 family have one)"
        )
    if actor.lora:
        lora_targets(provider, config)
    if threshold := config.optimizer.qk_clip_threshold:
        obstacle = _obstacle_to_qk_clip(provider, layout.tensor, latent)
        if obstacle:
            raise ConfigError(f"optimizer.qk_clip_threshold={threshold:g}: {path} {obstacle}; leave it unset")
    for module in actor.recompute_modules:
        there = {"moe": provider.num_moe_experts, "moe_act": provider.num_moe_experts, "mla_up_proj": latent}
        there["shared_experts"] = provider.moe_shared_expert_intermediate_size
        if not there.get(module, True):
            raise ConfigError(f"actor.recompute_modules: {path} has no {module} to recompute")


def _obstacle_to_qk_clip(provider: Any, tensor: int, latent: bool) -> str | None:
    """What keeps megatron-core's QK-clip from bringing a score down to the threshold; None: nothing."""
    if cap := getattr(provider, "attn_logit_softcapping", None):
        return f"caps its scores at {cap:g} itself"
    if latent:
        return None
    if provider.qk_layernorm:
        return "normalises queries and keys behind the weights that QK-clip scales, which undoes it"
    if provider.add_qkv_bias or provider.add_bias_linear:
        return "has biases of queries and keys, which megatron-core's QK-clip does not scale"
    if tensor > 1:
        # SelfAttention._clip_linear_qkv of megatron-core 0.19.2: its result has the shape of all ranks' rows
        return (
            "has fused queries, keys and values, of which megatron-core's QK-clip cannot scale one "
            "tensor-parallel rank's rows: it needs layout.tensor=1"
        )
    return None
