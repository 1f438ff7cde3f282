"""Experts that someone else chose: the actor's numbers are transformers' with its routers forced to them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_pmd.batch import RolloutBatch
from megatron_pmd.errors import DataError
from megatron_pmd.rollout_file import read_rollout, write_rollout
from tests.actor.launch import launch
from tests.actor.reference import force
from tests.actor.tiny_models import STEPS, TEMPERATURE, rollout, with_routing

Case = tuple[str, dict[str, int], dict[str, Any]]
"""Family, layout, the actor's settings. The first of DeepSeek's layers has no experts."""
SINGLE: dict[str, Case] = {
    "one process": ("qwen3moe", {}, {}),
    "recomputed layers": ("qwen3moe", {}, {"recompute": "full"}),
    "latent, one process": ("deepseek", {}, {}),
}
TWO_RANKS: dict[str, Case] = {
    "tensor=2, expert=2": ("qwen3moe", dict(tensor=2, expert=2), {"recompute": "full"}),
    "context=2, expert=2": ("qwen3moe", dict(context=2, expert=2), {}),
    "pipeline=2, virtual_pipeline=2": (
        "qwen3moe",
        dict(pipeline=2, virtual_pipeline=2),
        {"recompute": "full"},
    ),
    "data=2, expert=2": ("qwen3moe", dict(data=2, expert=2), {}),
    "latent, tensor=2, expert=2": ("deepseek", dict(tensor=2, expert=2), {"recompute": "full"}),
    "latent, pipeline=2": ("deepseek", dict(pipeline=2), {}),
}
Forced = tuple[torch.Tensor, float, float]
"""Log-probs of all tokens (NaN at prompts), loss and gradient norm of the first step."""


@pytest.fixture(scope="module")
def forced(models, reference) -> dict[str, Forced]:
    """By family, by transformers."""
    return {
        family: transformers_with_forced_routers(models / family, reference(family))
        for family in ("qwen3moe", "deepseek")
    }


def transformers_with_forced_routers(folder: Path, expected: Any) -> Forced:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )
    samples = with_routing(expected.samples)
    batch = RolloutBatch.pack(samples, TEMPERATURE)
    chosen: dict[int, torch.Tensor] = {}

    for number, layer in enumerate(model.model.layers):
        if hasattr(layer.mlp, "gate"):
            force(layer.mlp, functools.partial(chosen.__getitem__, number))
    whole, losses = [], []
    assert batch.tokens.routed_experts is not None
    for i, sample in enumerate(samples):
        start, end = batch.tokens.offsets[i : i + 2]
        experts = torch.from_numpy(batch.tokens.routed_experts[start:end].astype(np.int64)).view(-1, 4, 2)
        chosen |= {number: experts[:, number] for number in range(4)}
        tokens = torch.from_numpy(batch.tokens.ids[start:end].astype(np.int64))
        logits = model(tokens[None]).logits[0] / TEMPERATURE
        first = len(sample.prompt_tokens)
        log_probs = logits.log_softmax(-1)[first - 1 : -1].gather(1, tokens[first:, None])[:, 0]
        whole += [torch.full((first,), torch.nan), log_probs.detach().float()]
        counted = torch.from_numpy(batch.tokens.counted[start + first : end])
        ratio = (log_probs - expected.anchor[start + first : end].double())[counted].sum()
        residual = ratio - sample.advantage / sample.tau
        losses.append(sample.tau / 2 * residual**2 / counted.sum())
    loss = torch.stack([losses[i] for i in STEPS[0]]).mean()
    loss.backward()
    norm = sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None) ** 0.5
    return torch.cat(whole), float(loss.detach()), norm


@pytest.fixture(scope="module")
def replayed(models) -> dict[str, list[Any]]:
    """Every rank's (log-probs, step), by case."""
    results: dict[str, list[Any]] = {}
    for ranks, cases in ((1, SINGLE), (2, TWO_RANKS)):
        orders = {name: (models / family, *rest) for name, (family, *rest) in cases.items()}
        outcomes = launch("replayed", ranks=ranks, cases=orders)
        results |= {name: [outcome[name] for outcome in outcomes] for name in cases}
    return results


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SINGLE, *TWO_RANKS])
def test_log_probs_and_gradient_are_those_of_transformers_with_the_same_experts(replayed, forced, name):
    family = (SINGLE | TWO_RANKS)[name][0]
    log_probs, loss, norm = forced[family]
    whole = torch.full_like(log_probs, torch.nan)
    for own, _ in replayed[name]:
        whole = torch.where(own.isnan(), whole, own)
    torch.testing.assert_close(whole, log_probs, rtol=0, atol=1e-5, equal_nan=True)
    steps = [step for _, step in replayed[name]]
    assert sum(step[0] for step in steps) / sum(step[1] for step in steps) == pytest.approx(loss, rel=1e-5)
    assert steps[0][2] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("family", ["qwen3moe", "deepseek"])
def test_the_experts_drawn_are_not_those_that_the_model_would_choose(forced, reference, family):
    own = torch.cat([torch.tensor(sample.engine_log_probs) for sample in reference(family).samples])
    log_probs = forced[family][0]
    assert (log_probs[~log_probs.isnan()] - own).abs().max() > 0.1


def test_recorded_experts_survive_the_rollout_file(tmp_path):
    samples = with_routing(rollout())
    for sample in samples:
        sample.engine_log_probs = np.zeros(len(sample.response_tokens), np.float32)
    write_rollout(tmp_path / "0.parquet", samples, 0)
    read, _ = read_rollout(tmp_path / "0.parquet")
    for before, after in zip(samples, read, strict=True):
        assert before.routed_experts is not None and after.routed_experts is not None
        assert before.routed_experts.tolist() == after.routed_experts.tolist()
    packed = RolloutBatch.pack(read, TEMPERATURE)
    packed.check_routing(8)
    first = read[0].routed_experts
    assert packed.tokens.routed_experts is not None and first is not None
    assert np.array_equal(packed.tokens.routed_experts[: len(first)], first)


def test_a_rollout_without_recorded_experts_is_refused_where_they_are_to_be_replayed():
    samples = with_routing(rollout())
    for sample in samples:
        sample.engine_log_probs = np.zeros(len(sample.response_tokens), np.float32)
    with pytest.raises(DataError, match="has 8 recorded experts a token, this model chooses 16"):
        RolloutBatch.pack(samples, TEMPERATURE).check_routing(16)
    samples[3].routed_experts = None
    with pytest.raises(DataError, match="has 0 recorded experts a token, this model chooses 8"):
        RolloutBatch.pack(samples, TEMPERATURE).check_routing(8)
