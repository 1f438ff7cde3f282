"""Log-probabilities of given tokens from vocab-parallel logits, also of a row that context ranks share."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_pmd.actor.packing import PackedMicrobatch


class _TokenLogProbs(torch.autograd.Function):
    """log π(target) and entropy of vocab-parallel logits, a chunk of rows in fp32 at a time.

    Through autograd each chunk would give a gradient as large as all logits, to be added up: three of them in
    memory at once. Here the backward pass fills one, from the normalisers that the forward pass kept:
    ∂ log π(y) / ∂ logit(v) = (1[v = y] − π(v)) / temperature.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        targets: torch.Tensor,
        temperature: float,
        chunk_tokens: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        group = parallel_state.get_tensor_model_parallel_group()
        log_probs, entropies, normalisers = [], [], []
        for chunk, wanted in zip(logits.split(chunk_tokens), targets.split(chunk_tokens), strict=True):
            scaled = chunk.to(torch.float32, copy=True).div_(temperature)
            maximum = scaled.max(-1).values
            dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
            column, here = _columns(wanted, logits.size(1))
            chosen = torch.where(here, scaled.gather(1, column), 0.0).squeeze(1)
            weights = (scaled - maximum[:, None]).exp_()
            total = weights.sum(-1)
            sums = torch.stack([total, weights.mul_(scaled).sum(-1), chosen])
            dist.all_reduce(sums, group=group)
            normaliser = maximum + sums[0].log()
            log_probs.append(sums[2] - normaliser)
            entropies.append(normaliser - sums[1] / sums[0])
            normalisers.append(normaliser)
            del scaled, weights  # else they live on beside the next chunk
        ctx.save_for_backward(logits, targets, torch.cat(normalisers))
        ctx.temperature, ctx.chunk_tokens = temperature, chunk_tokens
        entropy = torch.cat(entropies)
        ctx.mark_non_differentiable(entropy)
        return torch.cat(log_probs), entropy

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        logits, targets, normalisers = ctx.saved_tensors
        whole = torch.empty_like(logits)
        by_row = (logits, whole, targets, normalisers, gradients[0] / ctx.temperature)
        parts = (tensor.split(ctx.chunk_tokens) for tensor in by_row)
        for chunk, result, wanted, normaliser, gradient in zip(*parts, strict=True):
            slope = chunk.to(torch.float32, copy=True).div_(ctx.temperature)
            slope.sub_(normaliser[:, None]).exp_().neg_()
            column, here = _columns(wanted, logits.size(1))
            slope.scatter_add_(1, column, here.float())
            result.copy_(slope.mul_(gradient[:, None]))
        return whole, None, None, None


def _columns(targets: torch.Tensor, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Column of each target in this rank's slice of the vocabulary and whether it is there, [targets, 1]."""
    column = targets[:, None] - parallel_state.get_tensor_model_parallel_rank() * columns
    return column.clamp(0, columns - 1), (column >= 0) & (column < columns)


def token_log_probs(
    logits: torch.Tensor, targets: torch.Tensor, *, temperature: float, chunk_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """log π(target) and entropy, from this rank's slice of the vocabulary.

    logits       [targets, vocabulary / tensor-parallel size]
    chunk_tokens rows whose fp32 logits exist at one time

    Returns (log_probs with gradient, entropy without), each fp32 [targets].
    """
    return _TokenLogProbs.apply(logits, targets, temperature, chunk_tokens)


class _FromContextRanks(torch.autograd.Function):
    """Values [here] of this rank's tokens -> values [size] of all context-parallel ranks' tokens.

    Every rank computes the same loss from the result; its backward pass takes the gradient of its own tokens
    alone, so that the sum over ranks that data parallelism takes counts each token once.
    """

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, here: torch.Tensor, size: int, group: Any) -> torch.Tensor:
        ctx.save_for_backward(here)
        whole = values.new_zeros(size).index_copy_(0, here, values)
        dist.all_reduce(whole, group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (here,) = ctx.saved_tensors
        return gradients[0].index_select(0, here), None, None, None


def microbatch_log_probs(
    microbatch: PackedMicrobatch, logits: torch.Tensor, *, temperature: float, chunk_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """token_log_probs of a micro-batch's response tokens: of all of them, on every context-parallel rank."""
    parts = token_log_probs(
        logits,
        microbatch.targets[microbatch.here],
        temperature=temperature,
        chunk_tokens=chunk_tokens,
    )
    group = parallel_state.get_context_parallel_group()
    if group.size() == 1:
        return parts
    size = len(microbatch.targets)
    log_probs, entropy = (_FromContextRanks.apply(part, microbatch.here, size, group) for part in parts)
    return log_probs, entropy
