"""Recipes: functions that return a whole configuration, named by model and hardware."""

from __future__ import annotations

import difflib
import importlib
from pathlib import Path

from megatron_pmd.config import RunConfig, load, override
from megatron_pmd.errors import ConfigError

RECIPES: dict[str, str] = {
    "deepseek_v3_256xh100": "recipes.deepseek_v3_256xh100:deepseek_v3_256xh100",
    "kimi_k2_1t_512xh100": "recipes.kimi_k2_1t_512xh100:kimi_k2_1t_512xh100",
    "moonlight_16b_a3b_16xh100": "recipes.moonlight_16b_a3b_16xh100:moonlight_16b_a3b_16xh100",
    "qwen2_5_7b_dapo_8xh100": "recipes.qwen2_5_7b_dapo_8xh100:qwen2_5_7b_dapo_8xh100",
    "qwen3_235b_a22b_128xh100": "recipes.qwen3_235b_a22b_128xh100:qwen3_235b_a22b_128xh100",
    "qwen3_30b_a3b_dapo_32xh100": "recipes.qwen3_30b_a3b_dapo_32xh100:qwen3_30b_a3b_dapo_32xh100",
    "qwen3_30b_a3b_dapo_tau005_32xh100": (
        "recipes.qwen3_30b_a3b_dapo_32xh100:qwen3_30b_a3b_dapo_tau005_32xh100"
    ),
    "qwen3_30b_a3b_fp8_32xh100": "recipes.qwen3_30b_a3b_dapo_32xh100:qwen3_30b_a3b_fp8_32xh100",
    "smollm2_135m_cpu": "recipes.smollm2_135m_cpu:smollm2_135m_cpu",
    "tiny_moe_cpu": "recipes.tiny_moe_cpu:tiny_moe_cpu",
}
"""Name -> module:function. The modules are imported only when asked for."""


def recipe(name: str) -> RunConfig:
    """The configuration of a recipe; ConfigError names the nearest one for an unknown name."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ConfigError(f"{name} is not a recipe{hint}; there are: {', '.join(sorted(RECIPES))}")
    module, _, function = RECIPES[name].partition(":")
    return getattr(importlib.import_module(module), function)()


def configuration(name_or_file: str, settings: list[str]) -> RunConfig:
    """The configuration that a recipe's name or a config.json stands for, with settings applied.

    Raises ConfigError for an unknown recipe, naming those there are.
    """
    if not name_or_file.endswith(".json"):
        return override(recipe(name_or_file), settings).resolved()
    if not Path(name_or_file).is_file():
        raise ConfigError(f"{name_or_file}: no such file")
    return override(load(Path(name_or_file)), settings).resolved()
