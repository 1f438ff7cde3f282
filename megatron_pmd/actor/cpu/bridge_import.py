"""Importing Megatron-Bridge 0.6.2 where there is no Transformer Engine."""

from __future__ import annotations

import importlib
import sys
import types
from importlib.machinery import ModuleSpec

import torch

TE_CLASSES = (
    "DotProductAttention",
    "GroupedLinear",
    "LayerNorm",
    "LayerNormLinear",
    "Linear",
    "RMSNorm",
    "TransformerLayer",
)
# megatron-core decides at import whether TE exists; it must have decided before the stand-in below appears
CORE_MODULES = (
    "megatron.core.models.gpt",
    "megatron.core.optimizer",
    "megatron.core.distributed",
    "megatron.core.dist_checkpointing",
    "megatron.core.transformer.multi_latent_attention",
)


def import_bridge() -> None:
    """Import megatron.bridge with a short-lived, empty transformer_engine.

    megatron/bridge/peft/utils.py imports transformer_engine.pytorch unconditionally, to name its classes.
    """
    for name in CORE_MODULES:
        importlib.import_module(name)
    engine, pytorch = types.ModuleType("transformer_engine"), types.ModuleType("transformer_engine.pytorch")
    for module in (engine, pytorch):
        module.__spec__ = ModuleSpec(module.__name__, None)
        module.__path__ = []
    engine.__version__ = "2.20.2"
    engine.pytorch = pytorch
    for name in TE_CLASSES:
        setattr(pytorch, name, type(name, (torch.nn.Module,), {}))
    pytorch.ops = types.SimpleNamespace(Sequential=torch.nn.Sequential)
    sys.modules.update({"transformer_engine": engine, "transformer_engine.pytorch": pytorch})
    try:
        importlib.import_module("megatron.bridge")
    finally:
        for name in [n for n in sys.modules if n.split(".")[0] == "transformer_engine"]:
            del sys.modules[name]
    classes_with_adapters()


def classes_with_adapters() -> None:
    """Let Megatron-Bridge's adapters know the modules that stand in Transformer Engine's place.

    megatron/bridge/peft/utils.py, get_adapter_attributes_from_linear, asks a linear's class how it is
    sharded, and refuses what it does not know. tests/actor/test_lora.py fails when it needs no help.
    """
    from megatron.bridge.peft import utils

    from megatron_pmd.actor.cpu import modules

    utils.HAVE_TE = True
    utils.TELayerNormColumnParallelLinear = modules.TELayerNormColumnParallelLinear
    utils.TECL = (modules.TELayerNormColumnParallelLinear, modules.TEColumnParallelGroupedLinear)
    utils.TERL = (modules.TERowParallelGroupedLinear,)
    utils.TELinear = modules.TELinear
