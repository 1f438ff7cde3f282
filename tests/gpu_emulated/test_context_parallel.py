"""Rows shared out over two devices train like whole ones: in bf16, since cuDNN has no attention in fp32."""

from __future__ import annotations

import pytest

from tests.actor.tiny_models import config_for
from tests.gpu_emulated.comparing import assert_resumes_bit_for_bit, relative_errors
from tests.gpu_emulated.launch import launch

pytestmark = pytest.mark.long

DENSE = ("qwen3", "llama")
ROUTED = ("moonlight",)
"""Rounding to bf16 sends some tokens to other experts: their gradients say nothing of attention."""


@pytest.fixture(scope="module")
def two_ranks(models, tmp_path_factory):
    folder, layout = tmp_path_factory.mktemp("context"), dict(context=2)
    cases = {
        family: (config_for(models / family, layout, precision="bf16"), folder / family)
        for family in DENSE + ROUTED
    }
    return launch("train", ranks=2, cases=cases)


@pytest.mark.parametrize("family", DENSE + ROUTED)
def test_loss_and_gradient_norm_equal_the_reference(two_ranks, reference, family):
    steps, expected = [rank[family]["steps"][0] for rank in two_ranks], reference(family).steps[0]
    loss, count = (sum(step[i] for step in steps) for i in (0, 1))
    assert loss / count == pytest.approx(expected.loss, rel=2e-2)
    assert [step[2] for step in steps] == pytest.approx([expected.gradient_norm] * 2, rel=2e-2)


@pytest.mark.parametrize("family", DENSE)
def test_whole_gradients_equal_the_reference_as_on_one_device(two_ranks, reference, family):
    errors = relative_errors(two_ranks[0][family]["gradient"], reference(family).steps[0].gradient)
    assert max(errors.values()) < 5 * 2e-2, errors


@pytest.mark.parametrize("family", DENSE + ROUTED)
def test_the_step_after_loading_a_checkpoint_is_bit_equal(two_ranks, family):
    for rank in two_ranks:
        assert_resumes_bit_for_bit(rank[family])
