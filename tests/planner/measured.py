"""What an actor really holds: see tests/actor/launch.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_pmd.actor.actor import Actor
from megatron_pmd.config import override
from recipes import recipe
from tests.actor.actor_programs import start


def held(folder: Path, precisions: list[str]) -> dict[str, dict[str, int]]:
    """By precision, measure() of an actor of tiny_moe_cpu with the folder's model."""
    results = {}
    for precision in precisions:
        words = [f"model.path={folder}", f"model.precision={precision}"]
        config = override(recipe("tiny_moe_cpu"), words)
        results[precision] = measure(Actor(config, start(config.layout)))
    return results


def measure(actor: Actor) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer on this rank, of elements that are a parameter's."""
    parameters = [p for chunk in actor.chunks for p in chunk.parameters()]
    for chunk in actor.chunks:
        chunk.zero_grad_buffer()
    actor.optimizer.step()  # Adam makes its moments in the first step
    own = {p.untyped_storage().data_ptr() for p in parameters}
    states: list[torch.Tensor] = []
    parts: list[Any] = actor.optimizer.chained_optimizers
    for part in parts:
        for group in part.optimizer.param_groups:
            states += [p for p in group["params"] if p.untyped_storage().data_ptr() not in own]
        for state in part.optimizer.state.values():
            states += [v for v in state.values() if torch.is_tensor(v) and v.dim() > 0]
    return {
        "weights": sum(p.nbytes for p in parameters),
        "gradients": sum(p.main_grad.nbytes for p in parameters),
        "optimizer": sum(state.nbytes for state in states),
    }
