"""The biases by which DeepSeek's routers balance their experts: read, moved, kept and handed on in fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.actor.launch import launch

pytestmark = pytest.mark.serial


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
            key, original = f"{name}.gate.e_score_correction_bias", module.route_tokens_to_experts
            counts[key] = torch.zeros(module.n_routed_experts)

            def route(logits: torch.Tensor, key: str = key, original: Any = original) -> Any:
                chosen, weights = original(logits)
                counts[key] += torch.bincount(chosen.flatten(), minlength=len(counts[key]))
                return chosen, weights

            module.route_tokens_to_experts = route
    with torch.no_grad():
        for sample in samples:
            model(torch.tensor([sample.prompt_tokens + sample.response_tokens]))
    return counts


def test_a_step_moves_each_bias_by_the_rate_towards_balance(biases, models, reference):
    counts = tokens_per_expert(models / "deepseek", reference("deepseek").samples)
    assert counts.keys() == biases["loaded"].keys() and len(counts) == 3
    for name, tokens in counts.items():
        moved = biases["updated"][name] - biases["loaded"][name]
        torch.testing.assert_close(moved, 0.01 * torch.sign(tokens.mean() - tokens), rtol=0, atol=1e-6)
        assert moved.abs().max() > 0


def test_a_checkpoint_keeps_the_biases_and_rate_zero_leaves_them(biases):
    for name, bias in biases["updated"].items():
        assert torch.equal(biases["resumed"][name], bias)
        assert torch.equal(biases["rate 0"][name], bias)


def test_a_bf16_model_keeps_the_biases_of_the_file_unrounded(biases):
    for name, bias in biases["loaded"].items():
        assert not torch.equal(bias, bias.bfloat16().float())
        assert biases["bf16"][name].dtype == torch.float32
        assert torch.equal(biases["bf16"][name], bias)
