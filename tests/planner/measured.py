"""What an actor really holds: `torchrun -m tests.planner.measured MODEL_FOLDER OUTPUT_FOLDER PRECISION`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from megatron_pmd.actor.cpu import standins

if __name__ == "__main__":
    standins.install()

import torch

from megatron_pmd.actor.actor import Actor
from megatron_pmd.actor.parallel import initialize
from megatron_pmd.config import override
from megatron_pmd.distributed import Control
from recipes import recipe


def measure(actor: Actor) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer on this rank, of elements that are a parameter's."""
    parameters = [p for chunk in actor.chunks for p in chunk.parameters()]
    for chunk in actor.chunks:
        chunk.zero_grad_buffer()
    actor.optimizer.step()  # Adam makes its moments in the first step
    own = {p.untyped_storage().data_ptr() for p in parameters}
    states: list[torch.Tensor] = []
    parts: list[Any] = getattr(actor.optimizer, "chained_optimizers", [actor.optimizer])
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


if __name__ == "__main__":
    folder, output, precision = sys.argv[1:]
    config = override(recipe("tiny_moe_cpu"), [f"model.path={folder}", f"model.precision={precision}"])
    initialize(config.layout, seed=0, timeout_seconds=60)
    control = Control(60)
    result = measure(Actor(config, control))
    (Path(output) / f"{control.rank}.json").write_text(json.dumps(result))
