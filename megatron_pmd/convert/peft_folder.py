"""Adapters as a folder that the library peft loads over the Hugging Face model, during training."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import torch

from megatron_pmd.config import Lora
from megatron_pmd.convert.parts import writing
from megatron_pmd.distributed import Control
from megatron_pmd.files import write_whole
from megatron_pmd.hugging_face import ShardWriter


def write_adapters(
    tensors: Iterable[tuple[str, torch.Tensor]], lora: Lora, model_folder: Path, out: Path, control: Control
) -> None:
    """Write exported adapters as `out`, which appears complete. All ranks iterate, the driver writes.

    tensors: by Megatron-Bridge's names, those of the Hugging Face model's. An earlier `out` is replaced.
    Raises CheckpointError on all ranks when it cannot be written.
    """
    waiting = iter(tensors)

    def take_part() -> None:
        try:
            if control.is_driver:
                _write({name: tensor.detach().cpu() for name, tensor in waiting}, lora, model_folder, out)
        finally:
            # every rank takes part in gathering each tensor, also after the driver failed
            for _ in waiting:
                pass

    control.on_all(take_part)


def _write(tensors: dict[str, torch.Tensor], lora: Lora, model_folder: Path, out: Path) -> None:
    # can be imported only once model.load_bridge has prepared for it
    from megatron.bridge.models.conversion import peft_bridge
    from megatron.bridge.models.conversion.model_bridge import HFWeightTuple

    state, modules, parameters = peft_bridge.convert_adapter_weights_to_peft_state(
        HFWeightTuple(name, tensor) for name, tensor in tensors.items()
    )
    settings = peft_bridge.build_adapter_config_dict(
        SimpleNamespace(dim=lora.rank, alpha=lora.alpha, dropout=lora.dropout),
        target_modules=peft_bridge.infer_target_modules_from_adapter_weights(modules),
        target_parameters=parameters,
        base_model_name_or_path=str(model_folder.resolve()),
    )
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
