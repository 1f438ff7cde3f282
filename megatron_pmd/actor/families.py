"""The model families that the actor is known to compute as transformers does, and why it refuses the others.

Megatron-Bridge maps more of them than it computes rightly, or than is compared here. A wrong one loads
without an error, and its logits are wrong.
"""

from __future__ import annotations

import functools
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from megatron_pmd.config import Layout
from megatron_pmd.errors import LayoutError, MissingPackage, ModelError
from megatron_pmd.hugging_face import TensorFiles

PROVEN: dict[str, str] = {
    "deepseek_v2": "DeepSeek-V2-Lite",
    "deepseek_v3": "DeepSeek-V3, Moonlight",
    "exaone4": "EXAONE 4.0, 1.2B",
    "exaone_moe": "K-EXAONE",
    "gemma": "Gemma",
    "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 3 without images",
    "glm4_moe": "GLM-4.5, 4.6",
    "glm4_moe_lite": "GLM-4.7-Flash",
    "gpt_oss": "gpt-oss",
    "hy_v3": "Hy3",
    "kimi_k2": "Kimi-K2",
    "llama": "Llama 2, 3",
    "minimax_m2": "MiniMax-M2",
    "mistral": "Mistral",
    "nemotron": "Nemotron-4, Minitron",
    "olmoe": "OLMoE",
    "qwen2": "Qwen2, Qwen2.5",
    "qwen3": "Qwen3",
    "qwen3_5_moe_text": "Qwen3.5-MoE without images",
    "qwen3_5_text": "Qwen3.5",
    "qwen3_moe": "Qwen3-MoE",
    "qwen3_next": "Qwen3-Next",
}
"""model_type of config.json, and whose it is: tests/actor/test_families.py compares each."""

REFUSED: dict[str, str] = {
    "deepseek_v4": "its attention chooses tokens by an indexer, which is not compared",
    "ernie4_5_moe": "its routers take a softmax and a bias, for which megatron-core 0.19.2 has no router; "
    "Megatron-Bridge 0.6.2 takes a sigmoid, which gives other logits",
    "falcon_h1": "it has state-space layers, whose kernels need CUDA; they are not compared",
    "gemma4_text": "its layers of two kinds differ in the number and width of heads, and some take keys for "
    "values; neither is compared",
    "glm_moe_dsa": "its attention chooses tokens by an indexer, which is not compared",
    "mimo_v2_flash": "its layers have two rotary embeddings and attention of two widths; neither is compared",
    "mistral3": "it takes images, which is not compared; its text part alone, `ministral3`, Megatron-Bridge "
    "0.6.2 does not map",
    "nemotron_h": "it has state-space layers, whose kernels need CUDA; they are not compared",
}
"""model_type, and what the error says of it."""

READ_FROM_FP8 = frozenset({"deepseek_v3", "kimi_k2"})
"""Megatron-Bridge turns the blocks of their published folders into bf16 when it reads them."""
LINEAR_ATTENTION = frozenset({"qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"})
"""On CUDA megatron-core computes these with flash-linear-attention, which no constraint pins."""
POST_NORMS = frozenset({"exaone4", "gemma2", "gemma3_text"})
"""They have norms behind attention and feed-forward: post_norms.py."""
NORMS_OF_ALL_HEADS = frozenset({"minimax_m2", "olmoe"})
"""They normalise the queries of all heads at once."""
BIASED_EXPERTS = frozenset({"gpt_oss"})
"""megatron-core has biases of experts without tensor parallelism inside an expert alone."""

STACKED_EXPERTS = re.compile(r"model\..*\.mlp\.experts\.(gate_up|down)_proj")
"""How some folders of Qwen3.5-MoE name their experts' tensors; those of `mtp` are not the policy's."""


def _taken_for_granted(config: Any) -> dict[str, Any]:
    """What Megatron-Bridge's provider of a family is fixed to, whatever config.json says."""
    if config.model_type == "exaone4":
        return dict(tie_word_embeddings=True, sliding_window=None)
    if config.model_type in POST_NORMS:
        taken = dict(tie_word_embeddings=True, use_bidirectional_attention=False, attention_bias=False)
        return taken if config.model_type == "gemma2" else taken | dict(final_logit_softcapping=None)
    if config.model_type == "nemotron":
        return dict(hidden_act="relu2", attention_bias=False, mlp_bias=False)
    if config.model_type == "gpt_oss":
        layers = config.num_hidden_layers
        return dict(
            swiglu_alpha=1.702,
            swiglu_limit=7.0,
            attention_bias=True,
            tie_word_embeddings=False,
            layer_types=(["sliding_attention", "full_attention"] * layers)[:layers],
        )
    return {}


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
    if kind == "deepseek_v2" and config.topk_method != "greedy":
        raise ModelError(
            f"{path}: topk_method={config.topk_method} in config.json: it chooses groups of experts by their "
            "best one, megatron-core by the sum of several; of DeepSeek-V2, models with topk_method=greedy "
            "(V2-Lite) are trained"
        )
    if kind == "qwen3_5_moe_text" and any(map(STACKED_EXPERTS.fullmatch, TensorFiles(path).tensors)):
        raise ModelError(
            f"{path}: its experts are stacked in one tensor a layer, where transformers writes a tensor for "
            "each, as a conversion back would; load it with transformers, and save it with save_pretrained"
        )
    if kind in LINEAR_ATTENTION and torch.cuda.is_available() and find_spec("fla") is None:
        raise MissingPackage(
            f"{path}: models of type {kind} have linear attention, for which megatron-core 0.19.2 takes the "
            "kernels of flash-linear-attention (module fla); it is not installed, and nobody has run it with "
            "this version on a GPU"
        )
    for key, value in _taken_for_granted(config).items():
        # what is off may be False, None or 0
        if (getattr(config, key) or None) != (value or None):
            raise ModelError(
                f"{path}: {key}={getattr(config, key)} in config.json: Megatron-Bridge 0.6.2 takes {value} "
                f"for granted, and would compute other logits; of type {kind}, models with {key}={value} are "
                "trained"
            )


def check_layout(path: Path, config: Any, layout: Layout) -> None:
    """LayoutError for a layout under which Megatron-Bridge computes a family wrongly, or not at all.

    config: transformers' of the model.
    """
    model_type = config.model_type
    if model_type in BIASED_EXPERTS and layout.experts_tensor > 1:
        raise LayoutError(
            f"layout: {layout.experts_tensor} tensor-parallel ranks inside an expert: those of {path} have "
            "biases, which megatron-core 0.19.2 does not divide; set layout.expert > 1 and "
            "layout.expert_tensor=1"
        )
    # FullDimQNorm and FullDimKNorm (minimax_m2_provider.py) sum over the ranks outside of autograd, and
    # OLMoESelfAttention (olmoe_provider.py) gives every rank the norm of all heads
    if model_type in NORMS_OF_ALL_HEADS and layout.tensor > 1:
        raise LayoutError(
            f"layout.tensor={layout.tensor}: {path} normalises the queries of all heads at once, which "
            "Megatron-Bridge 0.6.2 does not do over several ranks; use tensor=1, and pipeline, expert or "
            "data instead"
        )
    # attn_forward_func_with_cp (context_parallel.py) asserts it, where keys are sent from rank to rank
    if model_type in POST_NORMS and config.sliding_window and layout.context > 1:
        raise LayoutError(
            f"layout.context={layout.context}: {path} has layers whose attention sees a window, which "
            "Transformer Engine does not compute over several ranks; use context=1"
        )


@functools.cache
def know_kimi() -> None:
    """Let transformers read config.json of Kimi-K2 without the code beside it: it is a DeepSeek-V3.

    transformers 5.19 has no `kimi_k2`; tests/actor/test_family_lists.py fails when it does.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

    class KimiK2Config(DeepseekV3Config):
        model_type = "kimi_k2"

    class KimiK2ForCausalLM(DeepseekV3ForCausalLM):
        config_class = KimiK2Config

    AutoConfig.register("kimi_k2", KimiK2Config)
    AutoModelForCausalLM.register(KimiK2Config, KimiK2ForCausalLM)
