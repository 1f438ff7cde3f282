"""What a model folder has beside its weights, so that transformers 4 and 5 read the same out of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from megatron_pmd.files import read_object
from megatron_pmd.hugging_face import WEIGHTS

SKIPPED = (".index.json", "conversion.json")
"""Files that tell of one folder's weights alone."""
FIXED: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"moe_layer_freq": 1, "scoring_func": "softmax"},
    "deepseek_v3": {"moe_layer_freq": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    "hy_v3": {"qk_norm": True, "route_norm": True},
    "minimax_m2": {"scoring_func": "sigmoid", "use_qk_norm": True, "use_routing_bias": True},
}
"""By model_type, what transformers' code of the family fixes and does not write; SGLang reads it."""


def copy_side_files(
    source: Path, target: Path, *, dtype: torch.dtype, quantization: dict[str, Any] | None = None
) -> None:
    """Configuration, generation settings, tokenizer, chat template, code: everything but weights.

    dtype, quantization: what config.json of the copy then says of the weights.
    """
    for file in sorted(source.iterdir()):
        if file.is_file() and file.suffix not in WEIGHTS and not file.name.endswith(SKIPPED):
            shutil.copyfile(file, target / file.name)
    config = read_object(source / "config.json") or {}
    config["dtype"] = config["torch_dtype"] = str(dtype).removeprefix("torch.")
    config.pop("quantization_config", None)
    if quantization is not None:
        config["quantization_config"] = quantization
    _write(target / "config.json", in_both_words(config))
    tokenizer = read_object(source / "tokenizer_config.json")
    if tokenizer is not None:
        _write(target / "tokenizer_config.json", tokenizer_of_both(tokenizer))


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def in_both_words(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json with what transformers 4 and 5 call by different names, under both.

    Either version takes a missing setting for its default, without a word: rope_theta 10,000, 128 experts.
    """
    fixed = FIXED.get(config.get("model_type", ""), {})
    return _rotary_in_both_words(fixed | _aliases(config) | _read_by_sglang(config) | config)


def _read_by_sglang(config: dict[str, Any]) -> dict[str, Any]:
    """What transformers 5 writes in words that SGLang does not read, in those that it reads."""
    kind, types = config.get("model_type"), config.get("layer_types") or []
    if kind == "gemma2" and "hidden_activation" in config:
        return {"hidden_act": config["hidden_activation"]}
    if kind == "qwen3_next" and "full_attention" in types:
        return {"full_attention_interval": types.index("full_attention") + 1}
    return {}


def _aliases(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that transformers 5 renamed, by their former names (`attribute_map` of the model)."""
    from transformers import CONFIG_MAPPING

    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING:  # code that comes with the model's folder reads its own words
        return {}
    renamed = CONFIG_MAPPING[kind].attribute_map
    return {old: config[new] for old, new in renamed.items() if new in config and old not in config}


def _rotary_in_both_words(config: dict[str, Any]) -> dict[str, Any]:
    """`rope_parameters` of transformers 5 beside `rope_theta` and `rope_scaling` of transformers 4."""
    parameters, scaling = config.get("rope_parameters"), config.get("rope_scaling")
    if parameters and "rope_theta" in parameters:
        theta = parameters["rope_theta"]
        scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
        if scaling.get("rope_type", "default") == "default":
            scaling = None
        return config | {"rope_theta": theta, "rope_scaling": scaling}
    if parameters is None and "rope_theta" in config:
        kind = (scaling or {}).get("rope_type") or (scaling or {}).get("type") or "default"
        return config | {
            "rope_parameters": {**(scaling or {}), "rope_type": kind, "rope_theta": config["rope_theta"]}
        }
    return config


def tokenizer_of_both(config: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer_config.json that transformers 4 can load, too.

    What transformers 5 calls TokenizersBackend, a tokenizer.json and nothing more, has had the name
    PreTrainedTokenizerFast before, which both know.
    """
    changed = dict(config)
    if changed.get("tokenizer_class") == "TokenizersBackend":
        changed["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(changed.get("extra_special_tokens"), list):  # transformers 4 wants names to them there
        changed["additional_special_tokens"] = changed.pop("extra_special_tokens")
    return changed
