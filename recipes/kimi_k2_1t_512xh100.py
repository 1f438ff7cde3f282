"""Kimi-K2, a trillion parameters: all of them trained on 64 nodes, or adapters on 8."""

from __future__ import annotations

from megatron_pmd.config import RunConfig, override
from recipes.deepseek import adapters_on_dapo, on_dapo


def kimi_k2_1t_512xh100() -> RunConfig:
    """Kimi-K2-Base on DAPO-Math-17k: 64 nodes of 8 H100, the size that the K2 report trained on.

    Pipeline stages of 4 layers, 3 in the first, 2 in the last beside the logits, and expert 32, after
    Megatron-Bridge's recipe. The optimizer is Muon, as in the model's own training.
    """
    adam = on_dapo(
        "kimi_k2_1t_512xh100",
        model="models/Kimi-K2-Base",
        pipeline=16,
        layers_first=3,
        layers_last=2,
    )
    return override(adam, ["optimizer.name=muon"])


def kimi_k2_lora_64xh100() -> RunConfig:
    """Adapters of Kimi-K2-Base on DAPO-Math-17k: 8 nodes of 8 H100. The optimizer is Adam.

    One engine has all ranks: of 32 ranks each would hold 36 GB of its weights, which have no room beside the
    actor's during a sync.
    """
    return adapters_on_dapo(
        "kimi_k2_lora_64xh100", model="models/Kimi-K2-Base", engine_ranks=64, mem_fraction_static=0.54
    )
