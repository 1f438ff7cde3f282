"""The biases by which DeepSeek's routers balance their experts: read, moved, kept and handed on in fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_pmd.actor.expert_load import imbalance
from tests.actor.launch import launch

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def biases(models, tmp_path_factory) -> dict[str, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return launch("expert_bias", path=models / "deepseek", folder=folder)[0]


def tokens_per_expert(folder: Path, samples: list[Any]) -> dict[str, torch.Tensor]:
    """By transformers: how many of the samples' tokens each layer's router sends to each expert."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    counts: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if name.endswith("mlp") and hasattr(module, "gate"):
            key = f"{name}.gate.e_score_correction_bias"
            counts[key] = torch.zeros(module.gate.num_experts)

            def count(gate: Any, inputs: Any, outputs: Any, key: str = key) -> None:
                _, _, chosen = outputs
                counts[key] += torch.bincount(chosen.flatten(), minlength=len(counts[key]))

            module.gate.register_forward_hook(count)
    with torch.no_grad():
        for sample in samples:
            model(torch.from_numpy(sample.tokens)[None].long())
    return counts


def test_a_step_moves_each_bias_by_the_rate_towards_balance(biases, models, reference):
    counts = tokens_per_expert(models / "deepseek", reference("deepseek").samples)
    assert counts.keys() == biases["loaded"].keys() and len(counts) == 3
    for name, tokens in counts.items():
        moved = biases["updated"][name] - biases["loaded"][name]
        torch.testing.assert_close(moved, 0.01 * torch.sign(tokens.mean() - tokens), rtol=0, atol=1e-6)
        assert moved.abs().max() > 0


@pytest.mark.parametrize("rank_count", [1, 2])
def test_the_anchor_pass_counts_each_layers_tokens_by_expert(
    one_process, trained, models, reference, rank_count
):
    """One process, and two pipeline stages of which each counts its own layers."""
    ranks = [one_process["moonlight"]] if rank_count == 1 else trained("latent, pipeline=2")
    found = {
        layer: sum(rank["anchors"][0].expert_tokens.get(layer, 0) for rank in ranks) for layer in range(1, 4)
    }
    counts = tokens_per_expert(models / "moonlight", reference("moonlight").samples)
    for name, tokens in counts.items():
        layer = int(name.split(".")[2])
        assert found[layer].tolist() == tokens.tolist()


def test_imbalance_is_the_busiest_experts_share_over_the_mean():
    parts = [{0: np.array([3, 1, 0, 0])}, {0: np.array([1, 1, 1, 1]), 2: np.array([2, 2, 2, 2])}]
    assert imbalance(parts) == {
        "experts/busiest_over_mean": 1.5,
        "experts/busiest_over_mean/0": 2.0,
        "experts/busiest_over_mean/2": 1.0,
    }
    assert imbalance([{}, {}]) == {}


def test_a_checkpoint_keeps_the_biases_and_rate_zero_leaves_them(biases):
    for name, bias in biases["updated"].items():
        assert torch.equal(biases["resumed"][name], bias)
        assert torch.equal(biases["rate 0"][name], bias)


def test_a_bf16_model_keeps_the_biases_of_the_file_unrounded(biases):
    for name, bias in biases["loaded"].items():
        assert not torch.equal(bias, bias.bfloat16().float())
        assert biases["bf16"][name].dtype == torch.float32
        assert torch.equal(biases["bf16"][name], bias)
