"""Transformer Engine's layers on one device, in fp32, against transformers in float64, for every family."""

from __future__ import annotations

import pytest

from tests.actor.tiny_models import FAMILIES, WEIGHT_TOLERANCE, config_for
from tests.gpu_emulated.comparing import assert_resumes_bit_for_bit, assert_step_is_the_references
from tests.gpu_emulated.launch import launch


@pytest.fixture(scope="module")
def trained(models, tmp_path_factory):
    """programs.train's result for each family, of one process."""
    folder = tmp_path_factory.mktemp("parity")
    cases = {family: (config_for(models / family), folder / family) for family in FAMILIES}
    return launch("train", cases=cases)[0]


@pytest.fixture(params=FAMILIES)
def case(request, trained, reference):
    return trained[request.param], reference(request.param)


def test_log_probs_equal_transformers_however_samples_are_packed(case):
    for report in case[0]["anchors"]:
        assert report.max_absolute < 1e-5


def test_loss_and_whole_gradient_equal_the_reference(case):
    assert_step_is_the_references(case[0], case[1].steps[0])


def test_weights_after_two_steps_equal_the_reference(case):
    weights, expected = case[0]["weights"], case[1].steps[1].weights
    difference = {name: float((w.double() - expected[name]).abs().max()) for name, w in weights.items()}
    assert max(difference.values()) < WEIGHT_TOLERANCE, difference


def test_the_step_after_loading_a_checkpoint_is_bit_equal(case):
    assert_resumes_bit_for_bit(case[0])
