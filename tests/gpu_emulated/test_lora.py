"""Adapters beside a base that multiplies in FP8, against float64 with the recipe's roundings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_pmd.config import override
from tests.actor.lora_programs import LORA
from tests.gpu_emulated.launch import launch
from tests.gpu_emulated.recipe_models import (
    Blockwise,
    Numbers,
    Recipe,
    Rows,
    Tensorwise,
    take_adapters,
    take_recipe,
)
from tests.gpu_emulated.settings import config

pytestmark = pytest.mark.long

DENSE, EXPERTS = "dense for fp8", "experts for fp8"
RECIPES: dict[str, type[Recipe]] = {"tensorwise": Tensorwise, "blockwise": Blockwise}
CASES = [(model, setting) for model in (DENSE, EXPERTS) for setting in ("bf16", *RECIPES)]
RANK = {DENSE: LORA["rank"], EXPERTS: 16}
"""Of experts one that FP8 can take."""


@pytest.fixture(scope="module")
def measured(models, tmp_path_factory) -> tuple[dict[Any, Any], str]:
    """number_programs.adapters."""
    cases = {}
    for model, setting in CASES:
        lora = [f"actor.lora.rank={RANK[model]}", f"actor.lora.alpha={LORA['alpha']}"]
        cases[model, setting] = override(config(models, model, setting), lora)
    return launch("number_programs.adapters", cases=cases, folder=tmp_path_factory.mktemp("adapters"))[0]


@pytest.fixture(scope="module", params=RANK)
def model(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def by_setting(measured, model) -> dict[str, dict[str, Any]]:
    return {setting: measured[0][model, setting] for setting in ("bf16", *RECIPES)}


@pytest.fixture(scope="module")
def computed(models, reference, by_setting, model):
    """What transformers computes on the actor's rows with the same adapters, the base's products with a
    recipe's roundings."""
    bf16 = by_setting["bf16"]

    def numbers(recipe: Recipe | None = None, dtype: torch.dtype = torch.float64) -> Numbers:
        rows = Rows(models / model, reference(model), bf16["rows"], dtype)
        if recipe:
            take_recipe(rows.model, recipe, range(4))
        adapters = load_file(bf16["adapters"] / "adapter_model.safetensors")
        take_adapters(rows.model, adapters, LORA["alpha"] / RANK[model])
        step = rows.step()
        step.gradient = {f"{name}.weight": g for name, g in step.gradient.items() if ".lora_" in name}
        return step

    return numbers


def distance(found: Any, expected: Any) -> float:
    """Norm of the difference of two whole gradients, of what the second has."""
    squares = (float((found[name].double() - e.double()).square().sum()) for name, e in expected.items())
    return sum(squares) ** 0.5


def test_in_bf16_they_are_as_near_float64_as_transformers_in_bf16(by_setting, computed):
    found, exact, theirs = by_setting["bf16"], computed(), computed(dtype=torch.bfloat16)
    own = distance(found["gradient"], exact.gradient)
    norm = sum(float(g.square().sum()) for g in exact.gradient.values()) ** 0.5
    assert own < min(0.05 * norm, 1.5 * distance(theirs.gradient, exact.gradient))
    known = exact.log_probs.isfinite()
    errors = [(each - exact.log_probs)[known].norm() for each in (found["log_probs"], theirs.log_probs)]
    assert errors[0] < 1.5 * errors[1]


@pytest.mark.parametrize("setting", RECIPES)
def test_fp8_moves_log_probs_and_whole_gradients_of_adapters_as_far_as_its_format_explains(
    by_setting, computed, setting
):
    """From those of bf16, as far as the recipe's roundings move float64. Adapters multiply in bf16, and are
    exact there."""
    bf16, found = by_setting["bf16"], by_setting[setting]
    exact, expected = computed(), computed(RECIPES[setting]())
    moved = {name: found["gradient"][name] for name in exact.gradient}
    ratio = distance(bf16["gradient"], moved) / distance(expected.gradient, exact.gradient)
    assert 0.6 < ratio < 1.5
    known = exact.log_probs.isfinite()
    changes = (found["log_probs"] - bf16["log_probs"], expected.log_probs - exact.log_probs)
    ratio = changes[0][known].norm() / changes[1][known].norm()
    assert 0.5 < ratio < 2


@pytest.mark.parametrize("case", CASES, ids=", ".join)
def test_two_steps_leave_the_base_as_loaded_and_adapters_alone_have_gradients_and_states(measured, case):
    found = measured[0][case]
    assert found["base is as loaded"]
    assert found["states"] == found["gradients"] == found["trained"]
    assert 0 < found["trained"] < found["held"] / 4
    assert all(torch.isfinite(weight).all() for weight in found["weights"].values())


def test_megatron_bridge_still_gives_adapters_of_experts_to_transformer_engine_wrongly(measured):
    """Where it does not, lora.add_adapters need not turn that off."""
    assert "not enough values to unpack" in measured[1]
