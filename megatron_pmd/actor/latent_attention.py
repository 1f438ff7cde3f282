"""Latent attention (MLA) with the modules that a layer's spec names."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules


class LatentAttention(MLASelfAttention):
    """megatron-core's, without what it puts in the place of a named module.

    Where queries are not compressed (Moonlight, DeepSeek-V2-Lite) it gives their projection a norm that no
    such model has (transformer/mla_qk_norm_config.py, _resolve_mla_qk_layernorm: linear_q_proj). Without
    Transformer Engine it looks for a fused norm that its local backend lacks.
    """

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
        return {name: getattr(submodules, name) for name in names}


def block_spec(config: Any, vp_stage: int | None = None, *, of_family: Any) -> TransformerBlockSubmodules:
    """The layers that `of_family` makes for this pipeline stage, with LatentAttention in each."""
    block: TransformerBlockSubmodules = of_family(config, vp_stage=vp_stage)
    for layer in block.layer_specs:
        attention = layer.submodules.self_attention
        if attention.module is MLASelfAttention:
            attention.module = LatentAttention
    return block
