"""Values to FP8 and back, for delayed, tensorwise (current), blockwise and MXFP8 scaling.

Answers csrc/extensions/cast.cpp, Quantizer::quantize of csrc/quantizer.cpp, and the kernels below
transformer_engine/common/cast and common/transpose (cast_transpose.cu, quantize_transpose_*_blockwise.cu).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .allocate import (
    BLOCK,
    MX_BLOCK,
    device_of,
    empty,
    empty_in_one_buffer,
    fit,
    kind,
    multiple,
    rows_and_columns,
    shape_of,
)
from .float8 import (
    decode,
    e8m0,
    e8m0_reciprocal,
    e8m0_value,
    encode,
    largest,
    magnitude,
    scale_from_amax,
    torch_type,
)
from .host import fp32, host, on_device
from .registry import NoReferenceError, reference
from .swizzle import swizzled, unswizzled


def is_skipped(noop: Tensor | None) -> bool:
    """Whether the flag says that the kernel shall leave its output as it is."""
    return noop is not None and bool(host(noop).reshape(-1)[0] == 1)


def store(
    values: Tensor, quantizer: Any, target: Any, *, source: torch.dtype, noop: Tensor | None = None
) -> None:
    """Quantizer::quantize: values of the host, in fp32, into the target's buffers.

    source is the type that the kernel reads; a fused kernel quantises its fp32 results themselves, and its
    values are then finer than that.
    """
    name = kind(quantizer)
    skipped = is_skipped(noop)
    if values.numel() == 0 or (skipped and name != "Float8CurrentScalingQuantizer"):
        return
    if name == "Float8Quantizer":
        amax = host(quantizer.amax)
        amax.copy_(torch.maximum(amax, magnitude(values)))
        _store_per_tensor(values, host(quantizer.scale), target, quantizer.dtype)
    elif name == "Float8CurrentScalingQuantizer":
        scale = _current_scale(values, quantizer, target._scale_inv.device)
        if not skipped:
            _store_per_tensor(values, scale, target, quantizer.dtype)
    elif name == "MXFP8Quantizer":
        _store_mx(values, quantizer, target)
    else:
        _store_blocks(values, quantizer, target, torch.finfo(source).max)


def _current_scale(values: Tensor, quantizer: Any, device: torch.device) -> Tensor:
    """[1] of the host.

    One collective per call, whether or not the flag says to skip: another rank may not skip.
    """
    amax = magnitude(values).reshape(1)
    if quantizer.with_amax_reduction:
        group = quantizer._canonicalized_amax_reduction_group()
        shared = on_device(amax, amax.dtype, device)
        torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX, group=group)
        amax = host(shared)
    return scale_from_amax(
        amax,
        largest(quantizer.dtype),
        power_of_two=quantizer.force_pow_2_scales,
        epsilon=quantizer.amax_epsilon,
    )


def _store_per_tensor(values: Tensor, scale: Tensor, target: Any, dtype: Any) -> None:
    if target._data is None:
        # Quantizer::quantize of csrc/quantizer.cpp raises the same: its kernel writes rows in every case.
        raise NotImplementedError(
            "Columnwise-only per-tensor FP8 quantization is not implemented; "
            "the cast-transpose kernel requires rowwise output storage."
        )
    codes = encode(values * scale, dtype)
    _write(target._data, codes)
    if target._transpose is not None and not target._transpose_invalid:
        _write(target._transpose, turned(codes))
    _write(target._scale_inv, scale.reciprocal())


def _write(target: Tensor, values: Tensor) -> None:
    host(target).copy_(values.reshape(target.shape))


def turned(values: Tensor) -> Tensor:
    """[columns, rows] of what is taken for a matrix whose rows are all dimensions but the last."""
    return values.reshape(rows_and_columns(values.shape)).t()


def _padded(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """With zeros up to a multiple of rows and of columns."""
    high, wide = matrix.shape
    return torch.nn.functional.pad(
        matrix, (0, multiple(wide, columns) - wide, 0, multiple(high, rows) - high)
    )


def tiles(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """[tiles down, rows, tiles across, columns] of the padded matrix."""
    padded = _padded(matrix, rows, columns)
    return padded.reshape(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns)


def _store_blocks(values: Tensor, quantizer: Any, target: Any, instead_of_infinity: float) -> None:
    matrix = values.reshape(rows_and_columns(values.shape))
    ways = (
        (matrix, target._rowwise_data, target._rowwise_scale_inv),
        (matrix.t(), target._columnwise_data, target._columnwise_scale_inv),
    )
    high = BLOCK if quantizer.block_scaling_dim == 2 else 1
    for source, data, scale_inv in ways:
        if data is None:
            continue
        blocks = tiles(source, high, BLOCK)
        scale = scale_from_amax(
            magnitude(blocks, (1, 3)),
            largest(quantizer.dtype),
            power_of_two=quantizer.force_pow_2_scales,
            epsilon=quantizer.amax_epsilon,
            instead_of_infinity=instead_of_infinity,
        )
        codes = encode(blocks * scale[:, None, :, None], quantizer.dtype)
        flat = codes.reshape(codes.shape[0] * codes.shape[1], -1)[: source.shape[0], : source.shape[1]]
        _write(data, flat)
        inverse = scale.reciprocal() if high == BLOCK else scale.reciprocal().t()
        host(scale_inv)[: inverse.shape[0], : inverse.shape[1]] = inverse


def _store_mx(values: Tensor, quantizer: Any, target: Any) -> None:
    if quantizer.with_2d_quantization:
        raise NoReferenceError("The emulated device has no reference for MXFP8Quantizer with 32 x 32 blocks")
    matrix = values.reshape(rows_and_columns(values.shape))
    ways = (
        ((1, MX_BLOCK), target._rowwise_data, "_rowwise_scale_inv"),
        ((MX_BLOCK, 1), target._columnwise_data, "_columnwise_scale_inv"),
    )
    for block, data, name in ways:
        if data is None:
            continue
        blocks = tiles(matrix, *block)
        # The kernel multiplies by 1/448 (or 1/57344) in fp32 instead of dividing.
        exponent = e8m0(magnitude(blocks, (1, 3)) * (1 / largest(quantizer.dtype)))
        codes = encode(blocks * e8m0_reciprocal(exponent)[:, None, :, None], quantizer.dtype)
        _write(data, codes)
        scales = getattr(target, name)
        whole = torch.zeros(scales.shape, dtype=torch.uint8)
        whole[: exponent.shape[0], : exponent.shape[1]] = exponent
        _write(
            scales, swizzled(whole, columnwise=block[1] == 1) if target._with_gemm_swizzled_scales else whole
        )


def finish(
    values: Tensor,
    dtype: torch.dtype,
    quantizer: Any,
    device: torch.device,
    out: Any = None,
    *,
    fused: bool | None = None,
) -> Any:
    """The end of a kernel that computes in fp32 (values, on the host): its result in dtype, or quantised.

    Only with delayed scaling are the fp32 values quantised (fused). For the other recipes they are rounded to
    dtype first: by a kernel that writes them (Impl::UNFUSED and FUSED_..._AMAX_FP8 of csrc/extensions), or in
    the kernel, so that both ways give the same (quantize_mxfp8.cuh).
    """
    if quantizer is None:
        if out is None:
            return on_device(values, dtype, device)
        _write(out, values)
        return out
    target = empty(quantizer, values.shape, dtype, device) if out is None else out
    if fused is None:
        fused = kind(quantizer) == "Float8Quantizer"
    source = values if fused else fp32(on_device(values, dtype, device))
    store(source, quantizer, target, source=dtype)
    return target


def values_of(tensor: Any, *, columnwise: bool = False) -> Tensor:
    """fp32 values, on the host, of a quantised tensor, by its rows or by its columns; the logical shape."""
    if not hasattr(tensor, "_fp8_dtype"):
        raise NoReferenceError(
            f"The emulated device has no reference for the values of {type(tensor).__name__}"
        )
    if hasattr(tensor, "_scale_inv"):
        return _per_tensor_values(tensor, columnwise)
    way = "columnwise" if columnwise else "rowwise"
    data, scales = getattr(tensor, f"_{way}_data"), getattr(tensor, f"_{way}_scale_inv")
    if data is None:
        raise RuntimeError(f"{type(tensor).__name__} is missing {way} usage")
    data, scales = host(data), host(scales)
    codes = decode(data, tensor._fp8_dtype)
    if columnwise and not hasattr(tensor, "_with_gemm_swizzled_scales"):
        codes = codes.reshape(codes.shape[0], -1)  # it lies transposed
    else:
        codes = codes.reshape(rows_and_columns(data.shape))
    if hasattr(tensor, "_with_gemm_swizzled_scales"):
        values = _mx_values(codes, scales, columnwise, tensor._with_gemm_swizzled_scales)
    else:
        values = codes * _spread_blocks(scales, codes.shape, tensor._is_2D_scaled)
        values = values.t() if columnwise else values
    return values.reshape(shape_of(tensor))


def _per_tensor_values(tensor: Any, columnwise: bool) -> Tensor:
    if columnwise:
        if tensor._transpose is None or tensor._transpose_invalid:
            raise RuntimeError(f"{type(tensor).__name__} is missing column-wise usage")
        codes = host(tensor._transpose).reshape(tensor._transpose.shape[0], -1).t().contiguous()
        return (decode(codes, tensor._fp8_dtype) * host(tensor._scale_inv)).reshape(shape_of(tensor))
    if tensor._data is None:
        raise RuntimeError(f"{type(tensor).__name__} is missing row-wise usage")
    return decode(host(tensor._data), tensor._fp8_dtype) * host(tensor._scale_inv)


def _spread_blocks(scales: Tensor, shape: Sequence[int], squares: bool) -> Tensor:
    """One fp32 factor per element of the codes as they lie."""
    high, wide = shape
    if squares:
        return scales.repeat_interleave(BLOCK, 0)[:high].repeat_interleave(BLOCK, 1)[:, :wide]
    return scales.t()[:high].repeat_interleave(BLOCK, 1)[:, :wide]


def _mx_values(codes: Tensor, scales: Tensor, columnwise: bool, is_swizzled: bool) -> Tensor:
    scales = unswizzled(scales, columnwise=columnwise) if is_swizzled else scales
    high, wide = codes.shape
    factor = e8m0_value(scales)
    if columnwise:
        return codes * factor.repeat_interleave(MX_BLOCK, 0)[:high, :wide]
    return codes * factor.repeat_interleave(MX_BLOCK, 1)[:high, :wide]


@reference("quantize")
def quantize(tensor: Tensor, quantizer: Any, output: Any = None, noop: Tensor | None = None) -> Any:
    """A new quantised tensor, or the values into output."""
    if output is None:
        output = empty(quantizer, tensor.shape, tensor.dtype, tensor.device)
    else:
        fit(quantizer, output)
    store(fp32(tensor), quantizer, output, source=tensor.dtype, noop=noop)
    return output


@reference("dequantize")
def dequantize(input: Any, otype: Any) -> Tensor:
    """The values of a quantised tensor, from its rows where it has them."""
    rowwise = input._data if hasattr(input, "_scale_inv") else input._rowwise_data
    values = values_of(input, columnwise=rowwise is None)
    return on_device(values, torch_type(otype), device_of(input))


@reference("multi_tensor_quantize")
def multi_tensor_quantize(tensor_list: Sequence[Tensor], quantizer_list: Sequence[Any]) -> list[Any]:
    """Each tensor with its quantizer."""
    return [
        quantize(tensor, quantizer) for tensor, quantizer in zip(tensor_list, quantizer_list, strict=True)
    ]


@reference("split_quantize")
def split_quantize(
    tensor: Tensor,
    split_sections: Sequence[int],
    quantizer_list: Sequence[Any],
    disable_bulk_allocation: bool = False,
) -> list[Any]:
    """Parts of the first dimension, each with its quantizer."""
    if not len(split_sections):
        return []
    parts = tensor[: sum(split_sections)].split(list(split_sections))
    kinds = {kind(quantizer) for quantizer in quantizer_list}
    if disable_bulk_allocation or kinds not in ({"Float8BlockQuantizer"}, {"MXFP8Quantizer"}):
        return multi_tensor_quantize(parts, quantizer_list)
    targets = empty_in_one_buffer(quantizer_list, [part.shape for part in parts], tensor.device)
    for part, quantizer, target in zip(parts, quantizer_list, targets, strict=True):
        store(fp32(part), quantizer, target, source=tensor.dtype)
    return targets
