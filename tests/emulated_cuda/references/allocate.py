"""What a quantised tensor consists of, allocated or fitted to its quantizer.

Answers create_tensor, convert_and_update_tensor and get_scale_shape of the quantizers in csrc/quantizer.cpp,
on Hopper: its FP8 GEMM takes rows only, so what is read by columns is kept transposed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .registry import NoReferenceError, reference

BLOCK = 128
"""Elements under one scale, of Float8BlockQuantizer: 1 x 128 or 128 x 128."""
MX_BLOCK = 32
"""Elements under one scale, of MXFP8Quantizer."""

Allocate = Callable[[Sequence[int], torch.dtype], Tensor]


def kind(quantizer: Any) -> str:
    """The quantizer's class by name, with Hybrid, custom and NVFP4 ones refused."""
    name: str = type(quantizer).__name__
    if name not in {
        "Float8Quantizer",
        "Float8CurrentScalingQuantizer",
        "Float8BlockQuantizer",
        "MXFP8Quantizer",
    }:
        raise NoReferenceError(f"The emulated device has no reference for quantising with {name}")
    return name


def rows_and_columns(shape: Sequence[int]) -> tuple[int, int]:
    """All dimensions but the last as one, and the last."""
    return (math.prod(shape[:-1]), shape[-1]) if len(shape) else (1, 1)


def transposed(shape: Sequence[int]) -> list[int]:
    """Of a matrix whose rows are all dimensions but the last."""
    return [*shape[-1:], *shape[:-1]]


def restored(shape: Sequence[int]) -> list[int]:
    """The inverse of transposed."""
    return [*shape[1:], *shape[:1]]


def multiple(number: int, of: int) -> int:
    """The least multiple that is not below the number."""
    return -(-number // of) * of


def block_scales(shape: Sequence[int], dims: int, columnwise: bool) -> tuple[int, int]:
    """Shape of the fp32 scales of Float8BlockQuantizer; those of vectors lie as the GEMM reads them."""
    rows, columns = rows_and_columns(shape)
    if columnwise:
        rows, columns = columns, rows
    if dims == 2:
        return -(-rows // BLOCK), multiple(-(-columns // BLOCK), 4)
    return -(-columns // BLOCK), multiple(rows, 4)


def mx_scales(shape: Sequence[int], columnwise: bool) -> tuple[int, int]:
    """Shape of the E8M0 scales of MXFP8Quantizer, padded to the GEMM's tiles."""
    rows, columns = rows_and_columns(shape)
    if rows % MX_BLOCK or columns % MX_BLOCK:
        raise RuntimeError(
            f"MXFP8 requires tensor dims that are divisible by {MX_BLOCK} (got shape={list(shape)})"
        )
    if columnwise:
        return multiple(rows // MX_BLOCK, 4), multiple(columns, 128)
    return multiple(rows, 128), multiple(columns // MX_BLOCK, 4)


def _per_tensor_buffers(quantizer: Any, shape: Sequence[int], allocate: Allocate) -> dict[str, Any]:
    return {
        "data": allocate(shape, torch.uint8) if quantizer.rowwise_usage else None,
        "data_transpose": allocate(transposed(shape), torch.uint8) if quantizer.columnwise_usage else None,
        "fp8_scale_inv": allocate([1], torch.float32),
    }


def _buffer_shapes(quantizer: Any, shape: Sequence[int]) -> dict[str, tuple[Sequence[int], torch.dtype]]:
    """Name -> shape and type of the buffers that the quantizer wants, of a format with a scale per block."""
    if kind(quantizer) == "MXFP8Quantizer":
        along = {"rowwise": shape, "columnwise": shape}
        scales = {name: mx_scales(shape, name == "columnwise") for name in along}
        scale_type = torch.uint8
    else:
        along = {"rowwise": shape, "columnwise": transposed(shape)}
        dims = quantizer.block_scaling_dim
        scales = {name: block_scales(shape, dims, name == "columnwise") for name in along}
        scale_type = torch.float32
    wanted = {"rowwise": quantizer.rowwise_usage, "columnwise": quantizer.columnwise_usage}
    return {
        f"{name}_{part}": description
        for name in along
        if wanted[name]
        for part, description in (
            ("data", (along[name], torch.uint8)),
            ("scale_inv", (scales[name], scale_type)),
        )
    }


BLOCK_BUFFERS = ("rowwise_data", "rowwise_scale_inv", "columnwise_data", "columnwise_scale_inv")


def empty(
    quantizer: Any,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    pin_memory: bool = False,
) -> Any:
    """The quantizer's create_tensor: a Tensor, or a Storage if it is internal; dtype is what it poses as."""

    def allocate(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(list(shape), dtype=dtype, device=device, pin_memory=pin_memory)

    if quantizer is None:
        return allocate(shape, dtype)
    if kind(quantizer) in {"Float8Quantizer", "Float8CurrentScalingQuantizer"}:
        return assemble(
            quantizer,
            shape,
            dtype,
            device,
            _per_tensor_buffers(quantizer, shape, allocate),
            internal=quantizer.internal,
        )
    buffers = {name: allocate(*description) for name, description in _buffer_shapes(quantizer, shape).items()}
    return assemble(quantizer, shape, dtype, device, buffers, internal=quantizer.internal)


def assemble(
    quantizer: Any,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    buffers: dict[str, Any],
    *,
    internal: bool,
) -> Any:
    """The Python object of a quantised tensor with these buffers: a Storage if internal, else a Tensor."""
    from transformer_engine.pytorch import tensor as tensors
    from transformer_engine.pytorch.constants import DType
    from transformer_engine.pytorch.tensor import storage

    name = kind(quantizer)
    if name in {"Float8Quantizer", "Float8CurrentScalingQuantizer"}:
        classes = storage.float8_tensor_storage.Float8TensorStorage, tensors.Float8Tensor
        special: dict[str, Any] = {}
    elif name == "MXFP8Quantizer":
        classes = storage.mxfp8_tensor_storage.MXFP8TensorStorage, tensors.MXFP8Tensor
        special = {"with_gemm_swizzled_scales": quantizer.optimize_for_gemm}
    else:
        classes = (
            storage.float8_blockwise_tensor_storage.Float8BlockwiseQTensorStorage,
            tensors.Float8BlockwiseQTensor,
        )
        special = {"is_2D_scaled": quantizer.block_scaling_dim == 2}
    if "fp8_scale_inv" not in buffers:
        buffers = {part: buffers.get(part) for part in BLOCK_BUFFERS}
    special |= buffers | {"fp8_dtype": DType(int(quantizer.dtype)), "quantizer": quantizer}
    if internal:
        return classes[0](**special, fake_dtype=dtype)
    stride = torch.empty(list(shape), device="meta").stride()
    return classes[1](**special, shape=list(shape), stride=stride, dtype=dtype, device=device)


def fit(quantizer: Any, target: Any) -> Any:
    """The quantizer's convert_and_update_tensor: buffers that it does not want go, missing ones come."""
    from transformer_engine.pytorch.constants import DType

    name = kind(quantizer)
    if name in {"Float8Quantizer", "Float8CurrentScalingQuantizer"}:
        _fit_per_tensor(quantizer, target)
        target._fp8_dtype = DType(int(quantizer.dtype))
        return target
    shape = shape_of(target)
    device = device_of(target)
    wanted = _buffer_shapes(quantizer, shape)
    for part in BLOCK_BUFFERS:
        if part not in wanted:
            setattr(target, f"_{part}", None)
        elif getattr(target, f"_{part}") is None:
            size, dtype = wanted[part]
            setattr(target, f"_{part}", torch.empty(list(size), dtype=dtype, device=device))
    if name == "MXFP8Quantizer":
        target._fp8_dtype = DType(int(quantizer.dtype))
        target._with_gemm_swizzled_scales = quantizer.optimize_for_gemm
    return target


def _fit_per_tensor(quantizer: Any, target: Any) -> None:
    shape = shape_of(target)
    device = device_of(target)
    wanted = {
        "_data": (quantizer.rowwise_usage, shape),
        "_transpose": (quantizer.columnwise_usage, transposed(shape)),
    }
    if not any(use for use, _ in wanted.values()):
        raise RuntimeError("Invalid quantizer usages.")
    for part, (use, size) in wanted.items():
        if not use:
            setattr(target, part, None)
        elif getattr(target, part) is None:
            setattr(target, part, torch.empty(size, dtype=torch.uint8, device=device))
    target._transpose_invalid = not quantizer.columnwise_usage


def shape_of(target: Any) -> list[int]:
    """Logical shape of a quantised tensor, from the buffers that it has."""
    if hasattr(target, "_scale_inv"):
        rowwise, columnwise, turned = target._data, target._transpose, True
    else:
        rowwise, columnwise = target._rowwise_data, target._columnwise_data
        turned = hasattr(target, "_is_2D_scaled")
    if rowwise is not None:
        return list(rowwise.shape)
    if columnwise is None:
        raise RuntimeError(f"{type(target).__name__} has no data.")
    return restored(columnwise.shape) if turned else list(columnwise.shape)


def device_of(target: Any) -> torch.device:
    """Where the buffers of a quantised tensor are."""
    for part in ("_scale_inv", *(f"_{name}" for name in BLOCK_BUFFERS)):
        if (buffer := getattr(target, part, None)) is not None:
            device: torch.device = buffer.device
            return device
    raise RuntimeError(f"{type(target).__name__} has no data.")


@reference("create_empty_quantized_tensor")
def create_empty_quantized_tensor(
    quantizer: Any, shape: Sequence[int], dtype: torch.dtype, device: torch.device, pin_memory: bool
) -> Any:
    """csrc/extensions/cast.cpp."""
    return empty(quantizer, shape, dtype, device, pin_memory)


@reference("bulk_allocate")
def bulk_allocate(
    shapes: Sequence[Sequence[int]],
    dtypes: Sequence[torch.dtype],
    device: torch.device | None = None,
    alignments: Sequence[int] | None = None,
) -> list[Tensor]:
    """csrc/extensions/allocate.cpp: tensors in one buffer, which lives until the last of them is gone."""
    if not shapes:
        return []
    device = torch.device("cuda") if device is None else device
    steps = [dtype.itemsize for dtype in dtypes] if alignments is None else alignments
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in zip(shapes, dtypes, strict=True)]
    starts, end = [], 0
    for size, step in zip(sizes, steps, strict=True):
        starts.append(multiple(end, step))
        end = starts[-1] + size
    widest = max(steps)
    buffer = torch.empty(end + (widest if widest > 1 else 0), dtype=torch.uint8, device=device)
    skipped = -buffer.data_ptr() % widest
    return [
        buffer[skipped + start : skipped + start + size].view(dtype).view(list(shape))
        if size
        else torch.empty(list(shape), dtype=dtype, device=device)
        for shape, dtype, start, size in zip(shapes, dtypes, starts, sizes, strict=True)
    ]


def empty_in_one_buffer(
    quantizers: Sequence[Any], shapes: Sequence[Sequence[int]], device: torch.device
) -> list[Any]:
    """Storages of one format by blocks: all rows in one buffer, all columns in another, as in split_quantize.

    Whatever their quantizers say, they are internal, and pose as fp32 (bulk_allocate_fp8_blockwise_tensors
    and bulk_allocate_mxfp8_tensors of csrc/extensions/cast.cpp).
    """
    found: list[dict[str, Any]] = [{} for _ in quantizers]
    for way in ("rowwise", "columnwise"):
        parts = [
            (index, name, size, dtype)
            for suffix in ("data", "scale_inv")
            for index, (quantizer, shape) in enumerate(zip(quantizers, shapes, strict=True))
            for name, (size, dtype) in _buffer_shapes(quantizer, shape).items()
            if name == f"{way}_{suffix}"
        ]
        steps = [256 if name.endswith("data") else 16 for _, name, _, _ in parts]
        views = bulk_allocate([part[2] for part in parts], [part[3] for part in parts], device, steps)
        for (index, name, _, _), view in zip(parts, views, strict=True):
            found[index][name] = view
    return [
        assemble(quantizer, shape, torch.float32, device, buffers, internal=True)
        for quantizer, shape, buffers in zip(quantizers, shapes, found, strict=True)
    ]
