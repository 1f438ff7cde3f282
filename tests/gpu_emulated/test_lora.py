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

MODEL, EXPERTS = "dense for fp8", "experts for fp8"
RECIPES: dict[str, type[Recipe]] = {"tensorwise": Tensorwise, "blockwise": Blockwise}


@pytest.fixture(scope="module")
def measured(models, tmp_path_factory) -> dict[str, dict[str, Any]]:
    """number_programs.adapters, by setting. Those of experts have a rank that FP8 can take."""
    folder = tmp_path_factory.mktemp("adapters")
    lora = [f"actor.lora.{key}={value}" for key, value in LORA.items()]
    cases = {
        setting: (override(config(models, MODEL, setting), lora), folder / setting)
        for setting in ("bf16", *RECIPES)
    }
    lora[0] = "actor.lora.rank=16"
    for setting in ("bf16", *RECIPES):
        found = override(config(models, EXPERTS, setting), lora)
        cases[f"experts, {setting}"] = found, folder / f"experts-{setting}"
    return launch("number_programs.adapters", cases=cases)[0]


@pytest.fixture(scope="module")
def computed(models, reference, measured):
    """What float64 computes on the actor's rows with the same adapters, the base's products with a recipe's
    roundings."""

    def numbers(recipe: Recipe | None) -> Numbers:
        rows = Rows(models / MODEL, reference(MODEL), measured["bf16"]["rows"], torch.float64)
        if recipe:
            take_recipe(rows.model, recipe, range(4))
        adapters = load_file(measured["bf16"]["adapters"] / "adapter_model.safetensors")
        take_adapters(rows.model, adapters, LORA["alpha"] / LORA["rank"])
        found = rows.step()
        found.gradient = {f"{name}.weight": g for name, g in found.gradient.items() if ".lora_" in name}
        return found

    return numbers


def distance(found: Any, expected: Any) -> float:
    """Norm of the difference of two whole gradients, of what the second has."""
    squares = (float((found[name].double() - e.double()).square().sum()) for name, e in expected.items())
    return sum(squares) ** 0.5


def test_in_bf16_they_are_near_float64(measured, computed):
    found, exact = measured["bf16"], computed(None)
    norm = sum(float(g.square().sum()) for g in exact.gradient.values()) ** 0.5
    assert distance(found["gradient"], exact.gradient) < 1.2e-2 * norm
    known = exact.log_probs.isfinite()
    error = (found["log_probs"].double() - exact.log_probs)[known].square().mean().sqrt()
    assert error < 1e-2 * exact.log_probs[known].std()


@pytest.mark.parametrize("setting", RECIPES)
def test_fp8_moves_log_probs_and_whole_gradients_of_adapters_as_far_as_its_format_explains(
    measured, computed, setting
):
    """From those of bf16, as far as the recipe's roundings move float64. Adapters multiply in bf16, and are
    exact there."""
    bf16, found = measured["bf16"], measured[setting]
    exact, expected = computed(None), computed(RECIPES[setting]())
    moved = {name: found["gradient"][name] for name in exact.gradient}
    ratio = distance(bf16["gradient"], moved) / distance(expected.gradient, exact.gradient)
    assert 0.6 < ratio < 1.5
    known = exact.log_probs.isfinite()
    changes = (found["log_probs"] - bf16["log_probs"], expected.log_probs - exact.log_probs)
    ratio = changes[0][known].norm() / changes[1][known].norm()
    assert 0.5 < ratio < 2


@pytest.mark.parametrize("setting", ["bf16", *RECIPES, *(f"experts, {each}" for each in ("bf16", *RECIPES))])
def test_two_steps_leave_the_base_as_loaded_and_adapters_alone_have_gradients_and_states(measured, setting):
    found = measured[setting]
    assert found["base is as loaded"]
    assert found["states"] == found["gradients"] == found["trained"]
    assert 0 < found["trained"] < found["held"] / 10
    assert all(torch.isfinite(weight).all() for weight in found["weights"].values())


def test_megatron_bridge_still_gives_adapters_of_experts_to_transformer_engine_wrongly(measured):
    """Where it does not, lora.add_adapters need not turn that off."""
    assert "not enough values to unpack" in measured["given to Transformer Engine"]
