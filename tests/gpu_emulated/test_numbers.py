"""What the settings of precision compute on the emulated device, against float64.

Experts are those of a recorded routing, so that rounding cannot send a token elsewhere.
"""

from __future__ import annotations

from functools import partial
from math import sqrt
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_pmd.config import RunConfig
from tests.actor.reference import compute
from tests.actor.tiny_models import OPTIMIZER, STEPS, write_model
from tests.gpu_emulated import recipe_models
from tests.gpu_emulated.conftest import FP8_FAMILIES, FP8_WIDTHS
from tests.gpu_emulated.launch import launch
from tests.gpu_emulated.recipe_models import E4M3, E5M2, Blockwise, Delayed, Recipe, Rows, Tensorwise
from tests.gpu_emulated.settings import config

ALL_ROWS = [list(range(8)), list(range(8, 16))]
# Few tokens: fp32's rounding turns one FP8 code in a million into its neighbour, and then a token's numbers.
TWO_ROWS, ONE_ROW = [[0, 1], [2, 3]], [list(range(16))]
DENSE, EXPERTS, LATENT = FP8_FAMILIES
IN_BF16 = {f"{name}, weights in bf16": of_family for name, of_family in FP8_FAMILIES.items()}
DEEP, ROUTED, COMPRESSED = IN_BF16
SHALLOW = "two dense layers, weights in bf16"
IN_BF16[SHALLOW] = (FP8_FAMILIES[DENSE][0], dict(num_hidden_layers=2))
"""As models are published. The FP8 tests keep weights in fp32, with which no code is turned that matters."""
EXACT = {
    (DENSE, "tensorwise"): TWO_ROWS,
    (DENSE, "tensorwise but for the ends"): TWO_ROWS,
    (DENSE, "delayed"): ONE_ROW,
    (DENSE, "blockwise"): TWO_ROWS,
    (EXPERTS, "tensorwise"): TWO_ROWS,
    (EXPERTS, "blockwise"): TWO_ROWS,
}
MOVING = [
    "bf16", "bf16 moments", "the optimizer on the host", "half of the optimizer on the host",
    "tensorwise, gathered", "blockwise, gathered",
]  # fmt: skip
GATHERED = [setting for setting in MOVING if "gathered" in setting]


def in_fp32(config: RunConfig) -> RunConfig:
    """The same with fp32 where a run has bf16, which the configuration refuses beside FP8.

    Rounding to bf16 turns one FP8 code in eight into its neighbour; what is left without it is the recipe.
    """
    return config.model_copy(update={"model": config.model.model_copy(update={"precision": "fp32"})})


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Models with weights as large as a real model's: 0.02."""
    folder = tmp_path_factory.mktemp("small")
    for name, (family, changes) in (FP8_FAMILIES | IN_BF16).items():
        write_model(folder / name, family, **(FP8_WIDTHS | changes | dict(initializer_range=0.02)))
        if name in IN_BF16:
            file = folder / name / "model.safetensors"
            weights = {key: weight.bfloat16().float() for key, weight in load_file(file).items()}
            save_file(weights, file, metadata={"format": "pt"})
        steps = STEPS[:1] if name == DEEP else []
        torch.save(compute(folder / name, steps), folder / name / "reference.pt")
    return folder


@pytest.fixture(scope="module")
def measured(small):
    """number_programs.numbers: by (model, setting, precision), and twice by setting."""
    still: dict[Any, Any] = {
        (model, "bf16", "bf16"): (config(small, model, "bf16"), ALL_ROWS, 1) for model in IN_BF16
    }
    for case, rows in EXACT.items():
        steps = 3 if "delayed" in case else 1
        still[*case, "fp32"] = in_fp32(config(small, *case)), rows, steps
        if "ends" not in case[1]:
            still[*case, "bf16"] = config(small, *case), rows, steps
    moving = {setting: config(small, DENSE, setting) for setting in MOVING}
    not_kept = {setting: moving[setting] for setting in GATHERED}
    return launch("number_programs.numbers", still=still, moving=moving, not_kept=not_kept)[0]


def distance(found: Any, expected: Any) -> float:
    """Of two whole gradients, or sets of tensors, by name: norm of the difference over that of the second."""
    # of a router's bias, which has no gradient, the actor gives the bias
    assert found.keys() >= expected.keys()
    differences = (float((found[name].double() - e).square().sum()) for name, e in expected.items())
    return sqrt(sum(differences) / sum(float(e.double().square().sum()) for e in expected.values()))


def log_prob_distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square over the response tokens, nats."""
    assert torch.equal(found.isnan(), expected.isnan())
    return float((found.double() - expected).square().nanmean().sqrt())


@pytest.fixture(scope="module")
def computed(small, measured):
    """Rows' numbers of a model in this type, on the rows of the actor; with a recipe, in these layers."""
    kept: dict[Any, Any] = {}

    def numbers(
        model: str, dtype: torch.dtype, setting: str = "bf16", recipe: Recipe | None = None,
        layers: range = range(4), *, steps: int = 1, fused: bool = True,
    ) -> recipe_models.Numbers:  # fmt: skip
        key = (model, dtype, setting, str(recipe), layers, steps, fused)
        if key not in kept:
            reference = torch.load(small / model / "reference.pt", weights_only=False)
            precision = "bf16" if setting == "bf16" else "fp32"
            rows = Rows(small / model, reference, measured[0][model, setting, precision]["rows"], dtype)
            if recipe:
                recipe_models.take_recipe(rows.model, recipe, layers, fused=fused)
            for _ in range(steps):
                found = rows.step()
            if steps > 1:
                found.log_probs = rows.step().log_probs
            kept[key] = found
        return kept[key]

    return numbers


def test_packed_rows_of_transformers_give_the_reference(small, computed):
    expected = torch.load(small / DEEP / "reference.pt", weights_only=False).steps[0]
    found = computed(DEEP, torch.float64)
    assert found.loss == pytest.approx(expected.loss, rel=1e-7)
    assert distance(found.gradient, expected.gradient) < 1e-6


# The errors of all roundings to bf16 on the way add up: of four dense layers to more than of two.
@pytest.mark.parametrize(
    ("model", "bound"), [(SHALLOW, 1e-2), (ROUTED, 1e-2), (COMPRESSED, 1e-2), (DEEP, 1.2e-2)]
)
def test_bf16_is_near_float64_and_as_near_as_transformers_in_bf16(measured, computed, model, bound):
    """Relative to the whole gradient, the loss, and the log-probs' spread, which is that of the logits."""
    found = measured[0][model, "bf16", "bf16"]
    exact, theirs = (computed(model, dtype) for dtype in (torch.float64, torch.bfloat16))
    own = distance(found["gradient"], exact.gradient)
    assert own < bound
    assert own < 1.5 * distance(theirs.gradient, exact.gradient)
    assert found["loss"] == pytest.approx(exact.loss, rel=1e-2)
    own = log_prob_distance(found["log_probs"], exact.log_probs)
    spread = exact.log_probs[exact.log_probs.isfinite()].std()
    assert own < 1e-2 * spread
    assert own < 1.5 * log_prob_distance(theirs.log_probs, exact.log_probs)


RECIPES: dict[str, dict[str, Any]] = {
    "tensorwise": dict(recipe=Tensorwise),
    "tensorwise but for the ends": dict(recipe=Tensorwise, layers=range(1, 3)),
    "delayed": dict(recipe=Delayed, steps=3),
    "blockwise": dict(recipe=Blockwise),
}
PLAIN, ENDS, DELAYED, TILES = ((DENSE, setting) for setting in RECIPES)
WRONG: dict[str, tuple[tuple[str, str], dict[str, Any]]] = {
    "E5M2 forward": (PLAIN, dict(recipe=partial(Tensorwise, forward=E5M2))),
    "E4M3 gradients": (PLAIN, dict(recipe=partial(Tensorwise, backward=E4M3))),
    "a weight without a scale": (PLAIN, dict(recipe=partial(Tensorwise, unscaled="weight"))),
    "a gradient without a scale": (PLAIN, dict(recipe=partial(Tensorwise, unscaled="gradient"))),
    "a scale for each projection": (PLAIN, dict(recipe=Tensorwise, fused=False)),
    "tiles for tensors": (PLAIN, dict(recipe=Blockwise)),
    "the first layer too": (ENDS, dict(recipe=Tensorwise, layers=range(3))),
    "the last layer too": (ENDS, dict(recipe=Tensorwise, layers=range(1, 4))),
    "a layer less": (ENDS, dict(recipe=Tensorwise, layers=range(1, 2))),
    "scales of the first step": (DELAYED, dict(recipe=Delayed)),
    "scales of the step itself": (DELAYED, dict(recipe=Tensorwise)),
    "tiles across the sum": (TILES, dict(recipe=partial(Blockwise, across=True))),
    "rows of weights": (TILES, dict(recipe=partial(Blockwise, weight_tile=(1, 128)))),
    "scales of powers of two": (TILES, dict(recipe=partial(Blockwise, powers_of_two=True))),
    "tensors for tiles": (TILES, dict(recipe=Tensorwise)),
    "experts in E5M2": ((EXPERTS, "tensorwise"), dict(recipe=partial(Tensorwise, forward=E5M2))),
    "tiles of experts across": ((EXPERTS, "blockwise"), dict(recipe=partial(Blockwise, across=True))),
}
"""By name: the (model, setting) whose recipe it gets wrong, and how."""


def of_recipe(computed, case, how):
    how = how | {"recipe": how["recipe"]()}
    return computed(case[0], torch.float64, case[1], **how)


def cosines(found, expected):
    return {
        name: float((found[name].double() * e).sum() / (found[name].double().norm() * e.norm()))
        for name, e in expected.items()
    }


@pytest.mark.parametrize("case", EXACT, ids=", ".join)
def test_an_fp8_recipe_is_its_float64_model(measured, computed, case):
    found, exact = measured[0][*case, "fp32"], computed(case[0], torch.float64, case[1])
    expected = of_recipe(computed, case, RECIPES[case[1]])
    own = distance(found["gradient"], expected.gradient)
    assert own < distance(found["gradient"], exact.gradient) / 3
    assert min(cosines(found["gradient"], expected.gradient).values()) > 0.99
    own = log_prob_distance(found["log_probs"], expected.log_probs)
    assert own < log_prob_distance(found["log_probs"], exact.log_probs) / 3
    assert abs(found["loss"] - expected.loss) < abs(expected.loss - exact.loss) / 3


@pytest.mark.parametrize("case", [case for case in EXACT if "ends" not in case[1]], ids=", ".join)
def test_fp8_in_a_bf16_run_errs_as_much_as_its_format_explains(measured, computed, case):
    """bf16's rounding turns so many codes into their neighbours that the errors themselves are others."""
    found, exact = measured[0][*case, "bf16"], computed(case[0], torch.float64, case[1])
    expected = of_recipe(computed, case, RECIPES[case[1]])
    ratio = distance(found["gradient"], exact.gradient) / distance(expected.gradient, exact.gradient)
    assert 0.6 < ratio < 1.5
    errors = (log_prob_distance(each, exact.log_probs) for each in (found["log_probs"], expected.log_probs))
    assert 0.5 < next(errors) / next(errors) < 2


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_model_of_a_recipe_is_told_from_the_right_one(measured, computed, name):
    case, how = WRONG[name]
    found = measured[0][*case, "fp32"]["gradient"]
    wrong, right = (of_recipe(computed, case, each) for each in (how, RECIPES[case[1]]))
    assert distance(found, wrong.gradient) > 3 * distance(found, right.gradient)


def begins_with(held: dict[str, list[Any]]) -> float:
    """How far the fp32 parameters are from the loaded weights after a step, of matrices that are FP8."""
    weights = {n: w for n, w in held["model"][0].items() if ".linear_" in n and w.ndim == 2}
    states = held["optimizer"][0]
    return distance({n: states[n]["param"].reshape(w.shape) for n, w in weights.items()}, weights)


@pytest.mark.parametrize("setting", GATHERED)
def test_megatron_core_still_begins_gathered_fp8_weights_at_random_if_it_is_left_to_it(measured, setting):
    """Where it does not, _keep_unrounded (megatron_pmd/actor/model.py) is needed no more."""
    assert begins_with(measured[1][setting]) < 0.1
    assert begins_with(measured[2][setting]) > 1


@pytest.mark.parametrize("setting", GATHERED)
def test_gathered_fp8_weights_are_the_fp32_ones_of_the_same_step_in_bf16_and_then_in_fp8(measured, setting):
    """Transformer Engine casts by way of the model's type, as weights that are not kept in FP8 are cast."""
    held = measured[1][setting]
    recipe = Tensorwise() if "tensorwise" in setting else Blockwise()
    for model, optimizer in zip(held["model"][1:], held["optimizer"], strict=True):
        for name, weight in model.items():
            main = optimizer[name]["param"].reshape(weight.shape)
            if ".linear_" in name and weight.ndim == 2:
                expected = recipe.round(name, "weight", main.bfloat16().double())[0]
                # scales are fp32: so are the values
                torch.testing.assert_close(weight.double(), expected, rtol=1e-6, atol=0)
            else:
                assert torch.equal(weight, main.bfloat16().float()), name
    assert not torch.equal(held["optimizer"][0][name]["param"], held["optimizer"][1][name]["param"])


def adam(held: dict[str, list[Any]], name: str, *, moments: torch.dtype) -> tuple[torch.Tensor, ...]:
    """The fp32 parameter after two AdamW steps along its gradients, and its moments, in float64.

    The moments are kept in this type between the steps; a step itself takes them as it has computed them.
    """
    weight = held["model"][0][name].double()
    first = second = torch.zeros_like(weight)
    for step, (gradients, norm) in enumerate(zip(held["gradients"], held["norms"], strict=True), start=1):
        gradient = gradients[name].double() * min(1.0, OPTIMIZER.gradient_clip / norm)
        first = OPTIMIZER.beta1 * first + (1 - OPTIMIZER.beta1) * gradient
        second = OPTIMIZER.beta2 * second + (1 - OPTIMIZER.beta2) * gradient.square()
        corrected = second / (1 - OPTIMIZER.beta2**step)
        change = first / (1 - OPTIMIZER.beta1**step) / (corrected.sqrt() + OPTIMIZER.epsilon)
        decay = OPTIMIZER.weight_decay * weight if weight.ndim > 1 else 0.0
        weight = weight - OPTIMIZER.learning_rate * (change + decay)
        first, second = (moment.to(moments).double() for moment in (first, second))
    return weight, first, second


def moved(held: dict[str, list[Any]]) -> dict[str, torch.Tensor]:
    """By how much two steps moved each fp32 parameter."""
    return {
        name: state["param"].double().reshape(held["model"][0][name].shape) - held["model"][0][name]
        for name, state in held["optimizer"][1].items()
    }


def moved_by_adam(held: dict[str, list[Any]], *, moments: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: adam(held, name, moments=moments)[0] - weight for name, weight in held["model"][0].items()}


@pytest.mark.parametrize("setting", [setting for setting in MOVING if setting not in GATHERED])
def test_two_steps_are_float64_adam_with_moments_kept_as_the_setting_says(measured, setting):
    held = measured[1][setting]
    kind, other = torch.float32, torch.bfloat16
    if setting == "bf16 moments":
        kind, other = other, kind
    own, wrong = (distance(moved(held), moved_by_adam(held, moments=each)) for each in (kind, other))
    assert own < 1e-4
    assert wrong > 10 * own


@pytest.mark.parametrize("setting", ["the optimizer on the host", "half of the optimizer on the host"])
def test_the_first_step_on_the_host_is_that_on_the_device_to_the_last_bit_but_one(measured, setting):
    device, host = (measured[1][name]["optimizer"][0] for name in ("bf16", setting))
    for name, state in host.items():
        there = device[name]["param"].reshape(-1)
        torch.testing.assert_close(state["param"].reshape(-1), there, rtol=2**-22, atol=1e-8)
