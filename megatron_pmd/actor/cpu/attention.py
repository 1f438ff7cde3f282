"""Attention of packed rows on a CPU: what Transformer Engine's would compute, by torch."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import is_layer_window_attention, make_sharded_tensors_for_checkpoint

from megatron_pmd.actor.packing import Row

FP32_ATTENTION_TOKENS = 256
"""Up to this length of the longest sequence attention runs in fp32."""


def places(bounds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every token of a packed row: the number of its sequence, and its place in it. bounds: cu_seqlens."""
    sequence = torch.repeat_interleave(torch.arange(len(bounds) - 1), bounds.diff())
    return sequence, torch.arange(len(sequence)) - bounds[sequence]


def batched(
    x: torch.Tensor, sequence: torch.Tensor, place: torch.Tensor, shape: tuple[int, int]
) -> torch.Tensor:
    """The row x [tokens, …] as a padded batch [*shape, …] of so many sequences of so many places."""
    return x.new_zeros((*shape, *x.shape[1:])).index_put((sequence, place), x)


class _GatherTokens(torch.autograd.Function):
    """All context-parallel ranks' tokens, one after another; each gets the sum of its tokens' gradients."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        whole = part.new_empty((part.size(0) * group.size(), *part.shape[1:]))
        dist.all_gather_into_tensor(whole, part.contiguous(), group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        whole = gradients[0].contiguous()
        part = whole.new_empty((whole.size(0) // ctx.group.size(), *whole.shape[1:]))
        dist.reduce_scatter_tensor(part, whole, group=ctx.group)
        return part, None


class PackedAttention(MegatronModule):
    """Causal attention within each packed sequence, by torch's SDPA where scores have no cap.

    The packed row is laid out as one padded batch, so that no token sees another sequence; padding comes
    after every real token and is therefore never attended to. Under context parallelism each rank gathers
    the keys and values of all ranks for its own queries.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        *,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale
        self.softcap: float = getattr(config, "attn_logit_softcapping", None) or 0.0
        """What bounds the scores, smoothly; 0: nothing."""
        self.window: int | None = None
        """Tokens before its own that a query sees; None: all."""
        if is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number):
            self.window = config.window_size[0]
        self.softmax_offset: torch.nn.Parameter | None = None
        """[heads] The score of a sink, which takes its share of the attention and adds nothing."""
        if config.softmax_type == "learnable":
            heads = config.num_attention_heads // config.tensor_model_parallel_size
            self.softmax_offset = torch.nn.Parameter(torch.empty(heads, dtype=config.params_dtype))
            config.init_method(self.softmax_offset)
        self.context = pg_collection.cp if pg_collection else parallel_state.get_context_parallel_group()

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *_: Any,
        packed_seq_params: Any,
        **__: Any,
    ) -> torch.Tensor:
        """query [tokens, heads, dim], key and value [tokens, groups, dim] -> [tokens, heads * dim]"""
        bounds = packed_seq_params.cu_seqlens_q.long()
        lengths = bounds.diff()
        sequence, position = places(bounds)
        longest = int(lengths.max())
        # torch's bf16 kernel takes 3 times as long backward as its fp32 one at 62 tokens, less than it at 512
        dtype = torch.float32 if longest <= FP32_ATTENTION_TOKENS else query.dtype

        def by_head(x: torch.Tensor, sequence: torch.Tensor, place: torch.Tensor, width: int) -> torch.Tensor:
            return batched(x.to(dtype), sequence, place, (len(lengths), width)).transpose(1, 2)

        asked, place, width = sequence, position, longest
        keys = torch.arange(longest)
        mask: dict[str, Any] = {"is_causal": True}
        if self.window is not None or self.softcap:
            mask = {"attn_mask": self._sees(keys, keys)}
        if self.context.size() > 1:
            row = Row(size=self.context.size())
            held = [
                torch.from_numpy(replace(row, rank=rank).held(bounds.numpy())) for rank in range(row.size)
            ]
            order = torch.cat(held).argsort()
            key, value = (_GatherTokens.apply(x, self.context)[order] for x in (key, value))
            own = held[self.context.rank()]
            asked, width = sequence[own], longest // row.size
            place = torch.arange(len(own)) - bounds[asked] // row.size
            # a place without a query is taken for the last: a row of nothing but masked keys would give NaN
            last = torch.full((len(lengths), width), longest - 1)
            mask = {"attn_mask": self._sees(last.index_put((asked, place), position[own]), keys)[:, None]}
        scale = query.size(-1) ** -0.5 if self.scale is None else self.scale
        padded = (
            by_head(query, asked, place, width),
            by_head(key, sequence, position, longest),
            by_head(value, sequence, position, longest),
        )
        if self.softmax_offset is not None:
            mask = {"attn_mask": F.pad(mask.get("attn_mask", self._sees(keys, keys)), (0, 1), value=True)}
            padded = _with_sink(*padded, self.softmax_offset / scale)
        attend = partial(_capped, softcap=self.softcap) if self.softcap else F.scaled_dot_product_attention
        output = attend(*padded, scale=scale, enable_gqa=True, **mask)
        return output.transpose(1, 2)[asked, place].flatten(1).to(query.dtype)

    def _sees(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Whether a query sees a key. queries [..., queries] and keys [keys]: their positions."""
        before = queries[..., None] - keys
        return (before >= 0) if self.window is None else (before >= 0) & (before <= self.window)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict:
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"softmax_offset": 0}, sharded_offsets)


def _capped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    softcap: float,
    scale: float,
    attn_mask: torch.Tensor,
    enable_gqa: bool,
) -> torch.Tensor:
    """torch's SDPA with capped scores, which it does not have."""
    key, value = (x.repeat_interleave(query.size(1) // x.size(1), dim=1) for x in (key, value))
    scores = softcap * torch.tanh(query @ key.mT * (scale / softcap))
    weights = scores.masked_fill(~attn_mask, -torch.inf).softmax(-1, dtype=torch.float32)
    return weights.to(value.dtype) @ value


def _with_sink(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, score: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One key more, whose value is zero, and whose product with every query of a head is the head's `score`.

    query, key, value [sequences, heads or groups, tokens, dim]; score [heads].
    """
    column = score.to(query.dtype)[:, None, None].expand(*query.shape[:3], 1)
    sink = F.one_hot(torch.tensor(key.size(-1))).to(key.dtype).expand(*key.shape[:2], 1, -1)
    key = torch.cat([F.pad(key, (0, 1)), sink], dim=2)
    return torch.cat([query, column], dim=-1), key, F.pad(value, (0, 0, 0, 1))
