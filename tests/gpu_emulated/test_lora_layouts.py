"""Adapters under layouts of two ranks, in fp32: what one rank computes with the same ones.

Megatron-Bridge gives adapters other inputs and communication beside Transformer Engine's layers than beside
those of a CPU, for which tests/actor/test_lora.py asks peft.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.actor.conftest import LAYOUTS as OF_THE_ACTOR
from tests.gpu_emulated.comparing import relative_errors
from tests.gpu_emulated.launch import launch

LAYOUTS = {name: OF_THE_ACTOR[name] for name in ("dense, tensor=2", "latent, tensor=2, expert=2")}


@pytest.fixture(scope="module")
def alone(models, tmp_path_factory):
    """One rank's results, by family."""
    cases: dict[str, Any] = {family: (models / family, []) for family, _ in LAYOUTS.values()}
    return launch("begin_adapters", cases=cases, folder=tmp_path_factory.mktemp("begun"))[0]


@pytest.fixture(scope="module")
def together(models, alone):
    """Every rank's results, by layout."""
    cases: dict[str, Any] = {
        name: (models / family, layout, [], [alone[family]["saved"]])
        for name, (family, layout) in LAYOUTS.items()
    }
    return launch("adapters_under_layouts", ranks=2, cases=cases)


@pytest.mark.parametrize("name", LAYOUTS)
def test_log_probs_and_whole_gradients_are_those_of_one_rank(alone, together, name):
    expected = alone[LAYOUTS[name][0]]
    whole = torch.full_like(expected["log_probs"], torch.nan)
    for rank in together:
        own = ~rank[name]["log_probs"].isnan()
        whole[own] = rank[name]["log_probs"][own]
    torch.testing.assert_close(whole, expected["log_probs"], rtol=0, atol=1e-5, equal_nan=True)
    errors = relative_errors(together[0][name]["gradient"], expected["gradient"])
    assert max(errors.values()) < 1e-5, errors
