"""Recipes: functions that return a whole configuration, named by model and hardware."""

from __future__ import annotations

from collections.abc import Callable
from inspect import isfunction
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_pmd.config import RunConfig, explain, load, override
from megatron_pmd.errors import ConfigError
from megatron_pmd.plugins import Registry, load_module

RECIPES = Registry(
    "recipe",
    {
        "deepseek_v3_256xh100": "recipes.deepseek_v3_256xh100:deepseek_v3_256xh100",
        "deepseek_v3_lora_64xh100": "recipes.deepseek_v3_256xh100:deepseek_v3_lora_64xh100",
        "kimi_k2_1t_512xh100": "recipes.kimi_k2_1t_512xh100:kimi_k2_1t_512xh100",
        "kimi_k2_lora_64xh100": "recipes.kimi_k2_1t_512xh100:kimi_k2_lora_64xh100",
        "moonlight_16b_a3b_16xh100": "recipes.moonlight_16b_a3b_16xh100:moonlight_16b_a3b_16xh100",
        "qwen2_5_7b_dapo_8xh100": "recipes.qwen2_5_7b_dapo_8xh100:qwen2_5_7b_dapo_8xh100",
        "qwen3_0_6b_gsm8k_1xh100": "recipes.qwen3_0_6b_gsm8k_1xh100:qwen3_0_6b_gsm8k_1xh100",
        "qwen3_235b_a22b_128xh100": "recipes.qwen3_235b_a22b_128xh100:qwen3_235b_a22b_128xh100",
        "qwen3_30b_a3b_dapo_32xh100": "recipes.qwen3_30b_a3b_dapo_32xh100:qwen3_30b_a3b_dapo_32xh100",
        "qwen3_30b_a3b_dapo_tau005_32xh100": (
            "recipes.qwen3_30b_a3b_dapo_32xh100:qwen3_30b_a3b_dapo_tau005_32xh100"
        ),
        "qwen3_30b_a3b_fp8_32xh100": "recipes.qwen3_30b_a3b_dapo_32xh100:qwen3_30b_a3b_fp8_32xh100",
        "qwen3_30b_a3b_longcontext_64xh100": (
            "recipes.qwen3_30b_a3b_longcontext_64xh100:qwen3_30b_a3b_longcontext_64xh100"
        ),
        "qwen3_30b_a3b_lora_8xh100": "recipes.qwen3_30b_a3b_lora_8xh100:qwen3_30b_a3b_lora_8xh100",
        "qwen3_30b_a3b_overlap_48xh100": (
            "recipes.qwen3_30b_a3b_overlap_48xh100:qwen3_30b_a3b_overlap_48xh100"
        ),
        "smollm2_135m_cpu": "recipes.smollm2_135m_cpu:smollm2_135m_cpu",
        "smollm2_135m_lora_cpu": "recipes.smollm2_135m_cpu:smollm2_135m_lora_cpu",
        "tiny_moe_cpu": "recipes.tiny_moe_cpu:tiny_moe_cpu",
        "tiny_moe_overlap_cpu": "recipes.tiny_moe_overlap_cpu:tiny_moe_overlap_cpu",
    },
)
"""Name -> module:function. The modules are imported only when asked for."""


def recipe(name: str) -> RunConfig:
    """The configuration that a recipe returns: one of RECIPES, or a user's own.

    name  a name of RECIPES, `module:function`, `path/to/file.py:function`, or `path/to/file.py` alone: then
          the function of the file's name, or the only one that returns a RunConfig
    Raises ConfigError for an unknown name, with the nearest, and for a function that returns no RunConfig.
    """
    function = _function_of(name) if name.endswith(".py") else RECIPES.load(name, what="recipe")
    try:
        config = function()
    except ValidationError as error:
        lines = "\n".join(explain(error, RunConfig))
        raise ConfigError(f"recipe {name}: {error.title} is wrong:\n{lines}") from error
    if not isinstance(config, RunConfig):
        raise ConfigError(f"recipe {name} returned a {type(config).__name__}, not a RunConfig")
    return config


def _function_of(file: str) -> Callable[..., Any]:
    module = load_module(file, what=f"recipe={file!r}")
    own = {n: f for n, f in vars(module).items() if isfunction(f) and f.__module__ == module.__name__}
    if Path(file).stem in own:
        return own[Path(file).stem]
    recipes = [n for n, f in own.items() if n[0] != "_" and _returns(f).endswith("RunConfig")]
    if len(recipes) != 1:
        raise ConfigError(
            f"{file} has several recipes, {' and '.join(recipes)}: name one, as in {file}:{recipes[0]}"
            if recipes
            else f"{file} has no function {Path(file).stem}, and none that says it returns a RunConfig"
        )
    return own[recipes[0]]


def _returns(function: Callable[..., Any]) -> str:
    annotation = function.__annotations__.get("return", "")
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "")


def configuration(name_or_file: str, settings: list[str]) -> RunConfig:
    """The configuration that a recipe (see recipe) or a config.json stands for, with settings applied."""
    if not name_or_file.endswith(".json"):
        return override(recipe(name_or_file), settings).resolved()
    if not Path(name_or_file).is_file():
        raise ConfigError(f"{name_or_file}: no such file")
    return override(load(Path(name_or_file)), settings).resolved()
