"""The proofs of a conversion fail when they should: a changed byte, other logits, a tensor twice or never."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_pmd.actor.parameters import Parameter, Piece
from megatron_pmd.convert import sharded
from megatron_pmd.convert.parts import PartRecord, tensors_of
from megatron_pmd.errors import CheckpointError
from tests.actor.launch import launch
from tests.convert.command_line import tensors
from tests.convert.conftest import PROGRAMS


@pytest.fixture(scope="module")
def outcome(variants, converted, tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("proofs")
    damaged = shutil.copytree(converted[0] / "qwen3/hf", folder / "damaged")
    shard = sorted(damaged.glob("*.safetensors"))[2]
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x5a")  # the last byte of its last tensor
    doubled = shutil.copytree(variants / "qwen2", folder / "doubled")
    held = load_file(doubled / "model.safetensors")
    held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()
    save_file(held, doubled / "model.safetensors", metadata={"format": "pt"})
    found = launch(
        "proofs", module=PROGRAMS, checkpoint=converted[0] / "qwen3/megatron", same=converted[0] / "qwen3/hf",
        damaged=damaged, doubled=doubled,
        latent=(converted[0] / "deepseek/megatron", variants / "deepseek"), out=folder / "out",
    )[0]  # fmt: skip
    return found | {"folder": folder}


@pytest.mark.slow
def test_verifying_finds_one_changed_byte_and_names_what_it_is_in(outcome):
    assert outcome["unchanged"] == ("", "")
    kind, message = outcome["damaged"]
    assert kind == "CheckpointError" and "is not what" in message and "/damaged makes it" in message


@pytest.mark.slow
def test_verifying_finds_a_model_that_computes_otherwise(outcome):
    kind, message = outcome["other logits"]
    assert kind == "CheckpointError" and "the logits of" in message and "more than 0.0001" in message


@pytest.mark.slow
def test_what_no_parameter_is_made_of_is_listed_with_its_reason(outcome):
    assert outcome["left out"] == {"lm_head.weight": "the same as model.embed_tokens.weight"}


@pytest.mark.slow
def test_a_checkpoint_in_fp32_is_written_in_bf16_and_the_router_bias_keeps_its_precision(variants, outcome):
    before, after = tensors(variants / "deepseek"), tensors(outcome["folder"] / "out/bf16")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        wide = name.endswith("e_score_correction_bias")
        assert after[name].dtype == (torch.float32 if wide else torch.bfloat16), name
        assert torch.equal(after[name], tensor.to(after[name].dtype)), name


@pytest.mark.parametrize("times", [0, 2])
def test_a_tensor_that_was_converted_twice_or_never_is_named(times):
    records = [PartRecord(tensors={"a.weight": {}}), *[PartRecord(tensors={"b.weight": {}})] * times]
    with pytest.raises(CheckpointError, match=rf"b\.weight was converted {times} times, not once"):
        tensors_of(records, ["a.weight", "b.weight"])


def test_a_parameter_that_was_not_written_is_named(tmp_path):
    piece = Piece("decoder.weight", (0, 0), (4, 4), (4, 4))
    parameter = Parameter("decoder.weight", torch.Size((4, 4)), [piece], None, None, None)
    with pytest.raises(CheckpointError, match=r"decoder\.weight at .* was not written exactly once"):
        sharded.finish(tmp_path, [(parameter, torch.float32)], [])
