"""Every objective's gradient on the real actor is the same under any layout; one launch for each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.actor.launch import launch
from tests.actor.tiny_models import MUON, OPTIMIZER, config_for

pytestmark = pytest.mark.slow

LAYOUTS = {"data=4": dict(data=4), "tensor=2, pipeline=2": dict(tensor=2, pipeline=2)}
NAMES = [
    "pmd", "pmd, max_response", "pmd, none, regression, sequence_tis", "pmd_token", "reinforce",
    "grpo, token_tis", "gspo", "cispo", "sft", "distillation", "distillation, sequence", "pmd, with examples",
]  # fmt: skip


@pytest.fixture(scope="module")
def single(models: Path):
    return launch("objectives", path=models / "llama", layout={}, teacher=models / "qwen2")[0]


@pytest.fixture(scope="module", params=LAYOUTS)
def parallel(request, models: Path):
    layout = LAYOUTS[request.param]
    return launch("objectives", ranks=4, path=models / "llama", layout=layout, teacher=models / "qwen2")[0]


@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradient_are_those_of_one_process(name, single, parallel):
    (loss, gradient), (loss_there, gradient_there) = single[name], parallel[name]
    # absolute too: a sequence adds ±0.1 to a policy gradient's loss, and most of it cancels
    assert loss_there == pytest.approx(loss, rel=1e-5, abs=1e-6)
    assert gradient.keys() == gradient_there.keys()
    for key, expected in gradient.items():
        difference = (gradient_there[key] - expected).abs().max() / expected.abs().max()
        assert difference < 1e-5, key


def test_no_two_objectives_have_the_same_gradient(single):
    """Else the comparison above could be of one objective with itself."""
    flat = {name: torch.cat([t.flatten() for t in single[name][1].values()]) for name in NAMES}
    for i, first in enumerate(NAMES):
        for second in NAMES[i + 1 :]:
            cosine = torch.nn.functional.cosine_similarity(flat[first], flat[second], dim=0)
            same_length = flat[first].norm() / flat[second].norm()
            assert cosine < 0.999 or abs(same_length - 1) > 1e-3, (first, second)


def test_a_tiny_student_reaches_its_teachers_log_probabilities(single):
    """A Llama learns from a Qwen2, both of random weights, whose log-probabilities are transformers'."""
    before, after = single["distances"]
    assert before > 0.5 and after < 0.05


def test_supervised_examples_add_their_weighted_mean_gradient_and_nothing_else(single):
    """∇[pmd + λ · mean next-token loss] = ∇pmd + λ ∇sft, whatever the two normalisers are.

    The policy is at temperature 0.8, the next-token loss at 1.
    """
    expected_loss, alone = single["pmd"]
    loss, together = single["pmd, with examples"]
    _, examples = single["sft of the examples"]
    assert loss == expected_loss
    for key, gradient in together.items():
        expected = alone[key] + 0.7 * examples[key]
        assert (gradient - expected).abs().max() < 1e-5 * expected.abs().max(), key


def test_a_reset_optimizer_takes_the_step_of_a_new_one(models: Path):
    optimizers = {"adam": OPTIMIZER, "muon": MUON}
    configs = {name: config_for(models / "llama", optimizer=used) for name, used in optimizers.items()}
    for name, result in launch("resets", configs=configs)[0].items():
        (step, weights), (expected, expected_weights) = result["after reset"], result["fresh"]
        assert step == expected, name
        assert all(torch.equal(weights[tensor], expected_weights[tensor]) for tensor in weights), name
