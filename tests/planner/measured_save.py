"""What a real save writes to memory while training stands still: see tests/actor/launch.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_pmd.actor.actor import Actor
from megatron_pmd.config import override
from recipes import recipe
from tests.actor.actor_programs import start

WRITES = {"zeros", "copy_", "_to_copy", "cat", "clone"}


class _Written(TorchDispatchMode):
    """Bytes of all results of ATen's operators that fill memory, but of collectives."""

    total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **kwargs or {})
        if function.overloadpacket.__name__ in WRITES and torch.is_tensor(result):
            self.total += result.nbytes
        return result


def copied_bytes(settings: list[str], folder: Path) -> int:
    config = override(recipe("tiny_moe_cpu"), settings)
    actor = Actor(config, start(config.layout))
    actor.chunks[0].zero_grad_buffer()
    actor.optimizer.step()
    with _Written() as written:
        actor.save(folder / "checkpoints", 1, {})
    actor.publish_checkpoint(wait=True)
    return written.total
