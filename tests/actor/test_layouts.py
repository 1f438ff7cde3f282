"""Every parallel layout takes the steps that one process, and the float64 reference, take.

One launch a layout serves all tests of it (10 to 25 s on two cores).
"""

from __future__ import annotations

import pytest
import torch

from tests.actor.conftest import LAYOUTS
from tests.actor.tiny_models import STEPS, WEIGHT_TOLERANCE

pytestmark = pytest.mark.slow


@pytest.fixture(params=LAYOUTS, scope="module")
def case(request, trained, reference, one_process):
    """Every rank's results, the reference, and the same in one process."""
    family = LAYOUTS[request.param][0]
    return trained(request.param), reference(family), one_process[family]


def test_log_probs_equal_transformers_on_the_ranks_that_hold_logits(case):
    ranks, expected, _ = case
    whole = torch.full_like(expected.anchor, torch.nan)
    for rank in ranks:
        report = rank["anchors"][0]
        assert report.max_absolute < 1e-5
        if rank["holds_logits"]:
            own = ~report.log_probs.isnan()
            assert whole[own].isnan().all(), "two replicas trained on one sample"
            whole[own] = report.log_probs[own]
        else:
            assert report.tokens == 0
    engine = torch.cat(
        [
            torch.tensor([torch.nan] * len(s.prompt_tokens) + s.engine_log_probs.tolist())
            for s in expected.samples
        ]
    )
    torch.testing.assert_close(whole, engine, rtol=0, atol=1e-5, equal_nan=True)
    entropy = sum(rank["anchors"][0].entropy_sum for rank in ranks if rank["holds_logits"])
    assert entropy == pytest.approx(expected.entropy_sum, rel=1e-6)


def test_a_steps_entropy_is_of_the_counted_tokens_alone(case):
    ranks, expected, _ = case
    entropy, tokens = (sum(rank["entropy"][i] for rank in ranks) for i in (0, 1))
    counted = [sum(g.tokens for g in s.segments if g.counted) for s in expected.samples]
    assert tokens == sum(counted[i] for i in STEPS[0])
    assert entropy / tokens == pytest.approx(expected.steps[0].entropy, rel=1e-5)


def test_losses_and_gradient_norms_equal_the_reference_and_one_process(case):
    ranks, expected, single = case
    for k, samples in enumerate(STEPS[:2]):
        steps = [rank["steps"][k] for rank in ranks]
        loss, count = (sum(step[i] for step in steps) for i in (0, 1))
        assert count == len(samples)
        norms = {norm for _, _, norm in steps}
        assert len(norms) == 1, "the ranks clip by different norms"
        assert loss / count == pytest.approx(expected.steps[k].loss, rel=1e-5)
        assert loss == pytest.approx(single["steps"][k][0], rel=1e-5)
        assert norms.pop() == pytest.approx(expected.steps[k].gradient_norm, rel=1e-5)


def test_whole_gradients_equal_the_reference_and_one_process(case):
    ranks, expected, single = case
    gradient, first = ranks[0]["gradient"], expected.steps[0]
    assert first.gradient.keys() <= gradient.keys()
    for other in (first.gradient, single["gradient"]):
        errors = {
            name: float((gradient[name].double() - other[name]).norm() / other[name].norm())
            for name in first.gradient
        }
        assert all(error < 1e-5 for error in errors.values()), errors


def test_weights_after_two_steps_equal_the_reference_and_one_process(case):
    ranks, expected, single = case
    weights = ranks[0]["weights"]
    assert weights.keys() == single["weights"].keys()
    for other in (expected.steps[1].weights, single["weights"]):
        difference = {name: float((w.double() - other[name]).abs().max()) for name, w in weights.items()}
        assert max(difference.values()) < WEIGHT_TOLERANCE, difference


def test_loaded_tensors_come_out_again_bit_for_bit(case):
    ranks, _, single = case
    assert ranks[0]["loaded_weights"].keys() == single["loaded_weights"].keys()
    for name, tensor in ranks[0]["loaded_weights"].items():
        assert torch.equal(tensor, single["loaded_weights"][name]), name


def test_every_ranks_random_numbers_go_on_after_loading_a_checkpoint(case):
    for rank in case[0]:
        assert rank["drawn"] == rank["drawn_resumed"]


def test_the_step_after_loading_a_checkpoint_is_bit_equal(case):
    for rank in case[0]:
        (step, weights), (step_resumed, weights_resumed) = rank["third"], rank["third_resumed"]
        assert step == step_resumed
        assert all(torch.equal(weights[name], weights_resumed[name]) for name in weights)
