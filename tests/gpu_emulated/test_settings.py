"""FP8 and optimizer settings: how far they are from bf16, and that a run goes on with them from a checkpoint.

Experts are those of a recorded routing, so that rounding cannot send a token elsewhere.
"""

from __future__ import annotations

from math import isfinite

import pytest
import torch

from tests.actor.tiny_models import OPTIMIZER
from tests.gpu_emulated.comparing import assert_resumes_bit_for_bit
from tests.gpu_emulated.launch import launch
from tests.gpu_emulated.settings import SETTINGS, config

MODELS = ("dense for fp8", "experts for fp8", "latent for fp8")
E4M3_STEP, BF16_STEP = 2.0**-3, 2.0**-7
"""Distance of neighbouring numbers relative to the smaller one: 3 and 7 bits of mantissa."""


@pytest.fixture(scope="module")
def stepped(models, tmp_path_factory):
    """programs.step_and_resume by (model, setting)."""
    folder = tmp_path_factory.mktemp("settings")
    cases = {
        (model, setting): (config(models, model, setting), folder / f"{model}-{setting}")
        for model in MODELS
        for setting in SETTINGS
    }
    return launch("step_and_resume", cases=cases)[0]


CASES = [(model, setting) for model in MODELS for setting in SETTINGS]


@pytest.mark.parametrize(("model", "setting"), CASES)
def test_the_step_after_loading_a_checkpoint_is_bit_equal(stepped, model, setting):
    result = stepped[model, setting]
    assert all(isfinite(number) for number in result["third"][0])
    assert_resumes_bit_for_bit(result)


@pytest.mark.parametrize(("model", "setting"), CASES)
def test_steps_move_the_weights_that_were_loaded_by_their_learning_rate(stepped, model, setting):
    result = stepped[model, setting]
    assert all(isfinite(number) for step in result["steps"] for number in step)
    moved = 2 * OPTIMIZER.learning_rate * (1 + OPTIMIZER.weight_decay)
    rounding = E4M3_STEP if setting.endswith("gathered") else BF16_STEP
    assert result["weights"].keys() == result["loaded_weights"].keys()
    for name, before in result["loaded_weights"].items():
        before, after = before.float(), result["weights"][name].float()
        assert (after - before).norm() <= rounding * before.norm() + moved * before.numel() ** 0.5, name
    assert any(
        not torch.equal(result["weights"][name], before) for name, before in result["loaded_weights"].items()
    )


ELSEWHERE = {"dense for fp8": dict(tensor=2), "experts for fp8": dict(data=2, expert=2)}
"""Layouts of two ranks under which the checkpoints of one are loaded."""
MOVED = [
    (model, setting)
    for model in ELSEWHERE
    for setting in SETTINGS
    if setting not in ("tensorwise", "blockwise", "half of the optimizer on the host")
]


@pytest.fixture(scope="module")
def moved(stepped, models):
    """Every rank's programs.resume by (model, setting)."""
    cases = {
        (model, setting): (
            config(models, model, setting, ELSEWHERE[model]),
            stepped[model, setting]["checkpoint"],
        )
        for model, setting in MOVED
    }
    return launch("resume", ranks=2, cases=cases)


@pytest.mark.parametrize(("model", "setting"), MOVED)
def test_a_checkpoint_of_one_rank_goes_on_under_two(stepped, moved, model, setting):
    saved, (loss, count, norm) = stepped[model, setting]["weights"], stepped[model, setting]["third"][0]
    loaded, step, after = moved[0][model, setting]
    exact = not setting.endswith("gathered")  # else two ranks cut FP8 blocks elsewhere
    for name, before in saved.items():
        if exact:
            assert torch.equal(loaded[name], before), name
        assert (loaded[name].float() - before.float()).norm() <= E4M3_STEP * before.float().norm(), name
    steps = [rank[model, setting][1] for rank in moved]
    assert sum(step[1] for step in steps) == count
    # the ranks' partial sums round elsewhere: FP8 codes and bf16 numbers next to each other
    assert sum(step[0] for step in steps) == pytest.approx(loss, rel=0.15)
    assert step[2] == pytest.approx(norm, rel=0.15)
    assert any(not torch.equal(after[name], loaded[name]) for name in loaded)
