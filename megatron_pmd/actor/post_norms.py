"""Gemma 2 and 3, EXAONE 4.0: norms behind attention and feed-forward, windows, scores with a cap.

Megatron-Bridge has these layers. What it has wrong, or only for rows of one sequence, is replaced here.
It can be imported only once model.open_bridge has prepared for it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.bridge.models.common import te_layers
from megatron.core.extensions.transformer_engine import TEDotProductAttention, TENorm
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_pmd.errors import ModelError


class CappedAttention(TEDotProductAttention):
    """Gemma2DotProductAttention (gemma2_provider.py) refuses packed rows; Transformer Engine has the cap."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.softcap = float(getattr(config, "attn_logit_softcapping", None) or 0.0)


class TERowParallelLinearLayerNorm(te_layers.TERowParallelLinearLayerNorm):
    """The bridge's norm adds 1e-5 to the mean square, whatever config.json says (te_layers.py)."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.post_layernorm = TENorm(config, output_size, eps=config.layernorm_epsilon)


def configure(path: Path, provider: Any, config: Any) -> None:
    """Tell megatron-core's own attention what Megatron-Bridge tells its attention for these families.

    config: of transformers. Afterwards provider.post_norms says that the model is one of them.

    Raises ModelError for an order of the layers that the bridge cannot make.
    """
    provider.post_norms = True
    if config.model_type == "exaone4":  # of the models without windows, which families.py lets through
        return
    sliding = [kind == "sliding_attention" for kind in config.layer_types]
    provider.window_size = (config.sliding_window - 1, 0)
    provider.window_attn_skip_freq = [int(one) for one in sliding]
    provider.softmax_scale = config.query_pre_attn_scalar**-0.5
    if config.model_type == "gemma3_text":  # which of its two rotary embeddings a layer uses follows from it
        every = len(sliding) + 1 if all(sliding) else sliding.index(False) + 1
        if sliding != [bool((i + 1) % every) for i in range(len(sliding))]:
            raise ModelError(
                f"{path}: layer_types of config.json are {', '.join(config.layer_types)}; Megatron-Bridge "
                "0.6.2 makes full_attention of every n-th layer, and sliding_attention of the others"
            )
        provider.interleaved_attn_pattern = (every - 1, 1)


def layer_spec(config: Any, *, of_family: Callable[[Any], ModuleSpec]) -> ModuleSpec:
    """The layer that `of_family` makes with Transformer Engine, with the modules above."""
    spec = of_family(config)
    layer, attention = spec.submodules, spec.submodules.self_attention.submodules
    attention.core_attention = CappedAttention
    if config.qk_layernorm:  # exaone4_layer_spec (exaone4_provider.py) leaves them out
        attention.q_layernorm = attention.k_layernorm = TENorm
    attention.linear_proj = layer.mlp.submodules.linear_fc2 = TERowParallelLinearLayerNorm
    return spec
