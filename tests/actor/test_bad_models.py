"""A model folder that is not whole or does not fit the layout: the error and the culprit it names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.actor.family_models import write_model_of
from tests.actor.launch import launch
from tests.actor.tiny_models import FAMILIES, MUON, write_model

Change = Callable[[Path], object]


def edit_config(**changes: Any) -> Change:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def edit_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def edit(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata={"format": "pt"})

    return edit


def reshaped(name: str, *shape: int) -> Change:
    return edit_weights(lambda tensors: tensors.update({name: torch.ones(shape)}))


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def index_of_a_missing_file(folder: Path) -> None:
    weight_map = dict.fromkeys(load_file(folder / "model.safetensors"), "model-00002-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
YARN = dict(rope_type="yarn", rope_theta=1e6, factor=4.0, original_max_position_embeddings=32)
LLAMA3 = dict(
    rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=4096,
)  # fmt: skip

IN_BLOCKS = (
    edit_config(quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]}),
    edit_weights(
        lambda t: t.update(
            {
                **{k: t[k].to(torch.float8_e4m3fn) for k in t if "q_proj" in k},
                **{f"{k}_scale_inv": torch.ones(1, 1) for k in t if "q_proj" in k},
            }
        )
    ),
)

# name: (family, what is done to its folder, the error, what the message must contain)
FOLDERS: dict[str, tuple[str, Change, str, list[str]]] = {
    "no configuration": ("qwen3", lambda f: (f / "config.json").unlink(), "ModelError", ["no config.json"]),
    "configuration not JSON": (
        "qwen3",
        lambda f: (f / "config.json").write_text('{"model_type": '),
        "ModelError",
        ["config.json"],
    ),
    "no weights": (
        "qwen3",
        lambda f: (f / "model.safetensors").unlink(),
        "ModelError",
        ["no *.safetensors"],
    ),
    "a dense tensor missing": (
        "qwen3",
        edit_weights(lambda t: t.pop("model.layers.2.self_attn.k_proj.weight")),
        "ModelError",
        ["model.layers.2.self_attn.k_proj.weight is missing"],
    ),
    "an expert's tensor missing": (
        "qwen3moe",
        edit_weights(lambda t: t.pop(EXPERT)),
        "ModelError",
        [f"{EXPERT} is missing"],
    ),
    "the output layer missing, not tied": (
        "llama",
        edit_weights(lambda t: t.pop("lm_head.weight")),
        "ModelError",
        ["lm_head.weight is missing"],
    ),
    "a dense tensor of the wrong shape": (
        "qwen3",
        reshaped("model.layers.1.mlp.up_proj.weight", 64, 64),
        "ModelError",
        ["model.layers.1.mlp.up_proj.weight has shape [64, 64], config.json asks for [128, 64]"],
    ),
    "an expert's tensor of the wrong shape": (
        "qwen3moe",
        reshaped(EXPERT, 16, 64),
        "ModelError",
        [f"{EXPERT} has shape [16, 64], config.json asks for [32, 64]"],
    ),
    "a tensor that would be broadcast": (
        "qwen2",
        reshaped("model.layers.0.self_attn.k_proj.bias", 1),
        "ModelError",
        ["model.layers.0.self_attn.k_proj.bias has shape [1], config.json asks for [32]"],
    ),
    "truncated weights": ("qwen3", truncate, "ModelError", ["model.safetensors", "is the file complete?"]),
    "weights in FP8": (
        "qwen3",
        edit_weights(lambda t: t.update({k: t[k].to(torch.float8_e4m3fn) for k in t if "q_proj" in k})),
        "ModelError",
        [
            "q_proj.weight is FP8, with weight_block_size=None in config.json",
            "read in blocks of 128 x 128",
        ],
    ),
    "a family's FP8 that is not read": (
        "qwen3",
        lambda folder: [change(folder) for change in IN_BLOCKS],
        "ModelError",
        ["is FP8, from which deepseek_v3, kimi_k2 are", "convert megatron-to-hf CHECKPOINT --dtype bf16"],
    ),
    "an index naming a file that is not there": (
        "qwen3",
        index_of_a_missing_file,
        "ModelError",
        ["model-00002-of-00002.safetensors"],
    ),
    "an architecture unknown to transformers": (
        "qwen3",
        edit_config(model_type="hal9000", architectures=["HalForCausalLM"]),
        "ModelError",
        ["hal9000"],
    ),
    "an architecture unknown to Megatron-Bridge": (
        "qwen3",
        edit_config(model_type="bloom", architectures=["BloomForCausalLM"]),
        "ModelError",
        ["BloomForCausalLM"],
    ),
    "a rotary type that the bridge drops": (
        "qwen3",
        edit_config(rope_parameters=YARN),
        "ModelError",
        ["rope_parameters", "yarn"],
    ),
    "a llama3 rotary scaling with numbers that megatron-core ignores": (
        "llama3",
        edit_config(rope_parameters=LLAMA3),
        "ModelError",
        ["rope_parameters", "4096", "8192"],
    ),
    "llama3 scaling in a family whose bridge drops it": (
        "qwen2",
        edit_config(rope_parameters=LLAMA3 | {"original_max_position_embeddings": 8192}),
        "ModelError",
        ["rope_parameters", "llama3"],
    ),
}

# name: (family, changes to the configuration, the error, what the message must contain)
SETTINGS: dict[str, tuple[str, dict[str, Any], str, list[str]]] = {
    "heads": ("qwen3", dict(layout=dict(tensor=8)), "LayoutError", ["layout.tensor=8", "4 attention heads"]),
    "key-value heads": (
        "qwen3",
        dict(layout=dict(tensor=4)),
        "LayoutError",
        ["layout.tensor=4", "2 key-value heads"],
    ),
    "layers": ("qwen3", dict(layout=dict(pipeline=3)), "LayoutError", ["layout.pipeline=3", "4 layers"]),
    "experts": (
        "qwen3moe",
        dict(layout=dict(expert=3, data=3)),
        "LayoutError",
        ["layout.expert=3", "4 experts"],
    ),
    "experts of a dense model": (
        "qwen3",
        dict(layout=dict(expert=2, data=2)),
        "LayoutError",
        ["layout.expert=2", "has no experts"],
    ),
    "vocabulary": (
        "odd",
        dict(layout=dict(tensor=2)),
        "LayoutError",
        ["layout.tensor=2", "509 rows of the vocabulary"],
    ),
    "chunks": (
        "llama",
        dict(layout=dict(pipeline=2, virtual_pipeline=3)),
        "LayoutError",
        ["layout.pipeline x virtual_pipeline=6", "4 layers"],
    ),
    "expert bias of a router without": (
        "qwen3moe",
        dict(actor={"experts": {"bias_update_rate": 1e-3}}),
        "ConfigError",
        ["actor.experts.bias_update_rate=0.001", "has no expert bias"],
    ),
    "settings of experts of a dense model": (
        "qwen3",
        dict(actor={"experts": {"bias_update_rate": 1e-3}}),
        "ConfigError",
        ["actor.experts", "has no experts"],
    ),
    "recomputing experts of a dense model": (
        "qwen3",
        dict(actor={"recompute": "selective", "recompute_modules": ["moe"]}),
        "ConfigError",
        ["actor.recompute_modules", "has no moe to recompute"],
    ),
    "clipping queries that a norm follows": (
        "qwen3",
        dict(precision="bf16", optimizer=MUON.model_copy(update={"qk_clip_threshold": 100.0})),
        "ConfigError",
        ["optimizer.qk_clip_threshold=100", "normalises queries and keys"],
    ),
    "clipping queries whose scores have a cap": (
        "gemma2",
        dict(precision="bf16", optimizer=MUON.model_copy(update={"qk_clip_threshold": 100.0})),
        "ConfigError",
        ["optimizer.qk_clip_threshold=100", "caps its scores at 2 itself"],
    ),
    "clipping queries that have biases": (
        "qwen2",
        dict(precision="bf16", optimizer=MUON.model_copy(update={"qk_clip_threshold": 100.0})),
        "ConfigError",
        ["optimizer.qk_clip_threshold=100", "has biases of queries and keys"],
    ),
    "clipping a part of fused queries and keys": (
        "llama",
        dict(
            precision="bf16",
            layout=dict(tensor=2),
            optimizer=MUON.model_copy(update={"qk_clip_threshold": 100.0}),
        ),
        "ConfigError",
        ["optimizer.qk_clip_threshold=100", "one tensor-parallel rank's rows", "needs layout.tensor=1"],
    ),
    "an adapter before a norm": (
        "gemma2",
        dict(actor={"lora": {"rank": 2, "alpha": 4}}),
        "ConfigError",
        ["actor.lora.targets", "a norm behind linear_fc2 and linear_proj", "name linear_qkv, linear_fc1"],
    ),
    "layers in an order that Megatron-Bridge cannot make": (
        "disordered",
        {},
        "ModelError",
        ["layer_types of config.json are full_attention, sliding_attention"],
    ),
    "a field that megatron-core does not have": (
        "qwen3",
        dict(actor={"megatron": {"attention_dropuot": 0.1}}),
        "ConfigError",
        ["actor.megatron.attention_dropuot is not a field"],
    ),
}


@pytest.fixture(scope="module")
def outcomes(models, tmp_path_factory):
    """(error type, message) of every case, from one process."""
    root = tmp_path_factory.mktemp("bad")
    write_model(root / "odd", "qwen2", vocab_size=509)
    write_model_of(root / "gemma2", "gemma2")
    order = ["full_attention", "sliding_attention"]
    write_model_of(root / "disordered", "gemma3_text", layer_types=order)
    cases: dict[str, tuple[Path, dict[str, Any]]] = {"unchanged": (models / "qwen3", {})}
    for k, (name, (family, change, _, _)) in enumerate(FOLDERS.items()):
        folder = root / f"case-{k}"
        shutil.copytree(models / family, folder)
        change(folder)
        cases[name] = (folder, {})
    for name, (family, changes, _, _) in SETTINGS.items():
        cases[name] = ((models if family in FAMILIES else root) / family, changes)
    return cases, launch("build_errors", cases=cases)[0]


def test_the_unchanged_folder_gives_no_error(outcomes):
    assert outcomes[1]["unchanged"] == ("", "")


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_is_not_a_whole_known_model_is_refused_naming_the_culprit(outcomes, name):
    cases, errors = outcomes
    kind, message = errors[name]
    assert kind == FOLDERS[name][2], message
    assert str(cases[name][0]) in message
    for part in FOLDERS[name][3]:
        assert part in message


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_that_does_not_fit_the_model_is_refused_by_name(outcomes, name):
    kind, message = outcomes[1][name]
    assert kind == SETTINGS[name][2], message
    for part in SETTINGS[name][3]:
        assert part in message
