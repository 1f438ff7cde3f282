"""CPU modules with Transformer Engine's names and parameters: both builds share checkpoints and mappings.

megatron-core has these only through Transformer Engine, which cannot be imported on a CPU. Megatron-Bridge
tells column- from row-parallel weights by class name; the names below are therefore TE's.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.models.gpt.experimental_attention_variant_module_specs import get_linear_attention_pattern
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.experts import GroupedMLPSubmodules, TEGroupedMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from megatron_pmd.actor.cpu.attention import PackedAttention
from megatron_pmd.actor.latent_attention import LatentAttention


class Norm(torch.nn.Module):
    """RMSNorm or LayerNorm under sequence parallelism, which megatron-core's WrappedTorchNorm refuses.

    The mark on the parameters is all it takes: finalize_model_grads() then sums their gradients over the
    tensor-parallel ranks.
    """

    bias: torch.nn.Parameter | None

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps, self.offset = eps, float(config.layernorm_zero_centered_gamma)
        self.weight, bias = _norm_parameters(config, hidden_size)
        self.register_parameter("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _normalise(x, self.weight + self.offset, self.bias, self.eps)


def _norm_parameters(config: Any, width: int) -> tuple[torch.nn.Parameter, torch.nn.Parameter | None]:
    """The weight of a norm, and the bias that a LayerNorm has."""
    ones = torch.ones(width, dtype=config.params_dtype)
    weight = torch.nn.Parameter(ones - float(config.layernorm_zero_centered_gamma))
    bias = torch.nn.Parameter(torch.zeros_like(ones)) if config.normalization == "LayerNorm" else None
    for parameter in (weight, bias):
        if parameter is not None:
            parameter.sequence_parallel = config.sequence_parallel
    return weight, bias


def _normalise(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """Over the last dimension: LayerNorm where there is a bias, else RMSNorm."""
    if bias is None:
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


class TELayerNormColumnParallelLinear(ColumnParallelLinear):
    """A norm and a column-parallel linear in one module, as TE fuses them."""

    return_layernorm_output = False
    """An adapter, whose input is the norm's output, sets it."""
    ub_overlap_ag = True
    """To Megatron-Bridge's adapters: what is returned is this rank's tokens alone."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.in_features, self.out_features = input_size, self.output_size_per_partition
        self.eps, self.offset = config.layernorm_epsilon, float(config.layernorm_zero_centered_gamma)
        self.layer_norm_weight, bias = _norm_parameters(config, input_size)
        self.register_parameter("layer_norm_bias", bias)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        normed = _normalise(x, self.layer_norm_weight + self.offset, self.layer_norm_bias, self.eps)
        output, bias = super().forward(normed, *args, **kwargs)
        return ((output, normed) if self.return_layernorm_output else output), bias

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict:
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0, "bias": 0}, sharded_offsets)


class TERowParallelLinearLayerNorm(RowParallelLinear):
    """A row-parallel linear and the norm behind it: Megatron-Bridge's models/common/te_layers.py."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.post_layernorm = Norm(config, output_size, config.layernorm_epsilon)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, Any]:
        output, bias = super().forward(x)
        return self.post_layernorm(output), bias


class TELinear(torch.nn.Module):
    """A linear whose weight every tensor-parallel rank holds whole: MLA's projections to its latent spaces.

    Under sequence parallelism each rank applies it to its own tokens; the mark makes finalize_model_grads()
    sum the weight's gradient. With the column-parallel linear of megatron-core's local spec in this place
    part of the rotary key's gradient is lost when tensor > 1: what multi_latent_attention.py gathers, its
    backward pass only splits.
    """

    parallel_mode = "duplicated"

    def __init__(self, input_size: int, output_size: int, *, config: Any, init_method: Any, **_: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(output_size, input_size, dtype=config.params_dtype))
        init_method(self.weight)
        self.weight.sequence_parallel = config.sequence_parallel
        # as Transformer Engine's, which marks every linear's weight, and megatron-core, which takes back one
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)
        self.weight.tensor_model_parallel = False

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return F.linear(x, self.weight), None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict:
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {}, sharded_offsets)


class _GroupedLinear(torch.nn.Module):
    """One weight an expert, weight0 … weightN, applied to consecutive runs of tokens; and one bias each."""

    parallel_dimension: int

    def __init__(
        self,
        num_gemms: int,
        input_size: int,
        output_size: int,
        *,
        config: Any,
        init_method: Any,
        pg_collection: Any,
        bias: bool,
        skip_bias_add: bool,
        **_: Any,
    ) -> None:
        super().__init__()
        self.num_gemms, self.groups, self.config = num_gemms, pg_collection, config
        self.bias, self.skip_bias_add = bias, skip_bias_add
        shape = [output_size, input_size]
        shape[self.parallel_dimension] //= pg_collection.expt_tp.size()
        self.out_features, self.in_features = shape
        for i in range(num_gemms):
            weight = torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype))
            init_method(weight)
            set_tensor_model_parallel_attributes(weight, True, self.parallel_dimension, 1)
            weight.allreduce = config.expert_model_parallel_size == 1
            self.register_parameter(f"weight{i}", weight)
            if bias:  # megatron-core has them without tensor parallelism inside an expert alone
                own = torch.nn.Parameter(torch.zeros(self.out_features, dtype=config.params_dtype))
                set_tensor_model_parallel_attributes(own, True, 0, 1)
                own.allreduce = weight.allreduce
                self.register_parameter(f"bias{i}", own)

    def forward(self, x: torch.Tensor, m_splits: list[int]) -> tuple[torch.Tensor, list[torch.Tensor] | None]:
        """The product, and the experts' biases where skip_bias_add leaves them to the caller."""
        biases = [getattr(self, f"bias{i}") if self.bias else None for i in range(self.num_gemms)]
        added = [None] * self.num_gemms if self.skip_bias_add else biases
        parts = [
            F.linear(part, getattr(self, f"weight{i}"), added[i])
            for i, part in enumerate(torch.split(x, m_splits))
        ]
        return torch.cat(parts), biases if self.bias and self.skip_bias_add else None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict:
        experts = self.groups.ep.size() * self.num_gemms
        first = self.groups.ep.rank() * self.num_gemms
        state = self.state_dict(prefix="", keep_vars=True)
        sharded = {}
        for i in range(self.num_gemms):
            kinds = ("weight", "bias") if self.bias else ("weight",)
            one = make_sharded_tensors_for_checkpoint(
                {f"{i}.{kind}": state[f"{kind}{i}"] for kind in kinds},
                "",
                {f"{i}.weight": self.parallel_dimension},
                (*sharded_offsets, (len(sharded_offsets), first + i, experts)),
                tp_group=self.groups.expt_tp,
                dp_cp_group=metadata["dp_cp_group"],
            )
            replace_prefix_for_sharding(one, f"{i}.", prefix)
            for kind in kinds:
                tensor = one[f"{i}.{kind}"]
                tensor.replica_id = (*tensor.replica_id[:2], self.groups.expt_dp.rank())
                sharded[f"{prefix}{kind}{i}"] = tensor
        return sharded


class TEColumnParallelGroupedLinear(_GroupedLinear):
    parallel_dimension = 0


class TERowParallelGroupedLinear(_GroupedLinear):
    parallel_dimension = 1


def layer_spec(config: Any, is_moe: bool, of_family: Any, *, is_linear: bool = False) -> ModuleSpec:
    """megatron-core's local layer spec with the modules above where Transformer Engine's would stand.

    is_linear: the layer has a gated delta net in the place of attention.
    of_family: the function that makes the layers of Megatron-Bridge's family, with Transformer Engine.
    """
    latent = config.multi_latent_attention
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts if is_moe else None,
        moe_grouped_gemm=False,
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=latent,
        normalization="RMSNorm",
    )
    layer, attention = spec.submodules, spec.submodules.self_attention.submodules
    # the local spec renames unfused norms in checkpoints; here they are fused where TE fuses them
    layer.sharded_state_dict_keys_map = {}
    attention.core_attention = PackedAttention
    if latent:
        layer.self_attention.module = LatentAttention
        layer.input_layernorm = Norm
        attention.linear_q_down_proj = attention.linear_kv_down_proj = TELinear
        attention.linear_q_up_proj = attention.linear_kv_up_proj = TELayerNormColumnParallelLinear
        attention.q_layernorm = attention.kv_layernorm = IdentityOp
    else:
        layer.input_layernorm, attention.linear_qkv = IdentityOp, TELayerNormColumnParallelLinear
        if config.qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = Norm
        _whole_norms(spec, of_family)
    if is_linear:
        layer.self_attention = ModuleSpec(
            module=GatedDeltaNet,
            submodules=GatedDeltaNetSubmodules(
                in_proj=TELayerNormColumnParallelLinear, out_norm=Norm, out_proj=RowParallelLinear
            ),
        )
    if is_moe:
        layer.pre_mlp_layernorm = Norm
        layer.mlp.keywords["submodules"].experts = partial(
            TEGroupedMLP,
            submodules=GroupedMLPSubmodules(
                linear_fc1=TEColumnParallelGroupedLinear, linear_fc2=TERowParallelGroupedLinear
            ),
        )
    else:
        layer.pre_mlp_layernorm = IdentityOp
        layer.mlp.keywords["submodules"].linear_fc1 = TELayerNormColumnParallelLinear
        _post_norms(spec, of_family)
    return spec


def _whole_norms(spec: ModuleSpec, of_family: Any) -> None:
    """What Megatron-Bridge gives the two families that normalise the queries of all heads at once."""
    # can be imported only once model.load_bridge has prepared for it
    from megatron.bridge.models.minimax_m2.minimax_m2_provider import (
        FullDimKNorm,
        FullDimQNorm,
        minimax_m2_layer_spec,
    )
    from megatron.bridge.models.olmoe.olmoe_provider import OLMoESelfAttention, olmoe_layer_spec

    attention = spec.submodules.self_attention
    if of_family is olmoe_layer_spec:
        attention.module = OLMoESelfAttention
    elif of_family is minimax_m2_layer_spec:
        attention.submodules.q_layernorm = FullDimQNorm
        attention.submodules.k_layernorm = FullDimKNorm


def _post_norms(spec: ModuleSpec, of_family: Any) -> None:
    """The norms behind attention and feed-forward of three families, before which EXAONE 4.0 has none; Gemma
    3's two rotary embeddings."""
    from megatron.bridge.models.exaone.exaone4.exaone4_provider import exaone4_layer_spec
    from megatron.bridge.models.gemma.gemma2_provider import gemma2_layer_spec
    from megatron.bridge.models.gemma.gemma3_provider import Gemma3SelfAttention, gemma3_layer_spec

    if of_family not in (exaone4_layer_spec, gemma2_layer_spec, gemma3_layer_spec):
        return
    attention, feed_forward = spec.submodules.self_attention, spec.submodules.mlp.keywords["submodules"]
    attention.submodules.linear_proj = feed_forward.linear_fc2 = TERowParallelLinearLayerNorm
    if of_family is exaone4_layer_spec:
        attention.submodules.linear_qkv = feed_forward.linear_fc1 = ColumnParallelLinear
    if of_family is gemma3_layer_spec:
        attention.module = Gemma3SelfAttention


def block_spec(
    config: Any, vp_stage: int | None = None, *, of_family: Any = None
) -> TransformerBlockSubmodules:
    """The specs of this pipeline stage's layers; handles models whose layers are not all MoE.

    of_family: see layer_spec.
    """
    pattern = [False] * config.num_layers
    if config.num_moe_experts:
        frequency = config.moe_layer_freq
        pattern = [
            bool(frequency[i]) if isinstance(frequency, list) else i % frequency == 0
            for i in range(config.num_layers)
        ]
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    linear = [False] * config.num_layers
    if config.experimental_attention_variant == "gated_delta_net":
        linear = [bool(own) for own in get_linear_attention_pattern(config)]
    layers = [
        layer_spec(config, pattern[i], of_family, is_linear=linear[i]) for i in range(first, first + count)
    ]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=Norm)
