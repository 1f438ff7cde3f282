"""Packed micro-batches through the pipeline; log-probabilities of given tokens from vocab-parallel logits."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.utils import get_model_config, unwrap_model

from megatron_pmd.actor.batching import Microbatches
from megatron_pmd.actor.packing import PackedMicrobatch, Row, pack_microbatch
from megatron_pmd.actor.routing_replay import RoutingReplay
from megatron_pmd.batch import RolloutBatch


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


@contextlib.contextmanager
def logits_at(model: Any, rows: torch.Tensor) -> Iterator[None]:
    """Within it the output layer, where the model has one, computes the logits of these rows alone.

    Of the row a rank holds; a prompt's logits, which no loss reads, are neither computed nor kept. Under
    sequence parallelism the ranks gather their rows before the layer instead of in it, as GPTModel itself
    does to take the last token's logits.
    """
    gpt = unwrap_model(model)
    if not gpt.post_process:
        yield
        return
    layer = gpt.output_layer
    scattered = layer.sequence_parallel

    def select(_: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = inputs[0]
        if scattered:
            # the layer sums the gradient of the whole rows over the ranks; each then keeps its part
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=gpt.pg_collection.tp
            )
        return (hidden.index_select(0, rows), *inputs[1:])

    hook = layer.register_forward_pre_hook(select)
    layer.sequence_parallel = False
    try:
        yield
    finally:
        layer.sequence_parallel = scattered
        hook.remove()


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


def run_schedule(
    chunks: list[Any],
    batch: RolloutBatch,
    microbatches: Microbatches,
    row: Row,
    on_logits: Callable[[PackedMicrobatch, torch.Tensor], Any],
    *,
    forward_only: bool,
    examples: Microbatches | None = None,
    replay: RoutingReplay | None = None,
) -> list[Any]:
    """Drive all micro-batches through megatron-core's pipeline schedule and this rank's chunks of the model.

    examples: micro-batches of supervised examples, which come after those of responses.

    on_logits(microbatch, logits [response tokens here, vocabulary slice]) runs on the last stage. With
    forward_only it returns anything, which comes back as a list; otherwise (summed loss, count, anything),
    and gradients are divided by the global count. replay: routers choose the experts that the batch has
    recorded.
    """
    device = (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
    # else Float16Module hands on an fp32 copy of all logits
    as_computed = {"fp32_output": False} if get_model_config(chunks[0]).bf16 else {}
    # every chunk of an interleaved pipeline reads the micro-batches by itself
    work = [(samples, False) for samples in microbatches] + [(samples, True) for samples in examples or []]
    packed = [
        (pack_microbatch(batch, samples, row, device, supervised=supervised) for samples, supervised in work)
        for _ in chunks
    ]

    def forward_step(iterator: Any, model: Any) -> tuple[torch.Tensor, Callable]:
        microbatch = next(iterator)
        if replay:
            layers = get_model_config(model).num_layers
            replay.begin(model, microbatch.experts.view(len(microbatch.experts), layers, -1))
        with logits_at(model, microbatch.rows):
            output = model(
                microbatch.tokens, microbatch.positions, None,
                packed_seq_params=microbatch.attention, **as_computed,
            )  # fmt: skip
        if replay:
            replay.end(model)

        def loss(logits: torch.Tensor, non_loss_data: bool = False) -> Any:
            return on_logits(microbatch, logits.squeeze(0))

        return output, loss

    results = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=packed if len(chunks) > 1 else packed[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(work),
        seq_length=1,  # not used: variable_seq_lengths exchanges the shapes
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )
    if replay:
        replay.clear()
    return results
