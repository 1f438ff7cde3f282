"""Settings arrive in megatron-core under names it has, and none does nothing without a word."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_pmd.actor import settings
from megatron_pmd.actor.model import provider_of_family
from megatron_pmd.actor.parallel import initialize
from megatron_pmd.config import Layout, RunConfig, override
from megatron_pmd.errors import ConfigError, LayoutError
from tests.actor.tiny_models import config_for

FP8 = ["model.precision=bf16", "actor.fp8.recipe=tensorwise"]


def configured(*assignments: str) -> RunConfig:
    return override(config_for(Path("model")), list(assignments))


def names(cls: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}


def test_every_field_that_we_set_is_one_of_megatron_core() -> None:
    full = configured(
        *FP8, "actor.fp8.parameter_gather=true", "actor.fp8.first_layers_bf16=1", "layout.expert=2",
        "layout.data=2", "layout.pipeline=2", "layout.virtual_pipeline=2", "actor.experts.dispatcher=deepep",
        "actor.recompute=selective", 'actor.recompute_modules=["mlp"]', "optimizer.moments=bf16",
    )  # fmt: skip
    # Megatron-Bridge's provider has autocast_dtype, the fused cross entropy, and what is left of GPTModel
    beyond = {"cross_entropy_loss_fusion"}
    assert settings.transformer_fields(full).keys() - names(TransformerConfig) <= beyond
    assert settings.DECIDED_BY.keys() | settings.FIXED.keys() <= names(TransformerConfig)
    assert settings.optimizer_fields(full).keys() <= names(OptimizerConfig)
    muon = configured("model.precision=bf16", "optimizer.name=muon", "optimizer.qk_clip_threshold=100")
    assert settings.optimizer_fields(muon).keys() <= names(OptimizerConfig)
    assert settings.transformer_fields(muon).keys() - names(TransformerConfig) <= beyond
    assert settings.data_parallel_fields(full).keys() <= names(DistributedDataParallelConfig)


def test_megatron_core_accepts_the_fp8_settings_that_we_let_through() -> None:
    for recipe in ("delayed", "tensorwise", "blockwise", "mxfp8"):
        chosen = configured("model.precision=bf16", f"actor.fp8.recipe={recipe}", "layout.tensor=2")
        fields = settings.transformer_fields(chosen)
        core = TransformerConfig(
            num_layers=4, hidden_size=64, num_attention_heads=4,
            **{name: value for name, value in fields.items() if name in names(TransformerConfig)},
        )  # fmt: skip
        assert core.fp8_recipe == recipe and not core.fp8_dot_product_attention
        assert settings.row_multiple(chosen) % (2 * 16) == 0


def test_a_field_that_a_setting_of_ours_decides_is_refused_beside_it() -> None:
    with pytest.raises(ConfigError, match=r"decided by layout\.tensor: set that"):
        settings.transformer_fields(configured('actor.megatron={"tensor_model_parallel_size": 2}'))
    with pytest.raises(ConfigError, match="recompute_method is decided by actor"):
        settings.transformer_fields(configured('actor.megatron={"recompute_method": "block"}'))
    with pytest.raises(ConfigError, match="mtp_num_layers cannot be set: layers that predict further tokens"):
        settings.transformer_fields(configured('actor.megatron={"mtp_num_layers": 1}'))


@pytest.mark.parametrize(
    "asked",
    [
        ['actor.lora={"rank": 4, "alpha": 8}'],
        ["actor.recompute=selective", 'actor.recompute_modules=["shared_experts"]'],
    ],
)
def test_shared_experts_are_not_overlapped_where_that_would_be_wrong(monkeypatch, asked) -> None:
    """On CUDA Megatron-Bridge has it for DeepSeek's and Kimi's families."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert settings.transformer_fields(configured(*asked))["moe_shared_expert_overlap"] is False
    assert "moe_shared_expert_overlap" not in settings.transformer_fields(configured())
    overlap = 'actor.megatron={"moe_shared_expert_overlap": true}'
    with pytest.raises(ConfigError, match=r"moe_shared_expert_overlap: not with actor\.lora"):
        settings.transformer_fields(configured(*asked, overlap))
    assert settings.transformer_fields(configured(overlap))["moe_shared_expert_overlap"] is True


@pytest.mark.parametrize(
    "router", ['{"moe_router_fusion": true}', '{"moe_router_load_balancing_type": "sinkhorn"}']
)
def test_a_router_that_cannot_be_told_what_to_choose_is_refused_where_routing_is_replayed(
    router: str,
) -> None:
    settings.transformer_fields(configured(f"actor.megatron={router}"))
    with pytest.raises(ConfigError, match="choose experts by themselves"):
        settings.transformer_fields(
            configured("actor.experts.replay_routing=true", f"actor.megatron={router}")
        )


@pytest.mark.parametrize(
    "graphs",
    ['{"cuda_graph_impl": "local"}', '{"enable_cuda_graph": true}', '{"external_cuda_graph": true}'],
)
def test_cuda_graphs_of_weights_that_leave_the_device_are_refused(graphs: str) -> None:
    settings.transformer_fields(configured('actor.megatron={"cuda_graph_impl": "none"}'))
    with pytest.raises(ConfigError, match="come back to another place"):
        settings.transformer_fields(configured(f"actor.megatron={graphs}"))


@pytest.mark.parametrize("apex", [True, False])
def test_gradients_accumulate_in_a_fused_kernel_where_the_output_layer_has_one_alone(monkeypatch, apex):
    """megatron-core's ColumnParallelLinear raises RuntimeError where it is asked for and does not import."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("megatron.core.tensor_parallel.layers._grad_accum_fusion_available", apex)
    fields = settings.transformer_fields(configured("model.precision=bf16"))
    assert fields["gradient_accumulation_fusion"] is apex


def test_moments_in_bf16_keep_whole_fp32_parameters_which_a_checkpoint_can_restore() -> None:
    fields = settings.optimizer_fields(configured("model.precision=bf16", "optimizer.moments=bf16"))
    assert fields["use_precision_aware_optimizer"] and not fields["store_param_remainders"]


def test_an_optimizer_on_the_host_that_could_not_be_resumed_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.offload=0\.5 with model\.precision=fp32"):
        configured("optimizer.offload=0.5")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without CUDA answers")
@pytest.mark.parametrize(
    "setting",
    [
        "actor.fp8.recipe=mxfp8",
        "optimizer.offload=0.5",
        "optimizer.moments=bf16",
        "optimizer.qk_clip_threshold=100",
        "actor.experts.dispatcher=deepep",
        "actor.recompute_modules=moe_act",
    ],
)
def test_what_only_cuda_can_do_is_refused_without_it(setting: str) -> None:
    also = []
    if "recompute" in setting:
        also, setting = ["actor.recompute=selective"], 'actor.recompute_modules=["moe_act"]'
    if "qk_clip" in setting:
        also = ["optimizer.name=muon"]
    chosen = configured("model.precision=bf16", "layout.data=2", "layout.expert=2", *also, setting)
    with pytest.raises(ConfigError, match="needs CUDA, and this machine has none") as caught:
        settings.refuse_without_cuda(chosen)
    assert setting.replace('["', "").replace('"]', "") in str(caught.value)
    settings.refuse_without_cuda(configured("model.precision=bf16"))


def test_as_many_ranks_as_the_layout_has_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(LayoutError, match=r"3 ranks were started, but tensor=2 .* needs 2; start 2 ranks"):
        initialize(Layout(tensor=2), seed=0, timeout_seconds=1)


def test_dropout_that_a_model_folder_asks_for_is_left_out() -> None:
    """Engines have none, and π_t of the same tokens would differ from pass to pass."""
    read = SimpleNamespace(attention_dropout=0.1, hidden_dropout=0.1)
    of_folder = SimpleNamespace(config=SimpleNamespace(model_type="qwen2", name_or_path="folder"))
    bridge = SimpleNamespace(to_megatron_provider=lambda load_weights: read, hf_pretrained=of_folder)
    provider = provider_of_family(bridge)
    assert provider.attention_dropout == provider.hidden_dropout == 0.0
