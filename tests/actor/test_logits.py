"""One process: the actor computes what transformers computes, and steps as autograd and AdamW do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_pmd.batch import RolloutBatch
from tests.actor.launch import launch
from tests.actor.tiny_models import FAMILIES, OPTIMIZER, STEPS, TEMPERATURE, WEIGHT_TOLERANCE

PACKINGS = ["the actor's own", "all samples in one micro-batch", "one sample each"]


@pytest.fixture(scope="module")
def measured(models) -> dict[str, dict[str, tuple[float, torch.Tensor]]]:
    return launch("gradients", paths=[models / "qwen2", models / "qwen3moe"])[0]


@pytest.mark.parametrize("packing", range(3), ids=PACKINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_equal_transformers_after_loading(one_process, reference, family, packing):
    report = one_process[family]["anchors"][packing]
    batch = RolloutBatch.pack(reference(family).samples, TEMPERATURE)
    response = ~report.log_probs.isnan()
    assert int(response.sum()) == batch.samples.response_lengths.sum()
    # compared with the engines are only the tokens that they sampled under the current weights
    assert report.tokens == (batch.tokens.policies == batch.weight_version).sum() < response.sum()
    torch.testing.assert_close(
        report.log_probs[response],
        torch.from_numpy(batch.tokens.engine_log_probs)[response],
        rtol=0,
        atol=1e-5,
    )


@pytest.fixture(scope="module")
def in_bf16(models):
    return launch("logits", path=models / "qwen2")[0]


def test_the_noise_floor_is_of_the_size_of_the_rounding_error(in_bf16, reference):
    """|Σ log π_bf16 − log π_float64| of a sequence is one rounding error; the floor is a difference of two.

    The same pass once more shows nothing: the kernels are deterministic.
    """
    assert in_bf16["repeated"] == {"sequences": 16, "absolute": 0.0, "k2": 0.0, "k3": 0.0}
    exact = reference("qwen2").samples
    batch, log_probs = RolloutBatch.pack(exact, 1.0), in_bf16["log_probs"].numpy()
    errors = []
    for number in range(16):
        own = slice(*batch.tokens.offsets[number : number + 2])
        counted = batch.tokens.counted[own]
        errors.append(abs((log_probs[own] - batch.tokens.engine_log_probs[own])[counted].sum()))
    floor = in_bf16["floor"]
    assert floor["sequences"] == 16 and 0.2 < floor["absolute"] / sum(errors) < 5
    # k2 and k3 agree for small differences
    assert 0 < floor["k3"] == pytest.approx(floor["k2"], rel=0.1)


def test_logits_are_of_response_tokens_alone_and_in_fp32_a_chunk_at_a_time(in_bf16):
    """config_for's chunks have 16 tokens."""
    found = in_bf16
    assert found["rows"] == {"torch.bfloat16": found["responses"], "torch.float32": 16}


@pytest.mark.parametrize("family", FAMILIES)
def test_entropy_and_engine_difference_are_those_of_transformers_distribution(one_process, reference, family):
    report, expected = one_process[family]["anchors"][0], reference(family)
    assert report.entropy_sum == pytest.approx(expected.entropy_sum, rel=1e-6)
    # the reference's log-probs stand in for the engine's
    assert report.sum_absolute / report.tokens < 2e-6 and report.max_absolute < 1e-5


def test_response_tokens_and_only_they_get_a_log_prob(one_process, reference):
    report, samples = one_process["llama"]["anchors"][0], reference("llama").samples
    expected = [
        flag for s in samples for flag in [False] * len(s.prompt_tokens) + [True] * len(s.response_tokens)
    ]
    assert (~report.log_probs.isnan()).tolist() == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_two_steps_equal_autograd_and_adamw_in_float64(one_process, reference, family):
    result, expected = one_process[family], reference(family).steps
    for (loss, count, norm), samples, step in zip(result["steps"], STEPS[:2], expected[:2], strict=True):
        assert count == len(samples)
        assert loss / count == pytest.approx(step.loss, rel=1e-5)
        assert norm == pytest.approx(step.gradient_norm, rel=1e-5)
    weights = expected[1].weights
    difference = {n: float((w.double() - weights[n]).abs().max()) for n, w in result["weights"].items()}
    assert max(difference.values()) < WEIGHT_TOLERANCE, difference


def test_the_references_steps_are_both_clipped_and_not_clipped(reference):
    norms = [step.gradient_norm for step in reference("qwen2").steps]
    assert norms[0] > OPTIMIZER.gradient_clip > norms[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_export_returns_the_loaded_tensors_bit_for_bit(one_process, models, family):
    from safetensors.torch import load_file

    files: dict[str, torch.Tensor] = {}
    for path in Path(models / family).glob("*.safetensors"):
        files |= load_file(path)
    exported = one_process[family]["loaded_weights"]
    assert exported.keys() == files.keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in files.items())


@pytest.mark.parametrize("family", ["qwen2", "qwen3moe"])
def test_gradient_is_the_same_for_every_packing_order_and_recomputation(measured, family):
    (loss, gradient), *others = measured[family].values()
    assert gradient.norm() > 1
    for name, (other_loss, other) in zip(list(measured[family])[1:], others, strict=True):
        assert other_loss == pytest.approx(loss, rel=1e-6), name
        assert (other - gradient).norm() / gradient.norm() < 2e-6, name
        assert (other - gradient).abs().max() < 2e-6, name
