"""One rank's part of a model in megatron-core and Transformer Engine, as described, with no weights.

The layout is the recipe's, all of it: torch's fake process groups stand for its ranks, up to 512.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_pmd.actor import model, parallel
from megatron_pmd.config import Layout, RunConfig

MAKERS = (
    torch.empty,
    torch.zeros,
    torch.ones,
    torch.full,
    torch.rand,
    torch.randn,
    torch.arange,
    torch.tensor,
)

DIVIDED = {"column": ("weight", "bias"), "row": ("weight",)}
"""Transformer Engine's words for a layer -> its parameters of which each tensor-parallel rank has a share."""


class OnMeta(TorchFunctionMode):
    """Whatever would be made on a device, is made on meta; what would go to one stays."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if "device" in kwargs or func in MAKERS:
            kwargs["device"] = "meta"
        return args[0] if func is torch.Tensor.cuda else func(*args, **kwargs)


@contextmanager
def as_rank(rank: int, layout: Layout) -> Iterator[None]:
    """This process as that rank of the whole layout: parallel.initialize, over groups that send nothing."""
    distributed: Any = dist
    real = distributed.new_group
    dist.init_process_group("fake", rank=rank, world_size=layout.ranks, store=FakeStore())

    def fake(ranks: Any = None, **options: Any) -> Any:
        return real(ranks, **{name: options[name] for name in ("group_desc", "timeout") if name in options})

    distributed.new_group = fake
    try:
        parallel.form_groups(layout, seed=0, timeout_seconds=600)
        yield
    finally:
        distributed.new_group = real
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def stage_of(config: RunConfig) -> tuple[Any, Any, torch.nn.Module]:
    """(bridge, TransformerConfig, GPTModel) of this rank, as model.build makes them, on meta."""
    bridge = model.load_bridge(Path(config.model.path))
    provider = model.provider_for(bridge, config)
    provider.init_model_with_meta_device, provider.perform_initialization = True, False
    with OnMeta():
        stage = provider.provide(
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
        )
    return bridge, provider, stage


def parameters_of_stage(stage: torch.nn.Module, layout: Layout) -> int:
    """Of all the ranks that share out a pipeline stage, by how each layer says that it is divided."""
    total = 0
    for path, module in stage.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            divided = getattr(parameter, "tensor_model_parallel", False) or name in DIVIDED.get(
                str(getattr(module, "parallel_mode", None)), ()
            )
            shares = layout.tensor if divided else 1
            if ".experts." in path:
                shares = layout.expert * layout.experts_tensor
            total += parameter.numel() * shares
    return total


def is_of_transformer_engine(module: torch.nn.Module) -> bool:
    """Whether a module's kernels are Transformer Engine's."""
    engine: Any = importlib.import_module("transformer_engine.pytorch")
    kinds = (engine.Linear, engine.LayerNormLinear, engine.GroupedLinear, engine.RMSNorm, engine.LayerNorm)
    return isinstance(module, (*kinds, engine.DotProductAttention))
