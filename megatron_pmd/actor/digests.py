"""Sums over all bits of a rank's weights, by which a checkpoint knows them again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

from megatron_pmd.actor import lora
from megatron_pmd.actor.model import expert_biases
from megatron_pmd.device import current_device


def digest(chunks: list[Any]) -> int:
    """Sum of all bits of what a checkpoint holds: a wrong byte anywhere changes it.

    It holds parameters and expert biases, or adapters alone.
    """
    whole = lora.description(chunks) is None
    return int(_sum_of_bits(p for name, p in _weights(chunks) if whole or lora.ADAPTER in name))


def digest_of_base(chunks: list[Any]) -> int | None:
    """The same of what lies beside adapters, over all ranks: equal under every layout. None: no adapters.

    Collective.
    """
    if lora.description(chunks) is None:
        return None
    total = _sum_of_bits(p for name, p in _weights(chunks) if lora.ADAPTER not in name and _counts_here(p))
    dist.all_reduce(total)
    return int(total)


def _weights(chunks: list[Any]) -> Iterator[tuple[str, torch.Tensor]]:
    for chunk in chunks:
        yield from chunk.named_parameters()
        yield from expert_biases(chunk).items()


def _counts_here(weight: torch.Tensor) -> bool:
    """Of the ranks that hold these same numbers, one says yes."""
    if getattr(weight, "allreduce", True):
        replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    else:
        replica = parallel_state.get_expert_data_parallel_rank()
    experts = parallel_state.get_expert_tensor_parallel_group()
    return (
        replica == 0
        and param_is_not_shared(weight)
        and param_is_not_tensor_parallel_duplicate(weight, expert_tp_group=experts)
    )


def _sum_of_bits(weights: Iterator[torch.Tensor]) -> torch.Tensor:
    """int64, modulo 2^64.

    Of an FP8 parameter those of the numbers it stands for: its bytes cannot be viewed, and the copy by column
    is there or not.
    """
    integers = {4: torch.int32, 2: torch.int16}
    total = torch.zeros((), dtype=torch.int64, device=current_device())
    for weight in weights:
        plain = weight.detach().dequantize() if is_float8tensor(weight) else weight.detach()
        total += plain.view(integers[plain.element_size()]).sum(dtype=torch.int64)
    return total
