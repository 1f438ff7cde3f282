"""Layers that predict further tokens (DeepSeek's, GLM's): no part of the policy, but part of its folder.

A conversion and a run's export carry them from folder to folder as they are. They are never trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_pmd.actor.model import LAYER
from megatron_pmd.convert import precision
from megatron_pmd.files import read_object
from megatron_pmd.fp8 import is_scale
from megatron_pmd.hugging_face import ShardWriter, TensorFiles

FILE = "untrained.safetensors"
"""Beside the configuration in a converted checkpoint."""


@dataclass(frozen=True)
class Untrained:
    """One tensor of these layers, in the folder that it is carried from."""

    name: str
    files: TensorFiles

    @property
    def tensor_names(self) -> list[str]:
        return [self.name]

    @property
    def elements(self) -> int:
        return torch.Size(self.files.tensors[self.name].shape).numel()

    @property
    def dtype(self) -> torch.dtype:
        return precision.plain_dtype(self.name, self.files)

    def read(self) -> torch.Tensor:
        """As the folder has it; bf16 where that is FP8."""
        return precision.plain(self.name, self.files)


def untrained_layers(folder: Path) -> range:
    """Their numbers, behind those of the policy's: what config.json counts as num_nextn_predict_layers."""
    described = read_object(folder / "config.json") or {}
    first = described.get("num_hidden_layers") or 0
    return range(first, first + (described.get("num_nextn_predict_layers") or 0))


def untrained(files: TensorFiles) -> list[Untrained]:
    """A folder's tensors of these layers."""
    layers = untrained_layers(files.folder)
    return [
        Untrained(name, files)
        for name in sorted(files.tensors)
        if (found := LAYER.match(name)) and int(found[1]) in layers and not is_scale(name, files.tensors)
    ]


def untrained_of(folder: Path) -> list[Untrained]:
    """The same of a folder that may lack weights: they are looked at where config.json has such layers."""
    return untrained(TensorFiles(folder)) if untrained_layers(folder) else []


def write_untrained(tensors: list[Untrained], folder: Path) -> None:
    """Into a file of their own beside a checkpoint's configuration, where untrained_of finds them."""
    if tensors:
        with ShardWriter(folder / FILE, [tensor.name for tensor in tensors]) as file:
            for tensor in tensors:
                file.add(tensor.name, tensor.read())


def sources(tensors: list[Untrained]) -> dict[str, str]:
    """For a manifest: each of them, and the folder it comes from."""
    return {tensor.name: str(tensor.files.folder.resolve()) for tensor in tensors}
