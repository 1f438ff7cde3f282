"""Two checkpoints compared tensor by tensor, each a Hugging Face folder or in megatron-core's format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from megatron_pmd.actor.parameters import model_of
from megatron_pmd.convert import precision
from megatron_pmd.convert.sharded import ShardedReader
from megatron_pmd.convert.untrained import untrained_of
from megatron_pmd.errors import CheckpointError
from megatron_pmd.fp8 import is_scale
from megatron_pmd.hugging_face import TensorFiles, bytes_of


class Side(Protocol):
    """A checkpoint's tensors under their Hugging Face names."""

    names: list[str]

    def get(self, name: str) -> torch.Tensor: ...


class _Folder:
    def __init__(self, folder: Path) -> None:
        self._files = TensorFiles(folder)
        self.names = [name for name in self._files.tensors if not is_scale(name, self._files.tensors)]

    def get(self, name: str) -> torch.Tensor:
        return precision.plain(name, self._files)


class _Checkpoint:
    def __init__(self, folder: Path, config_folder: Path) -> None:
        self._reader = ShardedReader(folder)
        self._parameters = model_of(config_folder, self._reader.tensors).by_tensor()
        self._untrained = {tensor.name: tensor for tensor in untrained_of(config_folder)}
        self.names = [*self._parameters, *self._untrained]
        self._last: dict[str, torch.Tensor] = {}

    def get(self, name: str) -> torch.Tensor:
        if name in self._untrained:
            return self._untrained[name].read()
        if name not in self._last:  # a parameter's tensors follow each other: it is read once
            parameter = self._parameters[name]
            self._last = parameter.split(self._reader.read(parameter))
        return self._last[name]


def open_side(path: Path, config_folder: Path) -> Side:
    """Raises CheckpointError for a folder that holds neither kind."""
    if (path / ".metadata").is_file():
        return _Checkpoint(path, config_folder)
    if list(path.glob("*.safetensors")):
        return _Folder(path)
    raise CheckpointError(f"{path}: neither a checkpoint (.metadata) nor a model folder (*.safetensors)")


@dataclass(frozen=True)
class Difference:
    """One tensor that is not the same on both sides, and how."""

    name: str
    what: str


def compare(first: Side, second: Side) -> tuple[int, list[Difference]]:
    """How many tensors are the same bit for bit, and all others."""
    same, differences = 0, []
    there = set(second.names)
    for name in first.names:
        if name not in there:
            differences.append(Difference(name, "only in the first"))
            continue
        what = _compare(first.get(name), second.get(name))
        if what is None:
            same += 1
        else:
            differences.append(Difference(name, what))
    only = sorted(there - set(first.names))
    return same, [*differences, *(Difference(name, "only in the second") for name in only)]


def _compare(first: torch.Tensor, second: torch.Tensor) -> str | None:
    if first.shape != second.shape:
        return f"shape {list(first.shape)} and {list(second.shape)}"
    if first.dtype == second.dtype and bytes_of(first) == bytes_of(second):
        return None
    dtypes = (
        "" if first.dtype == second.dtype else f"{first.dtype} and {second.dtype}, ".replace("torch.", "")
    )
    apart = (first.float() - second.float()).abs()
    share = float((apart != 0).float().mean())
    scale = float(first.float().abs().max())
    return (
        f"{dtypes}max |a − b| {float(apart.max()):.3g} (max |a| {scale:.3g}), {share:.1%} of elements differ"
    )
