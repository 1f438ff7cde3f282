"""Recipes: functions that return a whole configuration, named by model and hardware."""

from __future__ import annotations

import difflib
import importlib

from megatron_pmd.config import RunConfig
from megatron_pmd.errors import ConfigError

RECIPES: dict[str, str] = {
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
