"""How far an actor's tensors are from a reference's."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def relative_errors(
    found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> dict[str, float]:
    """By name, the norm of the difference over that of what is expected."""
    return {
        name: float((found[name].double() - tensor).norm() / tensor.norm())
        for name, tensor in expected.items()
    }
