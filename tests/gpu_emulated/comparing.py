"""How far an actor's step is from a reference's, and whether it goes on from a checkpoint as without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from tests.actor.reference import Step


def relative_errors(
    found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> dict[str, float]:
    """By name, the norm of the difference over that of what is expected."""
    return {
        name: float((found[name].double() - tensor).norm() / tensor.norm())
        for name, tensor in expected.items()
    }


def assert_step_is_the_references(result: Mapping[str, Any], expected: Step) -> None:
    """result: has the first step's loss, count and gradient norm, and its whole gradient. fp32."""
    loss, count, norm = result["steps"][0]
    assert loss / count == pytest.approx(expected.loss, rel=1e-5)
    assert norm == pytest.approx(expected.gradient_norm, rel=1e-5)
    errors = relative_errors(result["gradient"], expected.gradient)
    assert max(errors.values()) < 1e-5, errors


def assert_resumes_bit_for_bit(result: Mapping[str, Any]) -> None:
    """result: has the third step and its weights, without and with loading a checkpoint before it."""
    (step, weights), (again, weights_again) = result["third"], result["third_resumed"]
    assert step == again
    assert all(torch.equal(weights[name], weights_again[name]) for name in weights)
