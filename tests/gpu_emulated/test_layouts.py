"""Every parallel layout, over the emulated NCCL, gives the losses and gradients of one device."""

from __future__ import annotations

import functools

import pytest

from tests.actor.conftest import LAYOUTS as OF_THE_ACTOR
from tests.actor.conftest import ranks_of
from tests.actor.tiny_models import config_for
from tests.gpu_emulated.comparing import assert_resumes_bit_for_bit, relative_errors
from tests.gpu_emulated.conftest import asked_for
from tests.gpu_emulated.launch import launch

LAYOUTS = {
    name: OF_THE_ACTOR[name]
    for name in (
        "dense, tensor=2", "dense, pipeline=2", "dense, pipeline=2, virtual_pipeline=2", "dense, data=2",
        "moe, tensor=2, expert=2", "moe, expert=2, data=2",
        "latent, tensor=2, expert=2", "latent, pipeline=2",
        "dense, tensor=2, pipeline=2", "moe, tensor=2, expert=2, data=2", "moe, pipeline=2, expert=2, data=2",
    )
}  # fmt: skip
LONG = {name for name in LAYOUTS if ranks_of(name) > 2} | {"latent, pipeline=2", "moe, tensor=2, expert=2"}
"""The core has the last two of other models."""
PIPELINE = "dense, pipeline=2"


@pytest.fixture(scope="module")
def trained(request, models, tmp_path_factory):
    """Every rank's results, by number of ranks: one launch for all layouts of as many."""
    asked = asked_for(request, "case", LAYOUTS)

    @functools.cache
    def on(ranks):
        folder = tmp_path_factory.mktemp(f"layouts-of-{ranks}")
        cases = {
            name: (config_for(models / family, layout), folder / str(i))
            for i, (name, (family, layout)) in enumerate(asked.items())
            if ranks_of(name) == ranks
        }
        return launch("train", ranks=ranks, cases=cases, watched=PIPELINE)

    return on


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.long] * (name in LONG)) for name in LAYOUTS])
def case(request, trained, reference):
    ranks = trained(ranks_of(request.param))
    return [rank[request.param] for rank in ranks], reference(LAYOUTS[request.param][0])


def test_losses_and_whole_gradients_equal_the_reference(case):
    ranks, expected = case
    for k, step in enumerate(expected.steps[:2]):
        loss, count = (sum(rank["steps"][k][i] for rank in ranks) for i in (0, 1))
        assert loss / count == pytest.approx(step.loss, rel=1e-5)
        norms = [rank["steps"][k][2] for rank in ranks]
        assert norms == pytest.approx([step.gradient_norm] * len(ranks), rel=1e-5)
    errors = relative_errors(ranks[0]["gradient"], expected.steps[0].gradient)
    assert max(errors.values()) < 1e-5, errors


def test_weights_after_two_steps_equal_the_reference(case):
    ranks, expected = case
    weights, after = ranks[0]["weights"], expected.steps[1].weights
    assert max(float((w.double() - after[name]).abs().max()) for name, w in weights.items()) < 1e-6


@pytest.mark.parametrize("case", [PIPELINE], indirect=True)
def test_the_schedule_of_a_pipeline_still_empties_the_losses_that_it_was_given(case):
    """Where it does not, the losses that actor.py reports need not be detached from them."""
    first, last = (rank["left of losses"] for rank in case[0])
    assert first == [] and len(last) == len(case[0][1]["microbatches"])
    assert set(last) == {(1,)}


def test_the_step_after_loading_a_checkpoint_is_bit_equal(case):
    for rank in case[0]:
        assert_resumes_bit_for_bit(rank)
