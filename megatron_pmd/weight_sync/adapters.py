"""What adapters add to the shards of weights that this rank holds.

A shard leaves as its base plus `alpha / rank · B A`, computed when it is read; the base is not written to.
Nothing here imports Megatron: the modules are those of Megatron-Bridge's peft folder.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

EXPERT = re.compile(r"\.weight(\d+)$")


class Adapter:
    """The two matrices of one linear layer, as far as this rank's part of its weight needs them."""

    def __init__(self, module: Any) -> None:
        """module: a LoRALinear."""
        self._adapter = module.adapter
        self._whole: torch.Tensor | None = None

    def gather(self) -> None:
        """Collective over the layer's tensor-parallel ranks: get whole what its weight's shards all need.

        Of a column-parallel layer, whose ranks hold rows, that is A; of a row-parallel one it is B. Both are
        sharded along their first dimension. Experts are whole on their rank (config.Lora refuses others).
        """
        adapter = self._adapter
        if adapter.is_expert:
            return
        own = (adapter.linear_out if adapter.input_is_parallel else adapter.linear_in).weight.detach()
        group = adapter.tp_group
        self._whole = own.new_empty((own.size(0) * group.size(), *own.shape[1:]))
        dist.all_gather_into_tensor(self._whole, own.contiguous(), group=group)

    def added(self, view: Callable[[torch.Tensor], torch.Tensor], expert: int | None) -> torch.Tensor:
        """What is added to a view of this rank's weight, fp32. gather() came first.

        view: some of the rows. expert: of a layer of experts, which of this rank's.
        """
        adapter = self._adapter
        a, b = (linear.weight.detach() for linear in (adapter.linear_in, adapter.linear_out))
        if expert is not None:
            a, b = a[expert], b[expert]
        elif adapter.input_is_parallel:
            assert self._whole is not None
            b = self._whole
        else:
            assert self._whole is not None
            a = self._whole
        return adapter.alpha / adapter.dim * (view(b).float() @ a.float())


class Adapters:
    """Those of a rank's model chunks."""

    def __init__(self, models: list[Any]) -> None:
        found = [
            m for model in models for m in model.modules() if hasattr(m, "to_wrap") and hasattr(m, "adapter")
        ]
        self._of_base = {id(module.to_wrap): Adapter(module) for module in found}

    def __bool__(self) -> bool:
        return bool(self._of_base)

    def gather(self) -> None:
        """Collective: see Adapter.gather. The adapters have changed since the last time."""
        for adapter in self._of_base.values():
            adapter.gather()

    def of(self, task: Any) -> tuple[Adapter, int | None] | None:
        """The adapter of a conversion task's weight, and which expert's it is; None: that has none."""
        adapter = self._of_base.get(id(task.megatron_module))
        expert = EXPERT.search(task.param_name)
        if adapter is None or not (expert or task.param_name.endswith(".weight")):
            return None
        return adapter, int(expert[1]) if expert else None
