"""Experts that someone else chose: the actor's numbers are transformers' with its routers forced to them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from megatron_pmd.batch import RolloutBatch, Sample
from megatron_pmd.errors import DataError
from megatron_pmd.rollout_file import read_rollout, write_rollout
from tests.actor.launch import launch
from tests.actor.reference import Replayed, replay
from tests.actor.tiny_models import TEMPERATURE, rollout, with_routing

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


@pytest.fixture(scope="module")
def forced(models, reference) -> dict[str, Replayed]:
    """By family, by transformers."""
    return {family: replay(models / family, reference(family)) for family in ("qwen3moe", "deepseek")}


@pytest.fixture(scope="module")
def replayed(models) -> dict[str, list[Any]]:
    """Every rank's (log-probs, step, micro-batches whose experts a router held), by case."""
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
    expected = forced[family]
    whole = torch.full_like(replayed[name][0][0], torch.nan)
    for own, *_ in replayed[name]:
        whole = torch.where(own.isnan(), whole, own)
    torch.testing.assert_close(whole.double(), expected.log_probs, rtol=0, atol=1e-5, equal_nan=True)
    loss, count = (sum(step[i] for _, step, _ in replayed[name]) for i in (0, 1))
    assert loss / count == pytest.approx(expected.loss, rel=1e-5)
    assert replayed[name][0][1][2] == pytest.approx(expected.gradient_norm, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SINGLE, *TWO_RANKS])
def test_a_pass_without_gradient_holds_the_experts_of_one_microbatch(replayed, name):
    """Of a rollout's 5 million tokens a rank, those of 48 layers would be 16 GB on the device."""
    assert [held for _, _, held in replayed[name]] == [1] * len(replayed[name])


@pytest.mark.parametrize("family", ["qwen3moe", "deepseek"])
def test_the_experts_drawn_are_not_those_that_the_model_would_choose(forced, reference, family):
    own = torch.cat([torch.tensor(sample.engine_log_probs) for sample in reference(family).samples])
    log_probs = forced[family].log_probs
    assert (log_probs[~log_probs.isnan()] - own).abs().max() > 0.1


def drawn() -> list[Sample]:
    samples = with_routing(rollout())
    for sample in samples:
        sample.engine_log_probs = np.zeros(len(sample.response_tokens), np.float32)
    return samples


def test_recorded_experts_survive_the_rollout_file(tmp_path):
    samples = drawn()
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
    samples = drawn()
    with pytest.raises(DataError, match="has 8 recorded experts a token, this model chooses 16"):
        RolloutBatch.pack(samples, TEMPERATURE).check_routing(16)
    samples[3].routed_experts = None
    with pytest.raises(DataError, match="has 0 recorded experts a token, this model chooses 8"):
        RolloutBatch.pack(samples, TEMPERATURE).check_routing(8)


def test_a_rollout_of_engines_that_recorded_nothing_is_refused():
    """Two different experts take every token: zeros are what SGLang's memory of them begins with."""
    samples = drawn()
    for sample in samples:
        sample.routed_experts = np.zeros_like(sample.routed_experts)
    batch = RolloutBatch.pack(samples, TEMPERATURE)
    with pytest.raises(DataError, match="the engines recorded nothing"):
        batch.check_routing(8)
