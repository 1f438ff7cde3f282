"""Families that compute what no other does, on one device in fp32, against transformers in float64.

Gemma: norms around its layers, soft caps. EXAONE 4.0: norms behind its layers alone. Nemotron: LayerNorm and
squared ReLU. gpt-oss: sinks, biases of experts and a clamped SwiGLU.
"""

from __future__ import annotations

import pytest
import torch

from tests.actor.family_models import write_family
from tests.actor.tiny_models import config_for
from tests.gpu_emulated.comparing import assert_resumes_bit_for_bit, assert_step_is_the_references
from tests.gpu_emulated.launch import launch

KINDS = ("exaone4", "gemma", "gemma2", "gemma3_text", "nemotron", "gpt_oss")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    for kind in KINDS:
        write_family(folder / kind, kind)
    return folder


@pytest.fixture(scope="module")
def trained(root):
    cases = {kind: (config_for(root / kind), root / "checkpoints" / kind) for kind in KINDS}
    return launch("train", cases=cases)[0]


@pytest.fixture(params=KINDS)
def case(request, root, trained):
    return trained[request.param], torch.load(root / request.param / "reference.pt", weights_only=False)


def test_log_probs_equal_transformers_however_samples_are_packed(case):
    for report in case[0]["anchors"]:
        assert report.max_absolute < 1e-5


def test_loss_and_whole_gradient_equal_the_reference(case):
    (expected,) = case[1].steps
    assert_step_is_the_references(case[0], expected)


def test_the_step_after_loading_a_checkpoint_is_bit_equal(case):
    assert_resumes_bit_for_bit(case[0])
