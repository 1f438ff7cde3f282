"""Attention of cuDNN, forward and backward, in fp32 between tensors of 16 bits.

Answers transformer_engine_torch's csrc/extensions/attention.cpp and what it calls,
common/fused_attn/fused_attn_f16_arbitrary_seqlen.cu. Shapes, with h heads, g groups of keys and d (d_v)
numbers in a head: queries [tokens, h, d], keys [tokens, g, d], values [tokens, g, d_v] for `thd`; [b, s, ...]
and [s, b, ...] for `bshd` and `sbhd`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from .host import host, on_the_host
from .registry import NoReferenceError, reference

Tensor = torch.Tensor
FORMATS = ("thd", "bshd", "sbhd")


def refuse_unless(fact: bool, kernel: str, case: str) -> None:
    """NoReferenceError for a case that the kernel has, and its reference has not."""
    if not fact:
        raise NoReferenceError(f"{kernel}: the emulated device has no reference for {case}")


def short_name(member: Any) -> str:
    """ "thd_thd_thd" of NVTE_QKV_Layout.NVTE_THD_THD_THD."""
    return str(member.name).removeprefix("NVTE_").lower()


def formats_of(layout: str) -> tuple[str, str]:
    """(format of queries, format of keys and values) of a layout: ("thd", "thd") of "t3hd"."""
    parts = [part.translate(str.maketrans("", "", "23")) for part in layout.split("_")]
    return parts[0], parts[-1]


@dataclass(frozen=True)
class Span:
    """A sequence's tokens: `length` of them from `start` on, in the row `index` of a batch."""

    index: int
    start: int
    length: int

    def of(self, tensor: Tensor, form: str) -> Tensor:
        """View [length, heads, d] of this sequence."""
        if form == "thd":
            return tensor[self.start : self.start + self.length]
        if form == "bshd":
            return tensor[self.index, : self.length]
        return tensor[: self.length, self.index]

    def statistics(self, stats: Tensor) -> Tensor:
        """View [heads, length] of this sequence in [tokens, heads, 1] or [b, heads, s, 1]."""
        if stats.dim() == 3:
            return stats[self.start : self.start + self.length, :, 0].t()
        return stats[self.index, :, : self.length, 0]


def spans(form: str, shape: torch.Size, bounds: Tensor, padded: Tensor | None, padding: bool) -> list[Span]:
    """Where each sequence stands.

    One of a batch is as long as its row unless the mask says that rows are padded.
    """
    lengths = host(bounds).diff().tolist()
    if form == "thd":
        starts = (bounds if padded is None else padded)[:-1].tolist()
        return [Span(i, s, n) for i, (s, n) in enumerate(zip(starts, lengths, strict=True))]
    batch, longest = (shape[0], shape[1]) if form == "bshd" else (shape[1], shape[0])
    return [Span(i, 0, lengths[i] if padding else longest) for i in range(batch)]


@dataclass(frozen=True)
class Mask:
    """Which keys a query sees: those from `left` before it to `right` behind it, None without bound.

    A query's place is counted from the sequence's first token, from its last one with `bottom_right`: there
    the last query stands at the last key.
    """

    left: int | None
    right: int | None
    bottom_right: bool

    def allowed(self, queries: int, keys: int, device: torch.device) -> Tensor:
        """Bool [queries, keys]."""
        shift = keys - queries if self.bottom_right else 0
        behind = (
            torch.arange(keys, device=device)[None] - torch.arange(queries, device=device)[:, None] - shift
        )
        allowed = torch.ones(queries, keys, dtype=torch.bool, device=device)
        if self.left is not None:
            allowed &= behind >= -self.left
        if self.right is not None:
            allowed &= behind <= self.right
        return allowed


def mask_of(kind: str, window: Any, bottom_right: bool) -> Mask:
    left, right = (None if bound == -1 else int(bound) for bound in window)
    if right is None and "causal" in kind:
        right = 0
    return Mask(left, right, bottom_right)


def scores(query: Tensor, key: Tensor, scale: float, mask: Mask) -> Tensor:
    """Scaled products [heads, queries, keys] in fp32, -inf where the mask forbids.

    Each group of keys serves h/g heads.
    """
    products = torch.einsum("qhd,khd->hqk", query.float(), per_head(key, query.shape[1])) * scale
    return products.masked_fill(~mask.allowed(len(query), len(key), query.device), -math.inf)


def per_head(tensor: Tensor, heads: int) -> Tensor:
    """fp32 [tokens, heads, d] of [tokens, groups, d]."""
    return tensor.float().repeat_interleave(heads // tensor.shape[1], dim=1)


def per_group(gradient: Tensor, groups: int) -> Tensor:
    """[tokens, groups, d], summed over the heads of each group."""
    return gradient.unflatten(1, (groups, -1)).sum(2)


@dataclass(frozen=True)
class Problem:
    """What an attention is, apart from its numbers.

    layout        (format of queries, format of keys and values)
    sequences     of each sequence, where its queries and its keys stand
    """

    layout: tuple[str, str]
    sequences: list[tuple[Span, Span]]
    mask: Mask
    scale: float


def problem_of(
    layout: str, kind: str, mask: Mask, scale: float, query: Tensor, key: Tensor,
    bounds: tuple[Tensor, Tensor], padded: tuple[Tensor | None, Tensor | None],
) -> Problem:  # fmt: skip
    padding = "padding" in kind
    of_query, of_key = formats_of(layout)
    queries = spans(of_query, query.shape, bounds[0], padded[0], padding)
    keys = spans(of_key, key.shape, bounds[1], padded[1], padding)
    return Problem((of_query, of_key), list(zip(queries, keys, strict=True)), mask, scale)


def check(
    kernel: str, tensor: Tensor, layout: Any, bias: Any, softmax: Any, dropout: float, quantizers: Any
) -> str:
    """The layout's name; NoReferenceError for what no path of ours asks for."""
    name = short_name(layout)
    refuse_unless(
        type(tensor) in (Tensor, torch.nn.Parameter), kernel, f"queries of type {type(tensor).__name__}"
    )
    refuse_unless(tensor.dtype in (torch.bfloat16, torch.float16), kernel, f"queries of {tensor.dtype}")
    refuse_unless(set(formats_of(name)) <= set(FORMATS), kernel, f"the layout {name}")
    refuse_unless(short_name(bias) == "no_bias", kernel, f"the bias {short_name(bias)}")
    refuse_unless(short_name(softmax) == "vanilla_softmax", kernel, f"the softmax {short_name(softmax)}")
    refuse_unless(not dropout, kernel, f"a dropout of {dropout}")
    refuse_unless(all(one is None for one in quantizers), kernel, "FP8")
    return name


def random_state(generator: Any, numbers: int, device: torch.device) -> Tensor:
    """int64 [2], seed and offset; the generator moves on as if the kernel had drawn `numbers` per thread."""
    if device.type != "cuda":
        return torch.zeros(2, dtype=torch.int64)
    drawn_from: Any = generator or torch.cuda.default_generators[device.index or 0]
    state = torch.tensor([drawn_from.initial_seed(), drawn_from.get_offset()], dtype=torch.int64)
    drawn_from.set_offset(drawn_from.get_offset() + -(-numbers // 4) * 4)
    return state.to(device)


@reference("fused_attn_fwd")
def fused_attn_fwd(
    max_seqlen_q: int, max_seqlen_kv: int, is_training: bool, attn_scale: float, p_dropout: float,
    set_zero: bool, qkv_layout: Any, o_format: Any, qkv_scale_inv_format: Any, bias_type: Any,
    attn_mask_type: Any, softmax_type: Any, window_size: Any, bottom_right_diagonal: bool,
    cu_seqlens_q: Tensor, cu_seqlens_kv: Tensor, Q: Tensor, K: Tensor, V: Tensor, fake_dtype: torch.dtype,
    cu_seqlens_q_padded: Tensor | None, cu_seqlens_kv_padded: Tensor | None, page_table_k: Any,
    page_table_v: Any, s_quantizer: Any, o_quantizer: Any, Bias: Any, SoftmaxOffset: Any, rng_gen: Any,
    rng_elts_per_thread: int, return_max_logit: bool, cuda_graph: bool,
) -> list[Tensor]:  # fmt: skip
    """[outputs, log of the sum of exponentials, largest score if asked for, state of the generator].

    Statistics are fp32 [tokens, h, 1] for `thd`, [b, h, longest, 1] else. Where no sequence stands cuDNN
    writes no statistics: NaN here, so that whoever reads one sees it. A query that sees no key has the output
    0 and -inf.
    """
    layout = check(
        "fused_attn_fwd", Q, qkv_layout, bias_type, softmax_type, p_dropout if is_training else 0.0,
        (s_quantizer, o_quantizer),
    )  # fmt: skip
    refuse_unless(page_table_k is None and page_table_v is None, "fused_attn_fwd", "pages of keys")
    kind = short_name(attn_mask_type)
    mask = mask_of(kind, window_size, bottom_right_diagonal)
    bounds, padded = (cu_seqlens_q, cu_seqlens_kv), (cu_seqlens_q_padded, cu_seqlens_kv_padded)
    problem = problem_of(layout, kind, mask, attn_scale, Q, K, bounds, padded)
    form, of_output = problem.layout[0], short_name(o_format)
    out_shape = shape_in(form, of_output, (*Q.shape[:-1], V.shape[-1]))
    output = torch.zeros(out_shape, dtype=fake_dtype, device=Q.device)
    if form == "thd":
        shape: tuple[int, ...] = (Q.shape[0], Q.shape[1], 1)
    else:
        batch, longest = (Q.shape[0], Q.shape[1]) if form == "bshd" else (Q.shape[1], Q.shape[0])
        shape = (batch, Q.shape[2], longest, 1)
    statistics = torch.full(shape, math.nan, dtype=torch.float32, device=Q.device)
    largest = torch.full_like(statistics, math.nan) if return_max_logit else None
    attend(problem, Q, K, V, output, of_output, statistics, largest)
    state = random_state(rng_gen, rng_elts_per_thread, Q.device)
    return [output, statistics, *([] if largest is None else [largest]), state]


@on_the_host
def attend(
    problem: Problem, q: Tensor, k: Tensor, v: Tensor, output: Tensor, of_output: str, statistics: Tensor,
    largest: Tensor | None,
) -> None:  # fmt: skip
    """Writes the outputs, log Σ exp of the scores and the largest score of each query."""
    of_query, of_key = problem.layout
    for here, there in problem.sequences:
        if not here.length:
            continue
        query, value = here.of(q, of_query), there.of(v, of_key)
        products = scores(query, there.of(k, of_key), problem.scale, problem.mask)
        normaliser = products.logsumexp(-1)
        weights = (products - normaliser[..., None]).exp().nan_to_num(0.0)
        here.of(output, of_output).copy_(torch.einsum("hqk,khd->qhd", weights, per_head(value, q.shape[-2])))
        here.statistics(statistics).copy_(normaliser)
        if largest is not None:
            here.statistics(largest).copy_(products.amax(-1) if there.length else normaliser)


def shape_in(form: str, wanted: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the same tensor in another format of a batch."""
    if form == wanted:
        return shape
    refuse_unless("thd" not in (form, wanted), "fused_attn", f"{form} to {wanted}")
    return (shape[1], shape[0], *shape[2:])


@reference("fused_attn_bwd")
def fused_attn_bwd(
    max_seqlen_q: int, max_seqlen_kv: int, attn_scale: float, p_dropout: float, set_zero: bool,
    qkv_layout: Any, o_format: Any, do_format: Any, dqkv_layout: Any, qkv_scale_inv_format: Any,
    do_scale_inv_format: Any, bias_type: Any, attn_mask_type: Any, softmax_type: Any, window_size: Any,
    bottom_right_diagonal: bool, deterministic: bool, cu_seqlens_q: Tensor, cu_seqlens_kv: Tensor, Q: Tensor,
    K: Tensor, V: Tensor, output: Tensor, dO: Tensor, fake_dtype: torch.dtype, Aux_CTX_Tensors: list[Tensor],
    cu_seqlens_q_padded: Tensor | None, cu_seqlens_kv_padded: Tensor | None, s_quantizer: Any,
    dp_quantizer: Any, dqkv_quantizer: Any, cuda_graph: bool,
) -> list[Tensor | None]:  # fmt: skip
    """[gradient of queries, of keys, of values, None, None].

    The weights are exp(score - statistics), with the statistics and outputs that are given: under context
    parallelism those are of all ranks' keys, and this call's keys are one rank's.
    """
    kernel = "fused_attn_bwd"
    layout = check(
        kernel, Q, qkv_layout, bias_type, softmax_type, p_dropout, (s_quantizer, dp_quantizer, dqkv_quantizer)
    )  # fmt: skip
    wanted = short_name(dqkv_layout)
    refuse_unless(wanted == layout, kernel, f"gradients as {wanted} of operands as {layout}")
    kind = short_name(attn_mask_type)
    mask = mask_of(kind, window_size, bottom_right_diagonal)
    bounds, padded = (cu_seqlens_q, cu_seqlens_kv), (cu_seqlens_q_padded, cu_seqlens_kv_padded)
    problem = problem_of(layout, kind, mask, attn_scale, Q, K, bounds, padded)
    found = gradients(layout, Q, K, V)
    forms = short_name(o_format), short_name(do_format)
    differentiate(problem, forms, (Q, K, V), output, dO, Aux_CTX_Tensors[0], found)
    return [*found, None, None]


@on_the_host
def differentiate(
    problem: Problem, forms: tuple[str, str], operands: tuple[Tensor, Tensor, Tensor], output: Tensor,
    gradient: Tensor, statistics: Tensor, found: tuple[Tensor, Tensor, Tensor],
) -> None:  # fmt: skip
    """Writes the gradients of the operands; forms are those of the output and of its gradient."""
    of_query, of_key = problem.layout
    d_query, d_key, d_value = found
    for here, there in problem.sequences:
        if not here.length or not there.length:
            continue
        query = here.of(operands[0], of_query)
        key, value = (there.of(operand, of_key) for operand in operands[1:])
        heads, groups = query.shape[1], key.shape[1]
        out, d_out = here.of(output, forms[0]).float(), here.of(gradient, forms[1]).float()
        normaliser = here.statistics(statistics)[..., None]
        weights = (scores(query, key, problem.scale, problem.mask) - normaliser).exp()
        weights = weights.masked_fill(normaliser == -math.inf, 0.0)
        d_weights = torch.einsum("qhd,khd->hqk", d_out, per_head(value, heads))
        d_scores = weights * (d_weights - (out * d_out).sum(-1).t()[..., None]) * problem.scale
        here.of(d_query, of_query).copy_(torch.einsum("hqk,khd->qhd", d_scores, per_head(key, heads)))
        of_keys = torch.einsum("hqk,qhd->khd", d_scores, query.float())
        there.of(d_key, of_key).copy_(per_group(of_keys, groups))
        there.of(d_value, of_key).copy_(per_group(torch.einsum("hqk,qhd->khd", weights, d_out), groups))


def gradients(layout: str, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros for the gradients, interleaved in one tensor where the layout has its operands in one."""
    parts = layout.split("_")
    if len(parts) == 1:
        where = parts[0].index("3") - len(parts[0])  # of [..., 3, h, d] or [..., h, 3, d]
        shape = list(query.shape)
        shape.insert(len(shape) + where + 1, 3)
        three = query.new_zeros(shape).unbind(where)
        return three[0], three[1], three[2]
    if len(parts) == 2:
        where = parts[1].index("2") - len(parts[1])
        shape = list(key.shape)
        shape.insert(len(shape) + where + 1, 2)
        two = key.new_zeros(shape).unbind(where)
        return torch.zeros_like(query, memory_format=torch.contiguous_format), two[0], two[1]
    first, second, third = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (query, key, value))
    return first, second, third


@reference("convert_thd_to_bshd")
@on_the_host
def convert_thd_to_bshd(tensor: Tensor, cu_seqlens: Tensor, b: int, max_seq_len: int) -> Tensor:
    """[b, max_seq_len, h, d] of a packed row, 0 behind each sequence.

    UnfusedDotProductAttention asks for it.
    """
    rows = zip(tensor.tensor_split(cu_seqlens[1:].cpu().long()), range(b), strict=False)
    batch = tensor.new_zeros(b, max_seq_len, *tensor.shape[1:])
    for row, index in rows:
        batch[index, : len(row)] = row
    return batch


@reference("convert_bshd_to_thd")
@on_the_host
def convert_bshd_to_thd(tensor: Tensor, cu_seqlens: Tensor, t: int) -> Tensor:
    """[t, h, d]: the sequences of a batch, one behind the other."""
    row = tensor.new_zeros(t, *tensor.shape[2:])
    for index, length in enumerate(cu_seqlens.diff().tolist()):
        begin = int(cu_seqlens[index])
        row[begin : begin + length] = tensor[index, :length]
    return row


@reference("get_fused_attn_backend")
def get_fused_attn_backend(parameters: Any) -> tuple[Any, str]:
    """(kernel that cuDNN 9.24 has on Hopper, why none).

    The binding builds cuDNN's graph and asks whether an engine of the device takes it. The conditions here
    are those that nvte_get_fused_attn_backend had written out before (common/fused_attn/fused_attn.cpp of
    Transformer Engine 2.19), for compute capability 9.0. Where they hold for a case that fused_attn_fwd
    refuses, the error comes from there.
    """
    import transformer_engine.pytorch  # noqa: F401  (it loads the libraries that the binding needs)
    import transformer_engine_torch as binding

    backends = binding.NVTE_Fused_Attn_Backend
    kind, width, of_values = parameters.qkv_dtype.name, parameters.head_dim_qk, parameters.head_dim_v
    refuse_unless("Float8" not in kind, "get_fused_attn_backend", f"queries of {kind}")
    layout = short_name(parameters.qkv_layout)
    mask = short_name(parameters.attn_mask_type)
    reasons = {
        f"queries of {kind}": kind not in ("kFloat16", "kBFloat16"),
        f"heads of {width} and {of_values} numbers": bool(
            width % 8 or of_values % 8 or max(width, of_values) > 256
        ),
        # the bug of cuDNN 9.11 and later in the backward pass
        f"gradients with heads of {width} and {of_values} numbers": parameters.is_training
        and min(width, of_values) >= 128
        and width != of_values
        and (width, of_values) != (192, 128),
        f"{layout} without padding in the mask ({mask})": "thd" in formats_of(layout)
        and "padding" not in mask,
        "more queries than keys": "bottom_right" in mask
        and parameters.max_seqlen_q > parameters.max_seqlen_kv,
    }
    reason = ", ".join(text for text, wrong in reasons.items() if wrong)
    return (backends.NVTE_No_Backend if reason else backends.NVTE_F16_arbitrary_seqlen), reason
