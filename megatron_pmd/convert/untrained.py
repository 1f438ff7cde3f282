"""Layers that predict further tokens: no part of the policy, but part of its folder.

DeepSeek, GLM and Hy3 number them behind the policy's layers, Qwen and K-EXAONE name them `mtp`.

A conversion and a run's export carry them from folder to folder as they are. They are never trained.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_pmd.actor.model import predicts_further_tokens
from megatron_pmd.convert import precision
from megatron_pmd.files import read_object
from megatron_pmd.fp8 import is_scale
from megatron_pmd.hugging_face import INDEX, ShardWriter, TensorFiles

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


def _names(names: Iterable[str], folder: Path) -> list[str]:
    """Those of these layers. Numbered ones are as many as config.json says: a tensor behind is a mistake."""
    described = read_object(folder / "config.json") or {}
    layers, further = (described.get(key) or 0 for key in ("num_hidden_layers", "num_nextn_predict_layers"))
    return sorted(name for name in names if predicts_further_tokens(name, layers, further))


def untrained(files: TensorFiles) -> list[Untrained]:
    """A folder's tensors of these layers."""
    own = _names(files.tensors, files.folder)
    return [Untrained(name, files) for name in own if not is_scale(name, files.tensors)]


def untrained_of(folder: Path) -> list[Untrained]:
    """The same of a folder that may lack weights: they are looked at unless its index names none of these."""
    index = read_object(folder / INDEX)
    if index is not None and not _names(index.get("weight_map") or (), folder):
        return []
    return untrained(TensorFiles(folder))


def write_untrained(tensors: list[Untrained], folder: Path) -> None:
    """Into a file of their own beside a checkpoint's configuration, where untrained_of finds them."""
    if tensors:
        with ShardWriter(folder / FILE, [tensor.name for tensor in tensors]) as file:
            for tensor in tensors:
                file.add(tensor.name, tensor.read())


def sources(tensors: list[Untrained]) -> dict[str, str]:
    """For a manifest: each of them, and the folder it comes from."""
    return {tensor.name: str(tensor.files.folder.resolve()) for tensor in tensors}
