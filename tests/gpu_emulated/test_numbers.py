"""What the settings of precision compute on the emulated device, against float64.

Experts are those of a recorded routing, so that rounding cannot send a token elsewhere.
"""

from __future__ import annotations

from math import sqrt
from typing import Any

import pytest
import torch

from megatron_pmd.config import RunConfig
from tests.actor.reference import compute
from tests.actor.tiny_models import OPTIMIZER, STEPS, write_model
from tests.gpu_emulated import recipe_models
from tests.gpu_emulated.conftest import FP8_FAMILIES, FP8_WIDTHS
from tests.gpu_emulated.launch import launch
from tests.gpu_emulated.recipe_models import E4M3, E5M2, Blockwise, Delayed, Recipe, Rows, Tensorwise
from tests.gpu_emulated.test_settings import config

TWO_ROWS = [list(range(8)), list(range(8, 16))]
ONE_ROW = [list(range(16))]
DENSE, EXPERTS, LATENT = FP8_FAMILIES
BF16 = [(model, "bf16") for model in FP8_FAMILIES]
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


def in_fp32(config: RunConfig) -> RunConfig:
    """The same with fp32 where a run has bf16, which the configuration refuses beside FP8.

    Rounding to bf16 turns one FP8 code in eight into its neighbour; what is left without it is the recipe.
    """
    return config.model_copy(update={"model": config.model.model_copy(update={"precision": "fp32"})})


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Models with weights as large as a real model's: 0.02."""
    folder = tmp_path_factory.mktemp("small")
    for name, (family, changes) in FP8_FAMILIES.items():
        write_model(folder / name, family, **(FP8_WIDTHS | changes | dict(initializer_range=0.02)))
        steps = STEPS[:1] if name == DENSE else []
        torch.save(compute(folder / name, steps), folder / name / "reference.pt")
    return folder


@pytest.fixture(scope="module")
def measured(small):
    """programs.numbers: by (model, setting, precision), and by setting."""
    still: dict[Any, Any] = {(*case, "bf16"): (config(small, *case), TWO_ROWS, 1) for case in BF16}
    for case, rows in EXACT.items():
        steps = 3 if "delayed" in case else 1
        still[*case, "fp32"] = in_fp32(config(small, *case)), rows, steps
        if "ends" not in case[1]:
            still[*case, "bf16"] = config(small, *case), rows, steps
    moving = {setting: config(small, DENSE, setting) for setting in MOVING}
    configs = [*(case[0] for case in still.values()), *moving.values()]
    return launch("numbers", configs, still=still, moving=moving)[0]
