"""Reading a conversion back: every tensor's bytes in both directions, and the logits of both models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import torch

from megatron_pmd.actor import parameters
from megatron_pmd.convert import precision, reference
from megatron_pmd.convert.parts import progress
from megatron_pmd.convert.sharded import ShardedReader
from megatron_pmd.distributed import Control
from megatron_pmd.errors import CheckpointError, ModelError
from megatron_pmd.hugging_face import TensorFiles, bytes_of

LARGEST_LOGIT_DIFFERENCE = 1e-4
"""Between the two models in fp32."""
PROMPT_TOKENS = 32


def verify(
    folder: Path,
    checkpoint: Path,
    control: Control,
    *,
    dtype: precision.Precision | None = None,
) -> dict[str, Any]:
    """Compare a Hugging Face folder with a checkpoint of the same model; what was compared. Collective.

    dtype: what the folder was asked to hold.
    Raises CheckpointError naming a tensor that differs, or the difference of the logits.
    """
    model = compare_tensors(folder, checkpoint, control, dtype)
    result = {"tensors": sum(len(p.tensor_names) for p in model.parameters)}
    logits = control.on_driver(lambda: compare_logits(folder, checkpoint, model))
    return {**result, "logits": control.from_driver(logits)}


def compare_tensors(
    folder: Path,
    checkpoint: Path,
    control: Control,
    dtype: precision.Precision | None,
) -> parameters.Model:
    """Every parameter made again of the folder's tensors, every tensor again of the parameter, bit for bit.

    Where a conversion narrows the dtype, the wider side is narrowed before it is compared.
    """
    files, reader = TensorFiles(folder), ShardedReader(checkpoint)
    model = parameters.model_of(folder, reader.tensors)
    mine = model.parameters[control.rank :: control.world]

    def compare_share() -> None:
        sizes = [parameter.elements * reader.dtype(parameter).itemsize for parameter in mine]
        with progress("verifying", sum(sizes), shown=control.is_driver) as advance:
            for parameter, size in zip(mine, sizes, strict=True):
                _compare(parameter, files, reader, dtype)
                advance(size)

    control.on_all(compare_share)
    return model


def _compare(
    parameter: parameters.Parameter,
    files: TensorFiles,
    reader: ShardedReader,
    dtype: precision.Precision | None,
) -> None:
    saved = reader.read(parameter)
    plain = {name: precision.plain(name, files) for name in parameter.tensor_names}
    widths = {tensor.dtype.itemsize for tensor in plain.values()}
    quantized = any(files.tensors[name].dtype in precision.READ_AS_BF16 for name in plain)
    if min(widths) >= saved.dtype.itemsize and not (quantized and dtype):
        merged = parameter.merge({name: tensor.to(saved.dtype) for name, tensor in plain.items()})
        if bytes_of(merged) != bytes_of(saved):
            raise CheckpointError(f"{reader.folder}: {parameter.name} is not what {files.folder} makes it")
    if max(widths) > saved.dtype.itemsize or (quantized and not dtype):
        return  # the folder holds more than the checkpoint: it cannot come out of it again
    for name, tensor in parameter.split(saved).items():
        for stored, again in precision.stored(name, tensor.to(plain[name].dtype), dtype):
            if bytes_of(again) != bytes_of(files.get(stored)):
                raise CheckpointError(f"{files.folder}: tensor {stored} is not what {reader.folder} makes it")


def compare_logits(folder: Path, checkpoint: Path, model: parameters.Model) -> Any:
    """The largest difference of the logits of a fixed prompt, in fp32; or why they were not compared.

    Where a conversion narrows the dtype, both sides compute with the narrower weights.
    Raises CheckpointError when it is above LARGEST_LOGIT_DIFFERENCE.
    """
    needed = 4.5 * sum(p.elements for p in model.parameters)  # fp32, and room for the largest tensors
    available = psutil.virtual_memory().available
    if needed > available:
        return f"not compared: {needed / 1e9:.1f} GB of memory needed, {available / 1e9:.1f} available"
    files, reader = TensorFiles(folder), ShardedReader(checkpoint)
    if any(tensor.dtype in precision.READ_AS_BF16 for tensor in files.tensors.values()):
        return "not compared: transformers runs FP8 on GPUs only, and MXFP4 with kernels of its own"

    def read(parameter: parameters.Parameter) -> torch.Tensor:
        saved = reader.read(parameter)
        held = precision.plain_dtype(parameter.tensor_names[0], files)
        return saved.to(held) if held.itemsize < saved.dtype.itemsize else saved

    try:
        tokens, ours = parameters.logits(folder, model, _tokens, read)
    except ModelError as error:
        return f"not compared: {error}"
    first = model.parameters[0]
    saved, held = reader.dtype(first), precision.plain_dtype(first.tensor_names[0], files)
    theirs = reference.logits(
        folder, tokens.tolist(), rounded_to=saved if saved.itemsize < held.itemsize else None
    )
    difference = float((ours - theirs).abs().max())
    if not difference <= LARGEST_LOGIT_DIFFERENCE:
        raise CheckpointError(
            f"the logits of {folder} and {checkpoint} differ by {difference:.2g} in fp32, "
            f"more than {LARGEST_LOGIT_DIFFERENCE:g}"
        )
    return difference


def _tokens(vocabulary: int) -> torch.Tensor:
    """The fixed prompt: tokens from all over the vocabulary."""
    return torch.linspace(0, vocabulary - 1, PROMPT_TOKENS).long().roll(PROMPT_TOKENS // 3)
