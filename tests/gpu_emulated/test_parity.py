"""Transformer Engine's layers on one device against transformers in float64, for every family."""

from __future__ import annotations

import pytest
import torch

from tests.actor.tiny_models import FAMILIES, config_for
from tests.gpu_emulated.launch import launch

TOLERANCES = {"fp32": 1e-4, "bf16": 2e-2}
"""Of whole gradients, relative. bf16 has 8 bits: a product's rounding is 2^-9, and some meet in each layer."""


@pytest.fixture(scope="module")
def trained(models, tmp_path_factory):
    """programs.train's result for each precision and family, of two processes."""
    folder = tmp_path_factory.mktemp("parity")
    results = {}
    for precision in TOLERANCES:
        cases = {
            family: (config_for(models / family, precision=precision), folder / precision / family)
            for family in FAMILIES
        }
        results[precision] = launch("train", [config for config, _ in cases.values()], cases=cases)[0]
    return results


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(params=TOLERANCES)
def precision(request):
    return request.param


def relative_errors(found, expected):
    return {
        name: float((found[name].double() - tensor).norm() / tensor.norm()) for name, tensor in expected.items()
    }


def test_log_probs_equal_transformers(trained, precision, family):
    for report in trained[precision][family]["anchors"]:
        assert report.max_absolute < {"fp32": 1e-5, "bf16": 0.15}[precision]
        assert report.sum_absolute / report.tokens < {"fp32": 1e-6, "bf16": 0.02}[precision]


def test_loss_and_whole_gradient_equal_the_reference(trained, reference, precision, family):
    result, expected = trained[precision][family], reference(family).steps[0]
    loss, count, norm = result["steps"][0]
    assert loss / count == pytest.approx(expected.loss, rel=TOLERANCES[precision])
    assert norm == pytest.approx(expected.gradient_norm, rel=TOLERANCES[precision])
    errors = relative_errors(result["gradient"], expected.gradient)
    assert max(errors.values()) < (1 if precision == "fp32" else 5) * TOLERANCES[precision], errors


def test_weights_after_two_steps_equal_the_reference_in_fp32(trained, reference, family):
    weights, expected = trained["fp32"][family]["weights"], reference(family).steps[1].weights
    difference = {name: float((w.double() - expected[name]).abs().max()) for name, w in weights.items()}
    assert max(difference.values()) < 1e-6, difference


def test_the_step_after_loading_a_checkpoint_is_bit_equal(trained, precision, family):
    result = trained[precision][family]
    (step, weights), (again, weights_again) = result["third"], result["third_resumed"]
    assert step == again
    assert all(torch.equal(weights[name], weights_again[name]) for name in weights)
