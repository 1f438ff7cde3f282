"""Kernels that are off unless actor.megatron turns them on give what transformers gives in float64."""

from __future__ import annotations

import pytest

from tests.actor.tiny_models import config_for
from tests.gpu_emulated.comparing import relative_errors
from tests.gpu_emulated.launch import launch

pytestmark = pytest.mark.long

FUSIONS = {
    # a softmax over groups of experts, and megatron-core's own rotary kernels for latent attention
    "deepseek": dict(moe_router_fusion=True, apply_rope_fusion=True),
    # a sigmoid with a bias
    "moonlight": dict(moe_router_fusion=True),
    # queries and keys with norms before the rotary embedding
    "qwen3": dict(apply_rope_fusion=True),
}


@pytest.fixture(scope="module")
def trained(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fusions")
    cases = {
        family: (config_for(models / family, actor=dict(megatron=fields)), folder / family)
        for family, fields in FUSIONS.items()
    }
    return launch("train", cases=cases)[0]


@pytest.mark.parametrize("family", FUSIONS)
def test_losses_and_whole_gradients_equal_the_reference(trained, reference, family):
    expected = reference(family).steps
    for (loss, count, norm), step in zip(trained[family]["steps"], expected, strict=False):
        assert loss / count == pytest.approx(step.loss, rel=1e-4)
        assert norm == pytest.approx(step.gradient_norm, rel=1e-4)
    errors = relative_errors(trained[family]["gradient"], expected[0].gradient)
    assert max(errors.values()) < 1e-4, errors
