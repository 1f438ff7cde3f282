"""Matrix products: plain, and a list of them.

Answers csrc/extensions/gemm.cpp and transformer_engine/common/gemm/cublaslt_gemm.cu on Hopper. A is the
weight (or what plays its part) and B the activation, in cuBLAS's order of columns: D = op(B) op(A), where a
matrix is taken by its rows when it is A transposed or B plain ("TN"), and by its columns otherwise. Products
are summed in fp32, also where cuBLAS would take TF32, and rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .allocate import rows_and_columns, shape_of
from .bias import sum_of_rows
from .float8 import torch_type
from .host import fp32, host
from .quantise import finish, values_of
from .registry import NoReferenceError, kept, reference

kept("get_num_cublas_streams", "get_cublasLt_version")


def _is_quantised(operand: Any) -> bool:
    return hasattr(operand, "_fp8_dtype")


def _shape(operand: Any) -> Sequence[int]:
    return shape_of(operand) if _is_quantised(operand) else list(operand.shape)


def _matrix(operand: Any, *, by_columns: bool) -> Tensor:
    """fp32 [rows, columns], on the host, of an operand that the GEMM reads by rows or by columns."""
    if _is_quantised(operand):
        values = values_of(operand, columnwise=by_columns)
    elif hasattr(operand, "_quantizer"):
        raise NoReferenceError(f"The emulated device has no reference for a GEMM of {type(operand).__name__}")
    else:
        values = fp32(operand)
    return values.reshape(rows_and_columns(_shape(operand)))


def _output_shape(a: Any, transa: bool, b: Any, transb: bool) -> list[int]:
    """getGemmOutputShape: the dimensions of B before its last, and the rows of op(A)."""
    a_shape, b_shape = _shape(a), _shape(b)
    a_rows, a_columns = rows_and_columns(a_shape)
    b_rows, b_columns = rows_and_columns(b_shape)
    if (a_columns if transa else a_rows) != (b_rows if transb else b_columns):
        raise RuntimeError(
            f"Invalid matrix dimensions for GEMM (A=({a_rows},{a_columns}), transa={transa}, "
            f"B=({b_rows},{b_columns}), transb={transb})"
        )
    return [*([b_columns] if transb else b_shape[:-1]), a_rows if transa else a_columns]


def _scaling(operand: Any) -> str:
    """How the operand is scaled: not at all, by one factor, per block of 128, per block of 32."""
    if not _is_quantised(operand):
        return "none"
    if hasattr(operand, "_scale_inv"):
        return "tensor"
    return "block" if hasattr(operand, "_is_2D_scaled") else "mx"


def _check(a: Any, transa: bool, b: Any, transb: bool) -> None:
    """What cuBLAS asks of FP8 operands, in the words of CanonicalizeGemmInput."""
    scaling = _scaling(a)
    if scaling != _scaling(b):
        raise RuntimeError(
            "Inputs A and B to GEMM need to have compatible scaling modes, but got "
            f"{scaling} and {_scaling(b)}"
        )
    if scaling not in {"tensor", "block"}:
        return
    m, k = rows_and_columns(_shape(a))[:: 1 if transa else -1]
    n = rows_and_columns(_shape(b))[transb]
    if k % 16:
        raise RuntimeError(f"Leading dimension requirement for FP8 GEMM. Caller must pad. ({k} % 16 != 0)")
    if scaling == "tensor":
        return
    if a._is_2D_scaled and b._is_2D_scaled:
        raise RuntimeError("Only 1D by 1D, 1D by 2D, and 2D by 1D block scaling GEMM is supported")
    if m % 8 or (not b._is_2D_scaled and n % 8):
        raise RuntimeError(
            "Outer dimension requirement for NVTE_BLOCK_SCALING GEMM. Caller must pad. "
            f"({m} and {n} must be multiples of 8)"
        )


def _product(a: Any, transa: bool, b: Any, transb: bool) -> Tensor:
    """fp32 op(B) op(A), [rows of op(B), columns of op(A)]."""
    _check(a, transa, b, transb)
    left = _matrix(b, by_columns=transb)
    right = _matrix(a, by_columns=not transa)
    return (left.t() if transb else left) @ (right.t() if transa else right)


@reference("generic_gemm")
def generic_gemm(
    A: Any,
    transA: bool,
    B: Any,
    transB: bool,
    D: Any,
    quantizer: Any,
    output_dtype: Any,
    bias: Tensor | None,
    bias_type: Any,
    gelu: bool,
    gelu_in: Tensor | None,
    grad: bool,
    workspace: Tensor,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    comm_overlap: Any = None,
    comm_type: Any = None,
    extra_output: Tensor | None = None,
    bulk_overlap: bool = False,
    alpha: float = 1.0,
    beta: float | None = None,
) -> list[Any]:
    """[D, gradient of the bias, None, extra_output]; with grad, B is the gradient of an output."""
    if comm_overlap is not None:
        raise NoReferenceError("The emulated device has no reference for a GEMM that overlaps communication")
    if gelu:
        raise NoReferenceError("The emulated device has no reference for a GEMM with a GELU behind it")
    if not accumulate and beta:
        raise RuntimeError("Trying to use non-zero beta while not accumulating into D tensor.")
    shape = _output_shape(A, transA, B, transB)
    dtype = _result_type(A, D, output_dtype)
    is_empty = 0 in (*_shape(A), *_shape(B))
    if is_empty:
        values = torch.zeros(rows_and_columns(shape))
    else:
        values = alpha * _product(A, transA, B, transB)
    of_bias = None
    if bias is not None and grad:
        of_bias = _gradient_of_bias(B, transB, dtype, workspace.device, is_empty)
    elif bias is not None:
        values = values + fp32(bias)
    if accumulate:
        D = _accumulated(D, values.reshape(shape), 1.0 if beta is None else beta, quantizer)
    else:
        fused = _is_fused(A, B, quantizer)
        D = finish(values.reshape(shape), dtype, quantizer, workspace.device, D, fused=fused)
    return [D, of_bias, None, extra_output]


def _result_type(a: Any, out: Any, output_dtype: Any) -> torch.dtype:
    if output_dtype is not None:
        return torch_type(output_dtype)
    if out is not None and not _is_quantised(out):
        return out.dtype
    return torch_type(a._fp8_dtype) if _is_quantised(a) else a.dtype


def _gradient_of_bias(
    b: Any, transb: bool, dtype: torch.dtype, device: torch.device, is_empty: bool
) -> Tensor:
    """Sum of the rows of B: the epilogue BGRADB, which cuBLAS does not have for blocks."""
    if is_empty:
        return torch.zeros(_shape(b)[-1], dtype=dtype, device=device)
    if _scaling(b) == "block":
        raise RuntimeError(
            "Epilogue requested outside of the available and tested cuBLAS functionality for float8 block "
            "scaled GEMM"
        )
    return sum_of_rows(_matrix(b, by_columns=transb), dtype, device)


def _accumulated(out: Any, values: Tensor, beta: float, quantizer: Any) -> Any:
    if quantizer is not None or out is None or _is_quantised(out):
        raise NoReferenceError("The emulated device has no reference for a GEMM that accumulates into FP8")
    host(out).copy_(values + beta * fp32(out))
    return out


def _is_fused(a: Any, b: Any, quantizer: Any) -> bool:
    """Whether cuBLAS writes FP8 itself: per-tensor operands, delayed scaling."""
    per_tensor = hasattr(a, "_scale_inv") or hasattr(b, "_scale_inv")
    return type(quantizer).__name__ == "Float8Quantizer" and per_tensor


@reference("te_general_grouped_gemm")
def te_general_grouped_gemm(
    A: Sequence[Any],
    transa: bool,
    B: Sequence[Any],
    transb: bool,
    D: Sequence[Tensor] | None,
    D_type: Any,
    m_splits: Sequence[int],
    bias: Sequence[Tensor],
    bias_type: Any,
    single_output: bool,
    pre_gelu_out: Sequence[Tensor],
    grad: bool,
    workspace: Sequence[Tensor],
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    math_sm_count: int,
) -> list[Tensor]:
    """A GEMM per pair of A and B, into its own D, or one below the other in a single D; the biases."""
    if D is None:
        raise NoReferenceError("The emulated device has no reference for te_general_grouped_gemm without D")
    if any(each.numel() for each in pre_gelu_out):
        raise NoReferenceError("The emulated device has no reference for grouped GEMMs with a GELU each")
    outputs = _rows_of(D[0], A, transa, B, transb) if single_output else D
    for a, b, out, bias_of in zip(A, B, outputs, bias, strict=True):
        if 0 in (*_shape(a), *_shape(b)):
            for tensor in [*([] if accumulate else [out]), *([bias_of] if grad else [])]:
                host(tensor).zero_()
            continue
        values = _product(a, transa, b, transb)
        if grad and bias_of.numel():
            host(bias_of).copy_(_matrix(b, by_columns=transb).sum(0))
        elif bias_of.numel():
            values = values + fp32(bias_of)
        values = values.reshape(out.shape)
        host(out).copy_(values + fp32(out) if accumulate else values)
    return list(bias)


def _rows_of(out: Tensor, a: Sequence[Any], transa: bool, b: Sequence[Any], transb: bool) -> list[Tensor]:
    """Parts of the single output, in the GEMMs' order."""
    parts, flat, start = [], out.reshape(-1), 0
    for left, right in zip(a, b, strict=True):
        shape = rows_and_columns(_output_shape(left, transa, right, transb))
        parts.append(flat[start : start + shape[0] * shape[1]].reshape(shape))
        start += shape[0] * shape[1]
    return parts
