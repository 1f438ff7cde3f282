"""Parameters counted from shapes, against the published numbers and against transformers' own modules."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from megatron_pmd.errors import ModelError
from megatron_pmd.planner.shapes import MODELS, from_config, shape_of

KNOWN: dict[str, dict[str, Any]] = json.loads(MODELS.read_text())


def digits(value: float) -> int:
    """Significant digits of a published number, e.g. 3 for 30.5e9."""
    return len(f"{value:.6e}".split("e")[0].replace(".", "").rstrip("0"))


def as_published(count: int, published: float) -> bool:
    """Whether the count, cut or rounded to the digits that were published, is the published number."""
    step = 10 ** (math.floor(math.log10(count)) + 1 - digits(published))
    # 1T for 1.026e12 has one digit, 671B three, 3.3B two
    return published in (math.floor(count / step) * step, round(count / step) * step) or (
        abs(count - published) < 1e-9
    )


@pytest.mark.parametrize("name", KNOWN)
def test_total_and_active_parameters_are_the_published_ones(name: str) -> None:
    shape, published = shape_of(name), KNOWN[name]["published"]
    assert as_published(shape.total, published["total"]), f"{shape.total:,}"
    assert as_published(shape.active, published["active"]), f"{shape.active:,}"


@pytest.mark.parametrize("name", [n for n in KNOWN if KNOWN[n]["config"]["model_type"] != "kimi_k2"])
def test_the_count_is_that_of_transformers_modules(name: str) -> None:
    """Built without memory, on torch's meta device. The expert bias is a buffer there: not a parameter."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**KNOWN[name]["config"]))
    assert shape_of(name).total == sum(p.numel() for p in model.parameters())


OTHERS: dict[str, dict[str, Any]] = {
    "gpt-oss-20b": dict(model_type="gpt_oss", num_hidden_layers=24, num_local_experts=32),
    "Nemotron": dict(model_type="nemotron", num_hidden_layers=3, num_key_value_heads=8),
    "Qwen3-Next-80B-A3B": dict(model_type="qwen3_next"),
    "Qwen3.5-MoE": dict(model_type="qwen3_5_moe_text", num_hidden_layers=4),
    "Qwen3.5": dict(model_type="qwen3_5_text", num_hidden_layers=8),
}
"""Of families that no recipe has: what differs from transformers' configuration."""


@pytest.mark.parametrize("name", OTHERS)
def test_biases_of_norms_and_experts_sinks_and_parts_without_a_gate_are_counted(name: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**OTHERS[name])
    with torch.device("meta"):
        parameters = dict(AutoModelForCausalLM.from_config(config).named_parameters())
    shape = from_config(name, "config.json", config.to_dict())
    assert shape.total == sum(p.numel() for p in parameters.values())
    stacked = {key: p for key, p in parameters.items() if ".experts." in key}  # one more dimension each
    filters = ".conv1d."
    vectors = sum(
        p.numel() for key, p in parameters.items() if p.ndim == 1 + (key in stacked) or filters in key
    )
    ends = sum(p.numel() for key, p in parameters.items() if key.startswith(("model.embed", "lm_head")))
    assert shape.outside_matrices == vectors + ends


def test_without_layer_types_the_published_interval_says_which_layers_have_linear_attention() -> None:
    """Qwen3-Next-80B-A3B's config.json has it in the place of layer_types; its card: 80B, 3B activated, 48
    layers, of which every fourth has attention with a cache."""
    from transformers import AutoConfig

    config = AutoConfig.for_model("qwen3_next").to_dict()
    del config["layer_types"]
    shape = from_config("Qwen3-Next-80B-A3B", "", config | {"full_attention_interval": 4})
    assert shape.linear is not None
    assert shape.caching_layers == 12 and shape.layers - 1 not in shape.linear.numbers
    assert as_published(shape.total, 80e9)
    assert shape.total == from_config("", "", AutoConfig.for_model("qwen3_next").to_dict()).total


def test_gpt_oss_has_the_published_number_of_parameters() -> None:
    """arXiv 2508.10925, table 1."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(**OTHERS["gpt-oss-20b"]).to_dict()
    assert as_published(from_config("gpt-oss-20b", "", config).total, 20.91e9)


@pytest.mark.parametrize("kind", ["gemma", "gemma2", "gemma3_text"])
def test_the_count_of_a_gemma_is_that_of_transformers_modules(kind: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        kind, vocab_size=99, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=20,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    described = {name: value for name, value in config.to_dict().items() if name != "tie_word_embeddings"}
    counted = {name: parameter.numel() for name, parameter in model.named_parameters()}
    shape = from_config(kind, "", described)
    assert shape.total == sum(counted.values())
    vectors = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 1)
    assert shape.outside_matrices == counted["model.embed_tokens.weight"] + vectors


def test_kimi_k2_is_counted_as_the_deepseek_v3_it_is_built_as() -> None:
    config = KNOWN["Kimi-K2-Base"]["config"]
    assert (
        from_config("k2", "", {**config, "model_type": "deepseek_v3"}).total == shape_of("Kimi-K2-Base").total
    )


def test_a_folder_s_own_config_json_comes_before_the_known_shape(tmp_path) -> None:
    folder = tmp_path / "Qwen2.5-7B"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(KNOWN["Qwen2.5-7B"]["config"] | {"num_hidden_layers": 1}))
    assert shape_of(str(folder)).layers == 1


def test_an_unknown_model_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ModelError, match=r"no known shape is called Qwen9.*Qwen3-30B-A3B-Base"):
        shape_of("models/Qwen9")


def test_a_family_that_cannot_be_counted_is_refused() -> None:
    with pytest.raises(ModelError, match="cannot count a model of type mamba"):
        from_config("m", "m/config.json", {"model_type": "mamba"})


def test_layers_without_experts_in_between_are_refused() -> None:
    config = KNOWN["tiny-moe"]["config"] | {"mlp_only_layers": [2]}
    with pytest.raises(ModelError, match="cannot be counted"):
        from_config("m", "m/config.json", config)
