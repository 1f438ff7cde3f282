"""Adapters as a folder that the library peft loads over the Hugging Face model, during training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from megatron_pmd.config import Lora
from megatron_pmd.convert.parts import writing
from megatron_pmd.distributed import Control
from megatron_pmd.files import write_whole
from megatron_pmd.hugging_face import ShardWriter

EXPERT = ".experts."
"""In the name of each layer of one expert."""
LOST = (
    "peft 0.21.2 loads no adapters of experts from it: it needs those of linear_fc2 beside those of "
    "linear_fc1; use the merged folder, or train both"
)
"""tests/actor/test_lora.py fails when this is true no more."""
SHARED = {"shared_mlp": "shared_experts"}
"""Hy3's shared experts, in its files and in transformers 5."""


def write_adapters(
    tensors: Iterable[tuple[str, torch.Tensor]], lora: Lora, model_folder: Path, out: Path, control: Control
) -> str:
    """Write exported adapters as `out`, which appears complete. All ranks iterate, the driver writes.

    tensors: by Megatron-Bridge's names, those of the Hugging Face model's. An earlier `out` is replaced.
    Returns what peft loses of them, for the user, or nothing.
    Raises CheckpointError on all ranks when it cannot be written.
    """
    waiting = iter(tensors)

    def take_part() -> str:
        try:
            if not control.is_driver:
                return ""
            return _write({name: tensor.detach().cpu() for name, tensor in waiting}, lora, model_folder, out)
        finally:
            # every rank takes part in gathering each tensor, also after the driver failed
            for _ in waiting:
                pass

    return "".join(control.on_all(take_part))


def _write(tensors: dict[str, torch.Tensor], lora: Lora, model_folder: Path, out: Path) -> str:
    # can be imported only once model.load_bridge has prepared for it
    from megatron.bridge.models.conversion import peft_bridge
    from megatron.bridge.models.conversion.model_bridge import HFWeightTuple

    state, modules, parameters = peft_bridge.convert_adapter_weights_to_peft_state(
        HFWeightTuple(name, tensor) for name, tensor in tensors.items()
    )
    adapted = {name.partition(".lora_")[0] for name in modules}
    experts = {name for name in adapted if EXPERT in name}
    layers = {name.rpartition(".")[2] for name in experts}
    # peft has no dropout beside experts, and would refuse to load them with it
    dropout = 0.0 if experts else lora.dropout
    settings = peft_bridge.build_adapter_config_dict(
        SimpleNamespace(dim=lora.rank, alpha=lora.alpha, dropout=dropout),
        target_modules=peft_bridge.infer_target_modules_from_adapter_weights(modules),
        target_parameters=parameters,
        base_model_name_or_path=str(model_folder.resolve()),
    ) | _beside_experts(adapted - experts, experts, layers, lora)
    partial = out.with_name(out.name + ".partial")
    with writing(out.parent, "the run can be resumed"):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        with ShardWriter(partial / "adapter_model.safetensors", state) as file:
            for name, tensor in state.items():
                file.add(name, tensor.contiguous())
        write_whole(partial / "adapter_config.json", json.dumps(settings, indent=1) + "\n")
        shutil.rmtree(out, ignore_errors=True)
        partial.rename(out)
    return LOST if layers and layers.isdisjoint({"down_proj", "w2"}) else ""


def _beside_experts(adapted: set[str], experts: set[str], layers: set[str], lora: Lora) -> dict[str, Any]:
    """Settings by which peft loads all adapters of a model whose experts are not its only feed-forward parts.
    Empty for any other model.

    experts: names of their adapted layers, which end in `layers`. adapted: of all else.

    peft 0.21.2 (utils/transformers_weight_conversion.py) takes every target module with the name of an
    expert's layer, as gate_proj, for one of experts where transformers 5 has these in one tensor: adapters of
    dense layers and of shared experts would be dropped. Named as parameters they are kept. Of families that
    are not in its list it drops those of the experts, unless their tensors are named.
    tests/actor/test_lora.py fails when this is needed no more.
    """
    others = {tuple(name.split(".")[-2:]) for name in adapted}
    like_experts = {(SHARED.get(part, part), layer) for part, layer in others if layer in layers}
    if not like_experts:
        return {}
    modules = {layer for _, layer in others if layer not in layers}
    modules |= {EXPERT.lstrip(".") + name.partition(EXPERT)[2] for name in experts}
    parameters = {f"{part}.{layer}.weight" for part, layer in like_experts}
    # one tensor for the gate and the up-projection: A has the rows of both
    fused = r".*\.gate_up_proj" if "gate_proj" in layers else None
    parameters |= {"experts.gate_up_proj"} if fused else set()
    parameters |= {"experts.down_proj"} if "down_proj" in layers else set()
    return {
        "target_modules": sorted(modules),
        "target_parameters": sorted(parameters),
        "rank_pattern": {fused: 2 * lora.rank} if fused else {},
        "alpha_pattern": {fused: 2 * lora.alpha} if fused else {},
    }
