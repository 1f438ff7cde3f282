"""In which dtype a Hugging Face folder holds a tensor: bf16, fp32, or FP8 in blocks; and its way back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch

from megatron_pmd.errors import ModelError
from megatron_pmd.fp8 import SCALE_SUFFIX, dequantize, is_quantized, quantized
from megatron_pmd.hugging_face import DTYPES, MXFP4, TensorFiles

Precision = Literal["bf16", "fp32", "fp8"]
READ_AS_BF16 = ("F8_E4M3", MXFP4)
"""Dtypes of a folder's tensors."""
TORCH = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp8": torch.bfloat16}
"""fp8: of the tensors that are not quantised."""
KEPT_FP32 = "e_score_correction_bias"
"""The end of a name: DeepSeek's expert bias, which every program keeps in fp32."""


def dtype_of(name: str, held: torch.dtype, asked: Precision | None) -> torch.dtype:
    """The dtype a tensor is given before it is quantised, if it is; held: what it has."""
    if asked is None:
        return held
    return torch.float32 if name.endswith(KEPT_FP32) else TORCH[asked]


def stored(name: str, tensor: torch.Tensor, asked: Precision | None) -> Iterator[tuple[str, torch.Tensor]]:
    """What a folder of the precision asked for holds of a tensor: itself, or FP8 values and scales."""
    tensor = tensor.to(dtype_of(name, tensor.dtype, asked))
    if asked != "fp8":
        yield name, tensor
        return
    yield from quantized([(name, tensor)])


def stored_names(name: str, asked: Precision | None) -> list[str]:
    """The names of what `stored` gives."""
    return [name, name + SCALE_SUFFIX] if asked == "fp8" and is_quantized(name) else [name]


def stored_bytes(name: str, elements: int, held: torch.dtype, asked: Precision | None) -> int:
    """What `stored` gives takes about so many bytes (the scales of FP8, 1 part in 4,096, are not counted)."""
    if asked == "fp8" and is_quantized(name):
        return elements
    return elements * dtype_of(name, held, asked).itemsize


def plain_dtype(name: str, files: TensorFiles) -> torch.dtype:
    """The dtype that `plain` gives.

    Raises ModelError for a tensor that is missing, or quantised in a way that is not known here.
    """
    if name not in files.tensors:
        raise ModelError(f"{files.folder}: tensor {name} is missing")
    dtype = files.tensors[name].dtype
    if dtype == MXFP4 or (dtype == "F8_E4M3" and name + SCALE_SUFFIX in files.tensors):
        return torch.bfloat16
    if dtype not in ("F32", "BF16", "F16"):
        raise ModelError(
            f"{files.folder}: tensor {name} is {dtype}; fp32, bf16, fp16, FP8 in blocks and MXFP4 can be "
            "converted"
        )
    return DTYPES[dtype]


def plain(name: str, files: TensorFiles) -> torch.Tensor:
    """A folder's tensor as it is meant: bf16 where it is held as FP8 or MXFP4."""
    dtype = plain_dtype(name, files)
    tensor = files.get(name)
    if tensor.dtype is torch.float8_e4m3fn:
        return dequantize(tensor, files.get(name + SCALE_SUFFIX)).to(dtype)
    return tensor
