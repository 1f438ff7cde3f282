"""Muon and the Adam beside it by their definitions, in float64 on whole matrices."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_pmd.hugging_face import read_object
from tests.actor.tiny_models import OPTIMIZER

MOMENTUM = 0.95
ADAMS = re.compile(r"embed_tokens|lm_head|norm|bias|conv1d|A_log|sinks")
Matrices = Callable[[str, torch.Tensor], list[torch.Tensor]]
"""Of a named tensor of a folder, views of the matrices that it holds: rows in all dimensions but the last."""


def orthogonalized(matrix: torch.Tensor) -> torch.Tensor:
    """Newton-Schulz as Keller Jordan published it: five steps with one set of coefficients."""
    x = matrix / matrix.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


class Definition:
    """Muon and AdamW in float64, of whole tensors by Hugging Face name."""

    def __init__(self, weights: dict[str, torch.Tensor], matrices: Matrices = lambda _, w: [w]) -> None:
        self.matrices = matrices
        self.moments = {name: torch.zeros(2, *w.shape, dtype=torch.float64) for name, w in weights.items()}
        self.count = 0

    def step(
        self, weights: dict[str, torch.Tensor], gradients: dict[str, torch.Tensor], norm: float, rate: float
    ) -> dict[str, torch.Tensor]:
        self.count += 1
        scale = min(1.0, OPTIMIZER.gradient_clip / norm)
        return {
            name: self._moved(name, weight.double(), gradients[name].double() * scale, rate)
            for name, weight in weights.items()
        }

    def _moved(self, name: str, weight: torch.Tensor, gradient: torch.Tensor, rate: float) -> torch.Tensor:
        first, second = self.moments[name]
        b1, b2 = OPTIMIZER.beta1, OPTIMIZER.beta2
        vector = weight.dim() == 1 or name.endswith("_bias")
        decayed = weight if vector else weight * (1 - rate * OPTIMIZER.weight_decay)
        if ADAMS.search(name):
            first.mul_(b1).add_(gradient, alpha=1 - b1)
            second.mul_(b2).add_(gradient.square(), alpha=1 - b2)
            deviation = (second / (1 - b2**self.count)).sqrt() + OPTIMIZER.epsilon
            return decayed - rate * first / (1 - b1**self.count) / deviation
        # as published, momentum sums up gradients; the scale of what is orthogonalised means nothing
        first.mul_(MOMENTUM).add_(gradient)
        momentum, update = gradient + MOMENTUM * first, torch.empty_like(weight)
        parts = zip(self.matrices(name, momentum), self.matrices(name, update), strict=True)
        for part, moved in parts:
            matrix = part.flatten(0, -2)
            moved.copy_((0.2 * max(matrix.shape) ** 0.5 * orthogonalized(matrix)).view_as(moved))
        return decayed - rate * update


def matrices_of(folder: Path) -> Matrices:
    """Of a model whose tensors hold more than a matrix each: gated queries, the inputs of a gated delta net,
    and gpt-oss's experts. The order of the rows is that in which transformers reads them."""
    config: dict[str, Any] = read_object(folder / "config.json") or {}
    gated = "linear_num_key_heads" in config
    if gated:
        heads, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
        key, value = heads * config["linear_key_head_dim"], values * config["linear_value_head_dim"]

    def of(name: str, tensor: torch.Tensor) -> list[torch.Tensor]:
        if gated and "self_attn.q_proj" in name:  # of each head the query, then the gate of its output
            return list(tensor.unflatten(0, (config["num_attention_heads"], 2, -1)).unbind(1))
        if "in_proj_qkvz" in name:  # of each key head all four
            rows = [size // heads for size in (key, key, value, value)]
            return list(tensor.unflatten(0, (heads, -1)).split(rows, dim=1))
        if "in_proj_ba" in name:
            return list(tensor.unflatten(0, (heads, -1)).chunk(2, dim=1))
        if "in_proj_qkv" in name:
            return list(tensor.split([key, key, value]))
        if name.endswith("experts.gate_up_proj"):  # columns of gate and up alternate
            return [expert[:, half::2] for expert in tensor for half in (0, 1)]
        return list(tensor) if name.endswith("experts.down_proj") else [tensor]

    return of


def difference(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> dict[str, float]:
    assert weights.keys() == others.keys()
    return {name: float((w.double() - others[name].double()).abs().max()) for name, w in weights.items()}
