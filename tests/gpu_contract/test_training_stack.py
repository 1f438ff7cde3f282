"""Every recipe and FP8 setting, as far as megatron-core and Transformer Engine take them without a device."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformer_engine.pytorch as te
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.fp8_utils import get_fp8_recipe
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.multi_latent_attention import MLASelfAttention

from megatron_pmd.actor import latent_attention, settings
from megatron_pmd.config import RunConfig
from megatron_pmd.errors import ConfigError
from recipes import recipe
from tests.gpu_contract.meta_stage import as_rank, is_of_transformer_engine, parameters_of_stage, stage_of
from tests.gpu_contract.model_folders import ON_GPUS, configured, published, trained_alike
from tests.gpu_contract.pretended_device import compute_capability

FP8 = {
    "tensorwise": ["actor.fp8.recipe=tensorwise"],
    "delayed": ["actor.fp8.recipe=delayed"],
    "blockwise": ["actor.fp8.recipe=blockwise"],
    "mxfp8": ["actor.fp8.recipe=mxfp8"],
    "tensorwise gathered": ["actor.fp8.recipe=tensorwise", "actor.fp8.parameter_gather=true"],
    "blockwise gathered": ["actor.fp8.recipe=blockwise", "actor.fp8.parameter_gather=true"],
    "mxfp8 gathered": ["actor.fp8.recipe=mxfp8", "actor.fp8.parameter_gather=true"],
    "tensorwise but for the ends": [
        "actor.fp8.recipe=tensorwise", "actor.fp8.first_layers_bf16=1", "actor.fp8.last_layers_bf16=1",
    ],
}  # fmt: skip
OF_TRANSFORMER_ENGINE = {
    "tensorwise": "float8_current_scaling",
    "delayed": "delayed",
    "blockwise": "float8_block_scaling",
    "mxfp8": "mxfp8",
}
"""Our names of recipes -> the question that Transformer Engine's recipe answers with yes."""
BLACKWELL = (10, 0)
OPTIMIZERS = [[], ["optimizer.moments=bf16"], ["optimizer.offload=1"]]


def refused_words(name: str, words: list[str]) -> str | None:
    """A part of the message in which the configuration refuses these settings; None: it takes them."""
    one = recipe(name)
    gathered, muon = "actor.fp8.parameter_gather=true" in words, one.optimizer.name == "muon"
    if one.actor.lora and gathered:
        return "actor.lora with actor.fp8.parameter_gather"
    if one.actor.lora and "actor.fp8.recipe=delayed" in words:
        return "actor.lora with actor.fp8.recipe=delayed"
    for setting in ("optimizer.moments", "optimizer.offload"):
        if muon and any(word.startswith(setting) for word in words):
            return setting
    if muon and gathered:
        return "actor.fp8.parameter_gather with optimizer.name=muon"
    if "optimizer.offload=1" in words and gathered:
        return "actor.fp8.parameter_gather with optimizer.offload"
    return None


CASES = [(name, setting) for name in trained_alike() for setting in ["as written", *FP8]]


def check_layers(stage: Any, config: RunConfig) -> None:
    """Each product of matrices in a layer, and each norm, is Transformer Engine's; but for the router's."""
    layers = stage.decoder.layers
    assert len(layers) > 0
    own = {
        name: type(module).__name__
        for name, module in layers.named_modules()
        if list(module.parameters(recurse=False)) and not is_of_transformer_engine(module)
    }
    assert set(own.values()) <= {"TopKRouter"}, own
    attention = {type(layer.self_attention.core_attention).__name__ for layer in layers}
    assert attention == {"TEDotProductAttention"}
    assert bool(own) == bool(getattr(stage.config, "num_moe_experts", None))


@pytest.mark.parametrize(("name", "setting"), CASES, ids=lambda value: value.replace(" ", "_"))
def test_a_recipe_becomes_layers_of_transformer_engine_under_every_fp8_setting(name, setting, models):
    words = FP8.get(setting, [])
    if refused := refused_words(name, words):
        with pytest.raises(ConfigError, match=re.escape(refused)):
            configured(name, models, *words)
        return
    config = configured(name, models, *words)
    mxfp8 = config.actor.fp8 is not None and config.actor.fp8.recipe == "mxfp8"
    if mxfp8:
        with pytest.raises(ConfigError, match=r"needs compute capability 10\.0"):
            settings.check_device(config)
    with compute_capability(*(BLACKWELL if mxfp8 else (9, 0))):
        settings.check_device(config)
        with as_rank(0, config.layout):
            bridge, provider, stage = stage_of(config)
            # engines alone have graph pools: no account of the actor's memory has any
            assert provider.cuda_graph_impl == "none"
            check_layers(stage, config)
            assert None not in bridge.get_conversion_tasks([stage]), "the bridge does not know a weight"
            if config.actor.fp8 is None:
                assert provider.fp8 is None
                return
            chosen = get_fp8_recipe(provider)
            assert getattr(chosen, OF_TRANSFORMER_ENGINE[config.actor.fp8.recipe])(), chosen
            assert bool(provider.fp8_param) == config.actor.fp8.parameter_gather
            if not mxfp8:  # what a device can is asked once for a process
                assert te.quantization.check_recipe_support(chosen) is None


def test_megatron_core_still_gives_queries_that_are_not_compressed_a_norm(models, monkeypatch):
    """Where it does not, LatentAttention (megatron_pmd/actor/latent_attention.py) is needed no more."""
    config = configured("moonlight_16b_a3b_16xh100", models)

    def norms() -> list[str]:
        with as_rank(0, config.layout):
            _, _, stage = stage_of(config)
        return [name for name, _ in stage.named_parameters() if "linear_q_proj.layer_norm" in name]

    assert norms() == []
    monkeypatch.setattr(latent_attention, "LatentAttention", MLASelfAttention)
    assert norms() != []


@pytest.mark.parametrize("name", trained_alike())
def test_the_stages_of_a_recipe_hold_together_the_parameters_of_the_models_card(name, models):
    config = configured(name, models)
    layout, total = config.layout, 0
    for stage_number in range(layout.pipeline):
        with as_rank(stage_number * layout.ranks_per_stage, layout):
            total += parameters_of_stage(stage_of(config)[2], layout)
    card = published(Path(config.model.path).name)["published"]["total"]
    assert total == pytest.approx(card, rel=0.03)


@pytest.mark.parametrize("name", ON_GPUS)
def test_every_optimizer_and_data_parallel_setting_is_one_of_megatron_core(name, models):
    for fp8 in [[], *FP8.values()]:
        for optimizer in OPTIMIZERS:
            if refused := refused_words(name, [*fp8, *optimizer]):
                with pytest.raises(ConfigError, match=re.escape(refused)):
                    configured(name, models, *fp8, *optimizer)
                continue
            config = configured(name, models, *fp8, *optimizer)
            made = OptimizerConfig(**settings.optimizer_fields(config))
            ddp = DistributedDataParallelConfig(**settings.data_parallel_fields(config))
            assert made.bf16 and ddp.overlap_grad_reduce and not made.optimizer_cuda_graph
            assert made.optimizer_cpu_offload == bool(config.optimizer.offload)
            assert (made.exp_avg_dtype is torch.bfloat16) == (config.optimizer.moments == "bf16")


def test_gradients_are_accumulated_in_a_kernel_only_where_apex_brings_it(models):
    """The environment of the contract has no apex: megatron-core must be told not to ask for its kernel."""
    fields = settings.transformer_fields(configured(ON_GPUS[0], models))
    there = find_spec("fused_weight_gradient_mlp_cuda") is not None
    assert fields["gradient_accumulation_fusion"] is there
