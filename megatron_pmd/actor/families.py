"""The model families that the actor is known to compute as transformers does, and why it refuses the others.

Megatron-Bridge maps more of them than it computes rightly, or than is compared here. A wrong one loads
without an error, and its logits are wrong.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from megatron_pmd.config import Layout
from megatron_pmd.errors import LayoutError, ModelError

PROVEN: dict[str, str] = {
    "deepseek_v2": "DeepSeek-V2-Lite",
    "deepseek_v3": "DeepSeek-V3, Moonlight",
    "exaone_moe": "K-EXAONE",
    "gemma": "Gemma",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3 without images",
    "glm4_moe": "GLM-4.5, 4.6",
    "glm4_moe_lite": "GLM-4.7-Flash",
    "hy_v3": "Hy3",
    "kimi_k2": "Kimi-K2",
    "llama": "Llama 2, 3",
    "minimax_m2": "MiniMax-M2",
    "mistral": "Mistral",
    "olmoe": "OLMoE",
    "qwen2": "Qwen2, Qwen2.5",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3-MoE",
}
"""model_type of config.json, and whose it is: tests/actor/test_families.py compares each."""

REFUSED: dict[str, str] = {
    "deepseek_v4": "its attention chooses tokens by an indexer, which is not compared",
    "ernie4_5_moe": "its routers take a softmax and a bias, for which megatron-core 0.19.2 has no router; "
    "Megatron-Bridge 0.6.2 takes a sigmoid, which gives other logits",
    "exaone4": "Megatron-Bridge 0.6.2 leaves out the norms of its queries and keys and the windows of its "
    "layers, and its attention there refuses packed rows",
    "falcon_h1": "it has state-space layers, whose kernels need CUDA; they are not compared",
    "gemma4_text": "its layers of two kinds differ in the number and width of heads, and some take keys for "
    "values; neither is compared",
    "glm_moe_dsa": "its attention chooses tokens by an indexer, which is not compared",
    "gpt_oss": "its attention has sinks, and its experts biases and a clamped activation; none is compared",
    "mimo_v2_flash": "its layers have two rotary embeddings and attention of two widths; neither is compared",
    "nemotron": "its norms subtract the mean and have biases, which is not compared",
    "nemotron_h": "it has state-space layers, whose kernels need CUDA; they are not compared",
    "qwen3_5_moe_text": "it has linear attention, whose kernels need CUDA; it is not compared",
    "qwen3_5_text": "it has linear attention, whose kernels need CUDA; it is not compared",
    "qwen3_next": "it has linear attention, whose kernels need CUDA; it is not compared",
}
"""model_type, and what the error says of it."""

LATENT_ATTENTION = frozenset({"deepseek_v2", "deepseek_v3", "glm4_moe_lite", "kimi_k2"})
"""SGLang serves these on GPUs only."""
READ_FROM_FP8 = frozenset({"deepseek_v3", "kimi_k2"})
"""Megatron-Bridge turns the blocks of their published folders into bf16 when it reads them."""
POST_NORMS = frozenset({"gemma2", "gemma3_text"})
"""They have norms behind attention and feed-forward: post_norms.py."""
NORMS_OF_ALL_HEADS = frozenset({"minimax_m2", "olmoe"})
"""They normalise the queries of all heads at once."""


TAKEN_FOR_GRANTED: dict[str, dict[str, bool]] = {
    "gemma2": dict(tie_word_embeddings=True, use_bidirectional_attention=False, attention_bias=False),
    "gemma3_text": dict(
        tie_word_embeddings=True,
        use_bidirectional_attention=False,
        attention_bias=False,
        final_logit_softcapping=False,
    ),
}
"""By model_type, settings that Megatron-Bridge does not read, and whether it computes as if they were on."""


def check_family(path: Path, bridge: Any) -> None:
    """ModelError for a family of Megatron-Bridge's own that is not compared, or is known to be wrong.

    bridge: its AutoBridge. One that a user registered passes.
    """
    config = bridge.hf_pretrained.config
    kind = config.model_type
    if not type(bridge._model_bridge).__module__.startswith("megatron.bridge."):
        return
    if kind not in PROVEN:
        reason = REFUSED.get(kind, "nobody has compared its logits")
        raise ModelError(
            f"{path}: models of type {kind} are refused: {reason}. Those that are compared with transformers "
            f"are {', '.join(PROVEN)}"
        )
    for name, on in TAKEN_FOR_GRANTED.get(kind, {}).items():
        if bool(value := getattr(config, name)) != on:
            raise ModelError(
                f"{path}: {name}={value} in config.json, which Megatron-Bridge does not read; of {kind}, "
                f"models {'with' if on else 'without'} it are trained"
            )
    if kind == "deepseek_v2" and config.topk_method != "greedy":
        raise ModelError(
            f"{path}: topk_method={config.topk_method} in config.json: it chooses groups of experts by their "
            "best one, megatron-core by the sum of several; of DeepSeek-V2, models with topk_method=greedy "
            "(V2-Lite) are trained"
        )


def check_layout(path: Path, model_type: str, layout: Layout) -> None:
    """LayoutError for a layout under which Megatron-Bridge computes a family wrongly, or none at all."""
    # FullDimQNorm and FullDimKNorm (minimax_m2_provider.py) sum over the ranks outside of autograd, and
    # OLMoESelfAttention (olmoe_provider.py) gives every rank the norm of all heads
    if model_type in NORMS_OF_ALL_HEADS and layout.tensor > 1:
        raise LayoutError(
            f"layout.tensor={layout.tensor}: {path} normalises the queries of all heads at once, which "
            "Megatron-Bridge 0.6.2 does not do over several ranks; use tensor=1, and pipeline, expert or "
            "data instead"
        )
    # attn_forward_func_with_cp (context_parallel.py) asserts it, where keys are sent from rank to rank
    if model_type in POST_NORMS and layout.context > 1:
        raise LayoutError(
            f"layout.context={layout.context}: {path} has layers whose attention sees a window, which "
            "Transformer Engine does not compute over several ranks; use context=1"
        )


@functools.cache
def know_kimi() -> None:
    """Let transformers read config.json of Kimi-K2 without the code beside it: it is a DeepSeek-V3.

    transformers 5.19 has no `kimi_k2`; tests/actor/test_families.py fails when it does.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

    class KimiK2Config(DeepseekV3Config):
        model_type = "kimi_k2"

    class KimiK2ForCausalLM(DeepseekV3ForCausalLM):
        config_class = KimiK2Config

    AutoConfig.register("kimi_k2", KimiK2Config)
    AutoModelForCausalLM.register(KimiK2Config, KimiK2ForCausalLM)
