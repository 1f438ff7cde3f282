"""What leaves the device and comes back; here both places are the host's memory."""

from __future__ import annotations

from typing import Any

import pytest

from tests.actor.launch import launch

KINDS = {"fp32": 2, "bf16": 3}
"""Tensors a parameter: two moments, and fp32 parameters where those of the model are not: views of the
model's leave with it."""


@pytest.fixture(scope="module")
def outcome(models) -> dict[str, Any]:
    return launch("off_and_on", cases={name: (models / "qwen3", name) for name in KINDS})[0]


@pytest.mark.parametrize("precision", KINDS)
def test_steps_with_the_optimizer_away_between_them_are_those_without_bit_for_bit(outcome, precision):
    assert outcome[precision]["steps"] == outcome[precision]["alone"]
    assert outcome[precision]["equal"]


@pytest.mark.parametrize("precision", KINDS)
def test_each_tensor_has_one_copy_on_the_host_which_is_used_again(outcome, precision):
    first, *later = outcome[precision]["addresses"]
    assert len(first) == len(set(first)) > 0
    assert all(addresses == first for addresses in later)
    assert outcome[precision]["kinds"] == KINDS[precision]
