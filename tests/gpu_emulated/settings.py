"""The settings of precision and of the optimizer that the tests go through."""

from __future__ import annotations

from pathlib import Path

from megatron_pmd.config import RunConfig, override
from tests.actor.tiny_models import config_for

SETTINGS: dict[str, list[str]] = {
    "bf16": [],
    "bf16 moments": ["optimizer.moments=bf16"],
    "the optimizer on the host": ["optimizer.offload=1"],
    "half of the optimizer on the host": ["optimizer.offload=0.5"],
    "tensorwise": ["actor.fp8.recipe=tensorwise"],
    "tensorwise, gathered": ["actor.fp8.recipe=tensorwise", "actor.fp8.parameter_gather=true"],
    "tensorwise but for the ends": [
        "actor.fp8.recipe=tensorwise", "actor.fp8.first_layers_bf16=1", "actor.fp8.last_layers_bf16=1",
    ],
    "delayed": ["actor.fp8.recipe=delayed"],
    "blockwise": ["actor.fp8.recipe=blockwise"],
    "blockwise, gathered": ["actor.fp8.recipe=blockwise", "actor.fp8.parameter_gather=true"],
}  # fmt: skip


def config(models: Path, model: str, setting: str, layout: dict[str, int] | None = None) -> RunConfig:
    """A run of a tiny model in bf16 with one of SETTINGS.

    Experts are those of a recorded routing, so that rounding cannot send a token elsewhere.
    """
    words = SETTINGS[setting] + ([] if "dense" in model else ["actor.experts.replay_routing=true"])
    return override(config_for(models / model, layout, precision="bf16"), words)
