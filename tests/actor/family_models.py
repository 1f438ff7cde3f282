"""Tiny random models of the families that Megatron-Bridge maps: two layers, 64 wide."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from tests.actor.further_tokens import FURTHER_TOKENS, add_layer
from tests.actor.reference import compute
from tests.actor.tiny_models import FAMILIES, LATENT, STEPS, write

EXPERTS: dict[str, Any] = dict(head_dim=16, moe_intermediate_size=32, num_experts_per_tok=2)
WINDOW: dict[str, Any] = dict(sliding_window=8, layer_types=["sliding_attention", "full_attention"])
LINEAR: dict[str, Any] = dict(
    layer_types=["linear_attention", "full_attention"], linear_key_head_dim=8, linear_value_head_dim=12,
    linear_num_key_heads=2, linear_num_value_heads=4,
)  # fmt: skip
YARN = dict(
    rope_type="yarn", rope_theta=1e4, factor=40.0, beta_fast=32, beta_slow=1, mscale=0.707,
    mscale_all_dim=0.707, original_max_position_embeddings=16,
)  # fmt: skip

Case = tuple[str, dict[str, Any], list[dict[str, int]]]
"""What transformers calls its configuration, settings beside tiny_models.COMMON, the layouts on two ranks."""
MODELS: dict[str, Case] = {
    "mistral": ("Mistral", dict(sliding_window=8), [dict(tensor=2), dict(pipeline=2)]),
    "gemma": ("Gemma", dict(head_dim=16), [dict(tensor=2), dict(pipeline=2)]),
    # caps that bend: the scores and logits of random weights are larger than these
    "gemma2": (
        "Gemma2",
        dict(
            WINDOW, head_dim=16, query_pre_attn_scalar=24, attn_logit_softcapping=2.0,
            final_logit_softcapping=4.0,
        ),
        [dict(tensor=2), dict(pipeline=2)],
    ),
    "gemma3_text": (
        "Gemma3Text",
        dict(
            WINDOW, head_dim=16, query_pre_attn_scalar=24,
            rope_parameters=dict(
                sliding_attention=dict(rope_type="default", rope_theta=1e4),
                full_attention=dict(rope_type="linear", rope_theta=1e6, factor=8.0),
            ),
        ),
        [dict(tensor=2), dict(pipeline=2)],
    ),
    "glm4_moe": (
        "Glm4Moe",
        dict(
            EXPERTS, n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=1, n_group=1, topk_group=1,
            norm_topk_prob=True, routed_scaling_factor=2.5, use_qk_norm=True, attention_bias=True,
        ),
        [dict(tensor=2, expert=2), dict(pipeline=2)],
    ),
    "glm4_moe_lite": (
        "Glm4MoeLite",
        dict(LATENT, q_lora_rank=32, n_shared_experts=1),
        [dict(tensor=2, expert=2), dict(pipeline=2)],
    ),
    "deepseek_v2": (
        "DeepseekV2",
        dict(
            LATENT, q_lora_rank=None, n_shared_experts=2, topk_method="greedy", norm_topk_prob=False,
            routed_scaling_factor=1.0, rope_parameters=YARN,
        ),
        [dict(tensor=2, expert=2), dict(pipeline=2)],
    ),
    "olmoe": (
        "Olmoe",
        # the row of a token for padding starts as zero, and gets no gradient in transformers
        dict(
            num_key_value_heads=4, num_experts=4, num_experts_per_tok=2, intermediate_size=32,
            pad_token_id=None,
        ),
        [dict(expert=2, data=2), dict(pipeline=2)],
    ),
    "minimax_m2": (
        "MiniMaxM2",
        dict(
            head_dim=16, rotary_dim=8, num_local_experts=4, num_experts_per_tok=2, intermediate_size=32
        ),
        [dict(expert=2, data=2), dict(pipeline=2)],
    ),
    "exaone4": (
        "Exaone4",
        dict(
            tie_word_embeddings=True, sliding_window=None, layer_types=["full_attention"] * 2,
            rope_parameters=FAMILIES["llama3"][1]["rope_parameters"] | {"factor": 16.0},
        ),
        [dict(tensor=2), dict(pipeline=2)],
    ),
    "exaone_moe": (
        "ExaoneMoe",
        dict(EXPERTS | WINDOW, num_experts=4, num_shared_experts=1),
        [dict(tensor=2, expert=2), dict(pipeline=2)],
    ),
    "hy_v3": (
        "HYV3",
        dict(EXPERTS, num_experts=4, num_shared_experts=1, first_k_dense_replace=1),
        [dict(tensor=2, expert=2), dict(pipeline=2)],
    ),
    "nemotron": (
        "Nemotron",
        dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.25)),
        [dict(tensor=2), dict(pipeline=2)],
    ),
    "gpt_oss": (
        "GptOss",
        dict(
            head_dim=16, num_local_experts=4, num_experts_per_tok=2, intermediate_size=48, sliding_window=8,
            tie_word_embeddings=False,
        ),
        [dict(tensor=2, expert=2), dict(pipeline=2), dict(context=2, expert=2)],
    ),
    "qwen3_next": (
        "Qwen3Next",
        dict(
            EXPERTS | LINEAR, num_experts=4, shared_expert_intermediate_size=32, partial_rotary_factor=0.5
        ),
        [dict(tensor=2, expert=2), dict(pipeline=2), dict(context=2, expert=2)],
    ),
    "qwen3_5_text": (
        "Qwen3_5Text",
        dict(LINEAR, head_dim=16, tie_word_embeddings=False),
        [dict(tensor=2), dict(pipeline=2)],
    ),
    "qwen3_5_moe_text": (
        "Qwen3_5MoeText",
        dict(
            # of larger weights fp32 alone, in transformers too, is 1.4e-5 from float64
            EXPERTS | LINEAR, num_experts=4, shared_expert_intermediate_size=32, tie_word_embeddings=False,
            initializer_range=0.05,
        ),
        [dict(tensor=2, expert=2), dict(pipeline=2)],
    ),
    "kimi_k2": (
        "DeepseekV3",
        # matrices larger than a block of FP8
        dict(FAMILIES["deepseek"][1], n_group=1, intermediate_size=160, moe_intermediate_size=144),
        [dict(tensor=2, expert=2), dict(pipeline=2)],
    ),
}  # fmt: skip
"""By model_type; those of tiny_models.FAMILIES are compared, with four layers, in test_logits.py."""


UNMAPPED: dict[str, str] = {
    "deepseek_v32": "DeepSeek-V3.2",
    "glm": "GLM-4, 9B (`glm-4-9b-hf`)",
    "glm4": "GLM-4-0414, GLM-Z1",
    "minimax": "MiniMax-Text-01",
    "ministral": "Ministral, 8B",
    "ministral3": "Ministral 3 without images",
}
"""model_type, and whose it is, of families that one may look for and Megatron-Bridge does not know."""


def write_model_of(folder: Path, kind: str, **changes: Any) -> None:
    """The model of a family; changes: of its settings."""
    name, settings, _ = MODELS[kind]
    write(folder, name, {**settings, "num_hidden_layers": 2, **changes})


def write_family(folder: Path, kind: str) -> None:
    """The model, with its layer that predicts further tokens, and what transformers computes with it."""
    write_model_of(folder, kind)
    if kind in FURTHER_TOKENS:
        add_layer(folder, kind)
    torch.save(compute(folder, STEPS[:1]), folder / "reference.pt")
    if kind == "kimi_k2":  # published under this name, which transformers does not know, with code to read it
        config = json.loads((folder / "config.json").read_text())
        config |= {"model_type": kind, "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}}
        (folder / "config.json").write_text(json.dumps(config))


def write_quantized(source: Path, folder: Path) -> dict[str, np.ndarray]:
    """The model of a folder with its matrices in FP8 blocks; what they stand for, in float64.

    Each is rounded to the nearest of the numbers that e4m3 has, which are written out here.
    """
    codes = np.arange(127)  # 127 is NaN; those above are negative
    exponent, mantissa = codes >> 3, codes & 7
    numbers = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    held, meant = {n: t for file in source.glob("*.safetensors") for n, t in load_file(file).items()}, {}
    for name in [n for n in held if re.search(r"(_proj|_mqa)(?<!eh_proj)\.weight$", n)]:
        weight = held[name].double().numpy()
        scales = np.empty([-(-size // 128) for size in weight.shape], dtype=np.float32)
        code, values = np.empty(weight.shape, dtype=np.uint8), np.empty_like(weight)
        for i, j in np.ndindex(*scales.shape):
            own = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
            scales[i, j] = np.abs(weight[own]).max() / 448
            nearest = np.abs(np.abs(weight[own] / scales[i, j])[..., None] - numbers).argmin(-1)
            code[own] = nearest + 128 * (weight[own] < 0)
            values[own] = np.sign(weight[own]) * numbers[nearest] * np.float64(scales[i, j])
        held[name] = torch.from_numpy(code).view(torch.float8_e4m3fn)
        held[name + "_scale_inv"], meant[name] = torch.from_numpy(scales), values
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))
    return meant


def write_mxfp4(source: Path, folder: Path) -> dict[str, np.ndarray]:
    """The model as gpt-oss is published: its experts' matrices in MXFP4; what they stand for, in float64.

    OCP Microscaling Formats v1.0: 32 numbers of 4 bits along a matrix's input, two a byte, the first in the
    lower half; each is one of eight magnitudes and a sign, times the block's power of two, whose exponent is
    kept plus 127. The matrices are kept as [experts, outputs, inputs], and meant as the source has them:
    [experts, inputs, outputs].
    """
    magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    shutil.copytree(source, folder)
    held, meant = load_file(folder / "model.safetensors"), {}
    for name in [name for name in held if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        weight = np.ascontiguousarray(held.pop(name).double().numpy().swapaxes(1, 2))
        blocks = weight.reshape(*weight.shape[:2], -1, 32)
        exponent = np.floor(np.log2(np.abs(blocks).max(-1))) - 2  # 6 is the largest, 4 its power of two
        scaled = blocks / 2.0 ** exponent[..., None]
        nearest = np.abs(np.abs(scaled)[..., None] - magnitudes).argmin(-1)
        values = np.sign(scaled) * magnitudes[nearest] * 2.0 ** exponent[..., None]
        codes = (nearest + 8 * (scaled < 0)).astype(np.uint8)
        held[name + "_blocks"] = torch.from_numpy(codes[..., ::2] | codes[..., 1::2] << 4)
        held[name + "_scales"] = torch.from_numpy((exponent + 127).astype(np.uint8))
        meant[name] = values.reshape(weight.shape).swapaxes(1, 2)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(config))
    return meant


def write_rope(source: Path, folder: Path, **changes: Any) -> Path:
    """The model with other rotary settings."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] |= changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_refused(folder: Path, kind: str, architecture: str, **changes: Any) -> None:
    """A folder with a configuration alone."""
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING[kind](**changes)
    config.architectures = [architecture]
    config.save_pretrained(folder)
