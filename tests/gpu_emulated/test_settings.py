"""FP8 and optimizer settings: how far they are from bf16, and that a run goes on with them from a checkpoint.

Experts are those of a recorded routing, so that rounding cannot send a token elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import isfinite

import pytest
import torch

from tests.actor.tiny_models import OPTIMIZER
from tests.gpu_emulated.comparing import assert_resumes_bit_for_bit
from tests.gpu_emulated.conftest import asked_for
from tests.gpu_emulated.launch import launch
from tests.gpu_emulated.settings import SETTINGS, config

DENSE, EXPERTS, LATENT = "dense for fp8", "experts for fp8", "latent for fp8"
CASES = {
    f"{model}, {setting}": (model, setting) for model in (DENSE, EXPERTS, LATENT) for setting in SETTINGS
}
OF_ANY_LAYER = (
    "the optimizer on the host",
    "half of the optimizer on the host",
    "tensorwise but for the ends",
)
LONG = {(EXPERTS, setting) for setting in OF_ANY_LAYER}
LONG |= {(LATENT, setting) for setting in (*OF_ANY_LAYER, "bf16 moments", "delayed")}
"""Settings that the core has with dense layers, the last two with experts too: nothing in them asks which
layer a matrix is of."""
E4M3_STEP, BF16_STEP = 2.0**-3, 2.0**-7
"""Distance of neighbouring numbers relative to the smaller one: 3 and 7 bits of mantissa."""


def parametrized(names: Iterable[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "case", [pytest.param(name, marks=[pytest.mark.long] * (CASES[name] in LONG)) for name in names]
    )


@pytest.fixture(scope="module")
def stepped(request, models, tmp_path_factory):
    """programs.step_and_resume by case."""
    folder = tmp_path_factory.mktemp("settings")
    asked = asked_for(request, "case", CASES)
    cases = {name: (config(models, *case), folder / name) for name, case in asked.items()}
    return launch("step_and_resume", cases=cases)[0]


@parametrized(CASES)
def test_the_step_after_loading_a_checkpoint_is_bit_equal(stepped, case):
    result = stepped[case]
    assert all(isfinite(number) for number in result["third"][0])
    assert_resumes_bit_for_bit(result)


@parametrized(CASES)
def test_steps_move_the_weights_that_were_loaded_by_their_learning_rate(stepped, case):
    result = stepped[case]
    assert all(isfinite(number) for step in result["steps"] for number in step)
    moved = 2 * OPTIMIZER.learning_rate * (1 + OPTIMIZER.weight_decay)
    rounding = E4M3_STEP if case.endswith("gathered") else BF16_STEP
    assert result["weights"].keys() == result["loaded_weights"].keys()
    for name, before in result["loaded_weights"].items():
        before, after = before.float(), result["weights"][name].float()
        assert (after - before).norm() <= rounding * before.norm() + moved * before.numel() ** 0.5, name
    assert any(
        not torch.equal(result["weights"][name], before) for name, before in result["loaded_weights"].items()
    )


ELSEWHERE = {DENSE: dict(tensor=2), EXPERTS: dict(data=2, expert=2)}
"""Layouts of two ranks under which the checkpoints of one are loaded."""
MOVED = [
    name
    for name, (model, setting) in CASES.items()
    if model in ELSEWHERE and setting not in ("tensorwise", "blockwise", "half of the optimizer on the host")
]


@pytest.fixture(scope="module")
def moved(stepped, models):
    """Every rank's programs.resume by case."""
    cases = {}
    for name in MOVED:
        if name in stepped:
            model, setting = CASES[name]
            cases[name] = config(models, model, setting, ELSEWHERE[model]), stepped[name]["checkpoint"]
    return launch("resume", ranks=2, cases=cases)


@parametrized(MOVED)
def test_a_checkpoint_of_one_rank_goes_on_under_two(stepped, moved, case):
    saved, (loss, count, norm) = stepped[case]["weights"], stepped[case]["third"][0]
    loaded, step, after = moved[0][case]
    exact = not case.endswith("gathered")  # else two ranks cut FP8 blocks elsewhere
    for name, before in saved.items():
        if exact:
            assert torch.equal(loaded[name], before), name
        assert (loaded[name].float() - before.float()).norm() <= E4M3_STEP * before.float().norm(), name
    steps = [rank[case][1] for rank in moved]
    assert sum(step[1] for step in steps) == count
    # the ranks' partial sums round elsewhere: FP8 codes and bf16 numbers next to each other
    assert sum(step[0] for step in steps) == pytest.approx(loss, rel=0.15)
    assert step[2] == pytest.approx(norm, rel=0.15)
    assert any(not torch.equal(after[name], loaded[name]) for name in loaded)
