"""CPU modules with Transformer Engine's names and parameters: both builds share checkpoints and mappings.

megatron-core has these only through Transformer Engine, which cannot be imported on a CPU. Megatron-Bridge
tells column- from row-parallel weights by class name; the names below are therefore TE's.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.experts import GroupedMLPSubmodules, TEGroupedMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.transformer.utils import (
    is_layer_window_attention,
    make_sharded_tensors_for_checkpoint,
)

from megatron_pmd.actor.latent_attention import LatentAttention
from megatron_pmd.actor.packing import Row

FP32_ATTENTION_TOKENS = 256
"""Up to this length of the longest sequence attention runs in fp32."""


class RMSNorm(torch.nn.Module):
    """RMSNorm under sequence parallelism, which megatron-core's WrappedTorchNorm refuses.

    The mark on the weight is all it takes: finalize_model_grads() then sums its gradient over the
    tensor-parallel ranks.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps, self.offset = eps, float(config.layernorm_zero_centered_gamma)
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype) - self.offset)
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight + self.offset, self.eps)


class _GatherTokens(torch.autograd.Function):
    """All context-parallel ranks' tokens, one after another; each gets the sum of its tokens' gradients."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        whole = part.new_empty((part.size(0) * group.size(), *part.shape[1:]))
        dist.all_gather_into_tensor(whole, part.contiguous(), group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        whole = gradients[0].contiguous()
        part = whole.new_empty((whole.size(0) // ctx.group.size(), *whole.shape[1:]))
        dist.reduce_scatter_tensor(part, whole, group=ctx.group)
        return part, None


class PackedAttention(MegatronModule):
    """Causal attention within each packed sequence, by torch's SDPA where scores have no cap.

    The packed row is laid out as one padded batch, so that no token sees another sequence; padding comes
    after every real token and is therefore never attended to. Under context parallelism each rank gathers
    the keys and values of all ranks for its own queries.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        *,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale
        self.softcap: float = getattr(config, "attn_logit_softcapping", None) or 0.0
        """What bounds the scores, smoothly; 0: nothing."""
        self.window: int | None = None
        """Tokens before its own that a query sees; None: all."""
        if is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number):
            self.window = config.window_size[0]
        self.context = pg_collection.cp if pg_collection else parallel_state.get_context_parallel_group()

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *_: Any,
        packed_seq_params: Any,
        **__: Any,
    ) -> torch.Tensor:
        """query [tokens, heads, dim], key and value [tokens, groups, dim] -> [tokens, heads * dim]"""
        bounds = packed_seq_params.cu_seqlens_q.long()
        lengths = bounds.diff()
        sequence = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        position = torch.arange(len(sequence)) - bounds[sequence]
        longest = int(lengths.max())
        # torch's bf16 kernel takes 3 times as long backward as its fp32 one at 62 tokens, less than it at 512
        dtype = torch.float32 if longest <= FP32_ATTENTION_TOKENS else query.dtype

        def batched(x: torch.Tensor, sequence: torch.Tensor, place: torch.Tensor, width: int) -> torch.Tensor:
            padded = x.new_zeros((len(lengths), width, *x.shape[1:]), dtype=dtype)
            return padded.index_put((sequence, place), x.to(dtype)).transpose(1, 2)

        asked, place, width = sequence, position, longest
        keys = torch.arange(longest)
        mask: dict[str, Any] = {"is_causal": True}
        if self.window is not None or self.softcap:
            mask = {"attn_mask": self._sees(keys, keys)}
        if self.context.size() > 1:
            row = Row(size=self.context.size())
            held = [
                torch.from_numpy(replace(row, rank=rank).held(bounds.numpy())) for rank in range(row.size)
            ]
            order = torch.cat(held).argsort()
            key, value = (_GatherTokens.apply(x, self.context)[order] for x in (key, value))
            own = held[self.context.rank()]
            asked, width = sequence[own], longest // row.size
            place = torch.arange(len(own)) - bounds[asked] // row.size
            # a place without a query is taken for the last: a row of nothing but masked keys would give NaN
            last = torch.full((len(lengths), width), longest - 1)
            mask = {"attn_mask": self._sees(last.index_put((asked, place), position[own]), keys)[:, None]}
        attend = self._capped if self.softcap else F.scaled_dot_product_attention
        output = attend(
            batched(query, asked, place, width),
            batched(key, sequence, position, longest),
            batched(value, sequence, position, longest),
            scale=self.scale,
            enable_gqa=True,
            **mask,
        )
        return output.transpose(1, 2)[asked, place].flatten(1).to(query.dtype)

    def _capped(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scale: float | None,
        attn_mask: torch.Tensor,
        enable_gqa: bool,
    ) -> torch.Tensor:
        """torch's SDPA with capped scores, which it does not have."""
        key, value = (x.repeat_interleave(query.size(1) // x.size(1), dim=1) for x in (key, value))
        scores = query @ key.mT * (scale or query.size(-1) ** -0.5)
        scores = self.softcap * torch.tanh(scores / self.softcap)
        weights = scores.masked_fill(~attn_mask, -torch.inf).softmax(-1, dtype=torch.float32)
        return weights.to(value.dtype) @ value

    def _sees(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Whether a query sees a key. queries [..., queries] and keys [keys]: their positions."""
        before = queries[..., None] - keys
        return (before >= 0) if self.window is None else (before >= 0) & (before <= self.window)


class TELayerNormColumnParallelLinear(ColumnParallelLinear):
    """RMSNorm and a column-parallel linear in one module, as TE fuses them."""

    return_layernorm_output = False
    """An adapter, whose input is the norm's output, sets it."""
    ub_overlap_ag = True
    """To Megatron-Bridge's adapters: what is returned is this rank's tokens alone."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.in_features, self.out_features = input_size, self.output_size_per_partition
        self.eps, self.offset = config.layernorm_epsilon, float(config.layernorm_zero_centered_gamma)
        norm = torch.ones(input_size, dtype=config.params_dtype) - self.offset
        self.layer_norm_weight = torch.nn.Parameter(norm)
        self.layer_norm_weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        normed = F.rms_norm(x, (x.size(-1),), self.layer_norm_weight + self.offset, self.eps)
        output, bias = super().forward(normed, *args, **kwargs)
        return ((output, normed) if self.return_layernorm_output else output), bias

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict:
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0, "bias": 0}, sharded_offsets)


class TERowParallelLinearLayerNorm(RowParallelLinear):
    """A row-parallel linear and the norm behind it: Megatron-Bridge's models/common/te_layers.py."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.post_layernorm = RMSNorm(config, output_size, config.layernorm_epsilon)

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

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return F.linear(x, self.weight), None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict:
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {}, sharded_offsets)


class _GroupedLinear(torch.nn.Module):
    """One weight an expert, weight0 … weightN, applied to consecutive runs of tokens."""

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
        **_: Any,
    ) -> None:
        super().__init__()
        self.num_gemms, self.groups, self.config = num_gemms, pg_collection, config
        shape = [output_size, input_size]
        shape[self.parallel_dimension] //= pg_collection.expt_tp.size()
        self.out_features, self.in_features = shape
        for i in range(num_gemms):
            weight = torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype))
            init_method(weight)
            set_tensor_model_parallel_attributes(weight, True, self.parallel_dimension, 1)
            weight.allreduce = config.expert_model_parallel_size == 1
            self.register_parameter(f"weight{i}", weight)

    def forward(self, x: torch.Tensor, m_splits: list[int]) -> tuple[torch.Tensor, None]:
        parts = torch.split(x, m_splits)
        return torch.cat([F.linear(part, getattr(self, f"weight{i}")) for i, part in enumerate(parts)]), None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict:
        experts = self.groups.ep.size() * self.num_gemms
        first = self.groups.ep.rank() * self.num_gemms
        state = self.state_dict(prefix="", keep_vars=True)
        sharded = {}
        for i in range(self.num_gemms):
            one = make_sharded_tensors_for_checkpoint(
                {f"{i}.weight": state[f"weight{i}"]},
                "",
                {f"{i}.weight": self.parallel_dimension},
                (*sharded_offsets, (len(sharded_offsets), first + i, experts)),
                tp_group=self.groups.expt_tp,
                dp_cp_group=metadata["dp_cp_group"],
            )
            replace_prefix_for_sharding(one, f"{i}.", prefix)
            tensor = one[f"{i}.weight"]
            tensor.replica_id = (*tensor.replica_id[:2], self.groups.expt_dp.rank())
            sharded[f"{prefix}weight{i}"] = tensor
        return sharded


class TEColumnParallelGroupedLinear(_GroupedLinear):
    parallel_dimension = 0


class TERowParallelGroupedLinear(_GroupedLinear):
    parallel_dimension = 1


def layer_spec(config: Any, is_moe: bool, of_family: Any) -> ModuleSpec:
    """megatron-core's local layer spec with the modules above where Transformer Engine's would stand.

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
        layer.input_layernorm = RMSNorm
        attention.linear_q_down_proj = attention.linear_kv_down_proj = TELinear
        attention.linear_q_up_proj = attention.linear_kv_up_proj = TELayerNormColumnParallelLinear
        attention.q_layernorm = attention.kv_layernorm = IdentityOp
    else:
        layer.input_layernorm, attention.linear_qkv = IdentityOp, TELayerNormColumnParallelLinear
        if config.qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = RMSNorm
        _whole_norms(spec, of_family)
        _post_norms(spec, of_family)
    if is_moe:
        layer.pre_mlp_layernorm = RMSNorm
        layer.mlp.keywords["submodules"].experts = partial(
            TEGroupedMLP,
            submodules=GroupedMLPSubmodules(
                linear_fc1=TEColumnParallelGroupedLinear, linear_fc2=TERowParallelGroupedLinear
            ),
        )
    else:
        layer.pre_mlp_layernorm = IdentityOp
        layer.mlp.keywords["submodules"].linear_fc1 = TELayerNormColumnParallelLinear
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
    """The norms behind attention and feed-forward of Gemma 2 and 3, and Gemma 3's two rotary embeddings."""
    from megatron.bridge.models.gemma.gemma2_provider import gemma2_layer_spec
    from megatron.bridge.models.gemma.gemma3_provider import Gemma3SelfAttention, gemma3_layer_spec

    if of_family not in (gemma2_layer_spec, gemma3_layer_spec):
        return
    layer, attention = spec.submodules, spec.submodules.self_attention
    attention.submodules.linear_proj = TERowParallelLinearLayerNorm
    layer.mlp.keywords["submodules"].linear_fc2 = TERowParallelLinearLayerNorm
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
    layers = [layer_spec(config, is_moe, of_family) for is_moe in pattern[first : first + count]]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)
