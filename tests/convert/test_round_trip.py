"""Hugging Face → Megatron → Hugging Face changes no byte, and the result is a model transformers loads."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file

from tests.actor.launch import launch
from tests.convert.command_line import tensors
from tests.convert.conftest import PROGRAMS, VARIANTS, VERIFIED, VERIFIED_THERE

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", VARIANTS)
def test_every_tensor_comes_back_bit_for_bit(variants, converted, name):
    before, after = tensors(variants / name), tensors(converted[0] / name / "hf")
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype
        assert torch.equal(tensor, after[key]), key


@pytest.mark.parametrize("name", ["llama, tied", "qwen3moe, an odd vocabulary"])
def test_the_result_loads_in_transformers_and_computes_the_same(variants, converted, name):
    from transformers import AutoModelForCausalLM

    tokens = torch.arange(1, 40)[None]
    with torch.no_grad():
        before, after = (
            AutoModelForCausalLM.from_pretrained(folder)(tokens).logits
            for folder in (variants / name, converted[0] / name / "hf")
        )
    assert before.std() > 0.1
    assert torch.equal(before, after)


@pytest.mark.parametrize("name", ["qwen2", "qwen3moe"])
def test_the_manifest_has_every_tensor_once_with_its_hash(variants, converted, name):
    there, back = converted[1][name]
    expected = {
        key: hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        for key, tensor in tensors(variants / name).items()
    }
    for manifest in (there, back):
        assert {key: entry["sha256"] for key, entry in manifest["tensors"].items()} == expected
    # each is made into, and out of, exactly one parameter
    made_into = [key for parameter in there["parameters"].values() for key in parameter["tensors"]]
    assert sorted(made_into) == sorted(expected)
    for folder, manifest in (("megatron", there), ("hf", back)):
        published = json.loads((converted[0] / name / folder / "conversion.json").read_text())
        assert published == json.loads(json.dumps(manifest))


def test_shards_are_named_and_indexed_as_transformers_does_it(converted):
    folder = converted[0] / "llama/hf"
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert files == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    assert len(files) > 3
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for file in files for name in load_file(folder / file)}
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors(folder).values())
    assert index["metadata"]["total_size"] == total


def test_nothing_of_the_work_is_left(converted):
    for name in VARIANTS:
        assert sorted(path.name for path in (converted[0] / name).iterdir()) == ["hf", "megatron"]
        assert not list((converted[0] / name).rglob("order.json"))
        assert not list((converted[0] / name).rglob("records"))


def test_the_dtype_is_as_asked_in_tensors_and_configuration(variants, converted):
    before, after = tensors(variants / "qwen3"), tensors(converted[0] / "bf16/hf")
    for name, tensor in before.items():
        assert torch.equal(tensor.bfloat16(), after[name])
    config = json.loads((converted[0] / "bf16/hf/config.json").read_text())
    assert config["dtype"] == "bfloat16"


@pytest.mark.parametrize("name", VERIFIED)
def test_verifying_compares_all_tensors_and_the_logits(variants, converted, name):
    there, back = converted[1][name]
    for manifest in (there, back) if name in VERIFIED_THERE else (back,):
        assert manifest["verified"]["tensors"] == len(tensors(variants / {"bf16": "qwen3"}.get(name, name)))
        assert manifest["verified"]["logits"] < 1e-5


def test_fp8_in_blocks_is_within_its_rounding_and_converts_back(variants, converted, tmp_path):
    """A block's scale is its largest magnitude / 448; e4m3 has 3 bits of mantissa: half a step is 2⁻⁴."""
    checkpoint = converted[0] / "qwen3moe/megatron"
    launch(
        "to_hf",
        module=PROGRAMS,
        cases={"fp8": (checkpoint, variants / "qwen3moe", tmp_path / "fp8")},
        dtype="fp8",
        verified=True,
    )
    before, after = tensors(variants / "qwen3moe"), tensors(tmp_path / "fp8")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    assert after[name].dtype == torch.float8_e4m3fn
    weight = after[name].float() * after[f"{name}_scale_inv"]  # smaller than one block
    assert ((weight - before[name].bfloat16().float()).abs() <= before[name].abs() / 16 + 1e-3).all()
    assert after["model.layers.1.mlp.gate.weight"].dtype == torch.bfloat16
    config = json.loads((tmp_path / "fp8/config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["weight_block_size"]) == ("fp8", [128, 128])
    again = launch("to_megatron", module=PROGRAMS, model=tmp_path / "fp8", out=tmp_path / "again")[0]
    assert again["tensors"].keys() == before.keys()
    assert again["tensors"][name]["dtype"] == "BF16"
