"""A step, a checkpoint, and a resume with the optimizer's states on the host: `python -m` with MODEL OUTPUT.

megatron-core's HybridDeviceOptimizer asks each tensor where it is. This process has one memory, and plays
two: a tensor is on the device unless it came from .cpu(), .pin_memory() or another one on the host.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_pmd.actor.cpu import standins

if __name__ == "__main__":
    # torch's AdamW as a distributed optimizer's own is what adam_state is for; here it is the host's
    standins.install(leave_out=("adam_state",))

from megatron.core.optimizer import distrib_optimizer, optimizer_config

from megatron_pmd.actor import settings
from tests.actor.actor_programs import Trial
from tests.actor.tiny_models import STEPS, config_for


def play_two_memories() -> None:
    kind: Any = torch.Tensor
    clone, floats, detach, empty = kind.clone, kind.float, kind.detach, torch.empty

    def on_host(tensor: torch.Tensor) -> torch.Tensor:
        tensor.is_on_host = True  # type: ignore[attr-defined]
        return tensor

    def same_place(function: Any) -> Any:
        def call(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            result = function(self, *args, **kwargs)
            return on_host(result) if getattr(self, "is_on_host", False) else result

        return call

    def asked_by_the_optimizer(self: torch.Tensor) -> bool:
        asks = sys._getframe(1).f_globals["__name__"]  # to torch's own questions the answer is no
        return asks.endswith("hybrid_optimizer") and not getattr(self, "is_on_host", False)

    kind.is_cuda = property(asked_by_the_optimizer)
    kind.cpu = lambda self, *args, **kwargs: on_host(clone(self))
    kind.pin_memory = lambda self, *args: on_host(self)
    kind.clone, kind.float, kind.detach = same_place(clone), same_place(floats), same_place(detach)
    torch.empty = lambda *args, pin_memory=False, **kwargs: empty(*args, **kwargs)


def main(model: Path, output: Path) -> None:
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    config = config_for(model, precision="bf16")
    offload = config.optimizer.model_copy(update={"offload": 1.0})
    config = config.model_copy(update={"optimizer": offload})
    # as where Transformer Engine is
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_TE_OPTIMIZER = True
    optimizer_config.is_te_min_version = lambda version: True
    play_two_memories()
    settings.refuse_without_cuda = lambda config: None
    trial, fresh = Trial(config), Trial(config)
    trial.step(STEPS[0])
    saved = trial.save(output / "checkpoints")
    result: dict[str, Any] = {"third": [trial.step(STEPS[1]), trial.weights()]}
    fresh.actor.load(saved)
    result["third_resumed"] = [fresh.step(STEPS[1]), fresh.weights()]
    (inner,) = fresh.actor.optimizer.chained_optimizers
    result["optimizer"] = type(inner.optimizer).__name__
    result["kinds"] = {type(part).__name__ for part in inner.optimizer.sub_optimizers}
    result["largest storage"] = max(
        value.untyped_storage().nbytes() / max(value.nbytes, 1)
        for state in inner.optimizer.state.values()
        for value in state.values()
        if torch.is_tensor(value)
    )
    torch.save(result, output / "result.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
