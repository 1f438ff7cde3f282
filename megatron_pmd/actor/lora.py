"""LoRA: Megatron-Bridge's low-rank adapters beside the weights of a model, which no step changes then."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_pmd.actor.settings import lora_targets
from megatron_pmd.config import RunConfig
from megatron_pmd.errors import LayoutError

ADAPTER = ".adapter."
"""In the name of each parameter, and of each tensor of a checkpoint, that belongs to an adapter."""


def add_adapters(chunks: list[Any], provider: Any, config: RunConfig) -> None:
    """Freeze the modules' weights and give every target its adapter: A random, B zero.

    Collective: replicas start from the same A. Raises LayoutError for a chunk that gets none.
    """
    # can be imported only once model.load_bridge has prepared for it
    from megatron.bridge.peft import utils
    from megatron.bridge.peft.lora import LoRA

    # Megatron-Bridge 0.6.2 (peft/utils.py, GroupedExpertLinearAdapter) gives adapters of experts to
    # Transformer Engine's FP8 product by private arguments, which 2.20.2 has otherwise: a step would end in
    # ValueError. They multiply in bf16, as all other adapters do. tests/gpu_emulated/test_lora.py fails when
    # this is needed no more.
    utils.HAVE_TE_PYTORCH_GROUPED_LINEAR_AUTOGRAD = False
    settings = config.actor.lora
    assert settings is not None
    lora = LoRA(
        target_modules=lora_targets(provider, config),
        dim=settings.rank,
        alpha=settings.alpha,
        dropout=settings.dropout,
        share_expert_adapters=False,
        # Else an adapter is given the norm's output of all ranks' tokens, and the gradient that comes back
        # through it is lost: Transformer Engine 2.20.2 adds it to the input's only where a rank's own tokens
        # were given (module/layernorm_linear.py, backward). tests/gpu_emulated/test_lora_layouts.py.
        sequence_parallel_input_regather=True,
    )
    lora(chunks)
    for chunk in chunks:
        _check_trains(chunk, lora.target_modules)
        _draw_experts_anew(chunk)
        for parameter in chunk.parameters():
            if parameter.requires_grad:
                _same_on_replicas(parameter)
        if provider.recompute_granularity == "selective" and chunk.pre_process:
            # A module that is computed again gets its gradient only if its input asks for one, and the output
            # of a frozen embedding does not. For whole layers Megatron-Bridge sees to it (peft/recompute.py).
            chunk.embedding.register_forward_hook(lambda module, arguments, output: output.requires_grad_())


def _check_trains(chunk: Any, targets: list[str]) -> None:
    """Raises LayoutError unless something of the chunk is trained: megatron-core's pipeline passes gradients
    through all chunks, and its optimizer cannot be saved where it has nothing."""
    if not any(parameter.requires_grad for parameter in chunk.parameters()):
        numbers = [layer.layer_number for layer in chunk.decoder.layers]  # from 1
        raise LayoutError(
            f"layout: no layer of {min(numbers)} to {max(numbers)}, which are one stage of the pipeline, has "
            f"{' or '.join(targets)} for actor.lora; set a smaller layout.pipeline, or name linear_fc1 or "
            "linear_fc2 in actor.lora.targets"
        )


def _draw_experts_anew(chunk: Any) -> None:
    """Each expert's A as that of any other matrix: Megatron-Bridge draws those of a rank as one tensor, whose
    spread follows from how many there are (peft/utils.py, GroupedExpertLinearAdapter)."""
    for name, parameter in chunk.named_parameters():
        if name.endswith("adapter.linear_in.weight") and parameter.dim() == 3:
            for matrix in parameter.data:
                torch.nn.init.xavier_normal_(matrix)


def _same_on_replicas(parameter: torch.nn.Parameter) -> None:
    if getattr(parameter, "allreduce", True):
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    else:
        group = parallel_state.get_expert_data_parallel_group()
    dist.broadcast(parameter.data, group=group, group_src=0)


def _adapters(chunks: list[Any]) -> Iterator[Any]:
    return (module.adapter for chunk in chunks for module in chunk.modules() if hasattr(module, "to_wrap"))


@contextlib.contextmanager
def without_dropout(chunks: list[Any]) -> Iterator[None]:
    """Within it the policy is the one that engines sample from."""
    for adapter in _adapters(chunks):
        adapter.dropout.eval()
    try:
        yield
    finally:
        for adapter in _adapters(chunks):
            adapter.dropout.train()


def description(chunks: list[Any]) -> dict[str, int] | None:
    """What adapters must have in common with a checkpoint's, beside their shapes; None: there are none."""
    adapter = next(_adapters(chunks), None)
    return None if adapter is None else {"rank": adapter.dim, "alpha": adapter.alpha}


def adapters_alone(state: dict[str, Any]) -> dict[str, Any]:
    """Those entries of a module's state that belong to adapters; of one without adapters, all."""
    adapters = {name: value for name, value in state.items() if ADAPTER in name}
    return adapters or state
