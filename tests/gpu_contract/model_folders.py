"""The recipes' models as Hugging Face folders without weights: what their config.json says decides enough."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_pmd.config import RunConfig, override
from recipes import RECIPES, recipe

KNOWN = Path(__file__).parents[2] / "megatron_pmd/planner/models.json"
ON_GPUS = [name for name in RECIPES if not name.endswith("_cpu")]
EMPTY_SAFETENSORS = (2).to_bytes(8, "little") + b"{}"
ARCHITECTURES = {
    "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}  # fmt: skip
OF_ALL = {
    "torch_dtype": "bfloat16",
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rope_theta": 1e6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "attention_bias": False,
}
OF_QWEN3_MOE = {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}
OF_DEEPSEEK = {
    "scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True, "n_group": 1,
    "topk_group": 1, "routed_scaling_factor": 2.5, "moe_layer_freq": 1, "aux_loss_alpha": 0.001,
    "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
GROUPED = {"DeepSeek-V3-Base": {"n_group": 8, "topk_group": 4}}


def published(name: str) -> dict[str, Any]:
    """What models.json knows of a model: its configuration, and the sizes on its card."""
    return json.loads(KNOWN.read_text())[name]


def folder_of(name: str, parent: Path) -> Path:
    """A folder that the actor and SGLang open, with config.json and a file without tensors."""
    folder = parent / name
    if folder.exists():
        return folder
    config = dict(published(name)["config"])
    # as docs/actor.md asks of Kimi-K2's folder
    config["model_type"] = config["model_type"].replace("kimi_k2", "deepseek_v3")
    kind = config["model_type"]
    config |= {"architectures": [ARCHITECTURES[kind]]} | OF_ALL
    config |= {"qwen3_moe": OF_QWEN3_MOE, "deepseek_v3": OF_DEEPSEEK}.get(kind, {}) | GROUPED.get(name, {})
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(EMPTY_SAFETENSORS)
    return folder


def configured(name: str, parent: Path, *settings: str) -> RunConfig:
    """A recipe with its model's folder, and with settings."""
    config = recipe(name)
    folder = folder_of(Path(config.model.path).name, parent)
    return override(config, [f"model.path={folder}", *settings])


def trained_alike() -> dict[str, list[str]]:
    """Recipes, and those that train the same model in the same way: they differ in their algorithm alone."""
    alike: dict[str, list[str]] = {}
    for name in ON_GPUS:
        one = recipe(name)
        key = str((one.model, one.layout, one.actor.megatron, one.actor.experts, one.actor.recompute))
        alike.setdefault(key, []).append(name)
    return {names[0]: names for names in alike.values()}
