"""DeepSeek-V3, 671 billion parameters: all of them trained on 32 nodes, or adapters on 8."""

from __future__ import annotations

from megatron_pmd.config import RunConfig
from recipes.deepseek import adapters_on_dapo, on_dapo


def deepseek_v3_256xh100() -> RunConfig:
    """DeepSeek-V3-Base on DAPO-Math-17k: 32 nodes of 8 H100.

    Pipeline stages of 8 layers, 7 in the first, 6 in the last beside the logits; expert 32 as in
    Megatron-Bridge's recipe for 32 nodes.
    """
    return on_dapo(
        "deepseek_v3_256xh100",
        model="models/DeepSeek-V3-Base",
        pipeline=8,
        layers_first=7,
        layers_last=6,
    )


def deepseek_v3_lora_64xh100() -> RunConfig:
    """Adapters of DeepSeek-V3-Base on DAPO-Math-17k: 8 nodes of 8 H100, two engines."""
    return adapters_on_dapo("deepseek_v3_lora_64xh100", model="models/DeepSeek-V3-Base")
