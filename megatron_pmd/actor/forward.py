"""Packed micro-batches through the pipeline; log-probabilities of given tokens from vocab-parallel logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.utils import get_model_config
from torch.utils.checkpoint import checkpoint

from megatron_pmd.actor.batching import Microbatches
from megatron_pmd.rollout.samples import RolloutBatch


@dataclass(frozen=True)
class PackedMicrobatch:
    """One forward pass: several samples in one row, without attention between them.

    tokens, positions   [1, row]  the row may end in padding, a sequence of its own
    bounds              int32 [sequences + 1]
    rows                [response tokens]  where in the row the logits of each response token are
    targets             [response tokens]  the response tokens
    sequence            [response tokens]  index of the token's sample in `samples`
    source              [response tokens]  index of the token in the rollout's flat arrays
    """

    samples: list[int]
    tokens: torch.Tensor
    positions: torch.Tensor
    bounds: torch.Tensor
    rows: torch.Tensor
    targets: torch.Tensor
    sequence: torch.Tensor
    source: torch.Tensor

    @property
    def attention(self) -> PackedSeqParams:
        longest = int(self.bounds.diff().max())
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=self.bounds,
            cu_seqlens_kv=self.bounds,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )


def pack_microbatch(batch: RolloutBatch, samples: list[int], multiple: int, device: Any) -> PackedMicrobatch:
    """Lay samples one after another in a row, its length a multiple of `multiple` (sequence parallelism)."""
    lengths = batch.lengths[samples].tolist()
    spans = [np.arange(batch.offsets[s], batch.offsets[s + 1]) for s in samples]
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    total = int(starts[-1])
    padding = -total % multiple if total else multiple
    bounds = [*starts.tolist(), total + padding] if padding else starts.tolist()
    tokens = np.concatenate([*(batch.tokens[span] for span in spans), np.zeros(padding, np.int64)]).astype(
        np.int64
    )
    positions = np.concatenate([np.arange(n) for n in [*lengths, padding]])
    prompts = batch.prompt_lengths[samples].tolist()
    answers = [np.arange(p, n) for p, n in zip(prompts, lengths, strict=True)]
    empty = np.zeros(0, np.int64)
    in_row = np.concatenate([empty, *(start + a for start, a in zip(starts.tolist(), answers, strict=False))])

    def tensor(array: Any, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.as_tensor(array, dtype=dtype, device=device)

    return PackedMicrobatch(
        samples=samples,
        tokens=tensor(tokens)[None],
        positions=tensor(positions)[None],
        bounds=tensor(bounds, torch.int32),
        # the logits that predict a token stand one position before it
        rows=tensor(in_row - 1),
        targets=tensor(tokens[in_row]),
        sequence=tensor(np.repeat(np.arange(len(samples)), [len(a) for a in answers])),
        source=tensor(np.concatenate([empty, *(span[a] for span, a in zip(spans, answers, strict=True))])),
    )


def token_log_probs(
    logits: torch.Tensor,
    rows: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float,
    chunk_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """log π(target) and entropy at the given rows, from this rank's slice of the vocabulary.

    logits       [row, vocabulary / tensor-parallel size]
    chunk_tokens rows whose fp32 logits exist at one time; the backward pass recomputes them

    Returns (log_probs with gradient, entropy without), each fp32 [len(rows)].
    """
    group = parallel_state.get_tensor_model_parallel_group()

    def chunk(rows: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scaled = logits.index_select(0, rows).float() / temperature
        entropy = _entropy(scaled.detach(), group)
        # the cross entropy overwrites its fp32 input: everything else that needs the logits comes before it
        log_probs = -vocab_parallel_cross_entropy(scaled.unsqueeze(1), targets.unsqueeze(1)).squeeze(1)
        return log_probs, entropy

    parts = [
        checkpoint(chunk, r, t, use_reentrant=False)
        for r, t in zip(rows.split(chunk_tokens), targets.split(chunk_tokens), strict=True)
    ]
    log_probs, entropies = zip(*parts, strict=True)
    return torch.cat(log_probs), torch.cat(entropies)


@torch.no_grad()
def _entropy(logits: torch.Tensor, group: Any) -> torch.Tensor:
    """Entropy of the softmax over all ranks' columns: two all-reduces of [rows], no vocabulary gather."""
    maximum = logits.max(-1).values
    dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
    weights = (logits - maximum[:, None]).exp_()
    sums = torch.stack([weights.sum(-1), (weights * logits).sum(-1)])
    dist.all_reduce(sums, group=group)
    return maximum + sums[0].log() - sums[1] / sums[0]


def run_schedule(
    model: Any,
    batch: RolloutBatch,
    microbatches: Microbatches,
    on_logits: Callable[[PackedMicrobatch, torch.Tensor], Any],
    *,
    forward_only: bool,
) -> list[Any]:
    """Drive all micro-batches through megatron-core's pipeline schedule.

    on_logits(microbatch, logits [row, vocabulary slice]) runs on the last stage. With forward_only it returns
    anything, which comes back as a list; otherwise (summed loss, count, anything), and gradients are divided
    by the global count.
    """
    config = get_model_config(model)
    device = (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
    multiple = config.tensor_model_parallel_size if config.sequence_parallel else 1
    packed = (pack_microbatch(batch, samples, multiple, device) for samples in microbatches)

    def forward_step(iterator: Any, model: Any) -> tuple[torch.Tensor, Callable]:
        microbatch = next(iterator)
        output = model(microbatch.tokens, microbatch.positions, None, packed_seq_params=microbatch.attention)

        def loss(logits: torch.Tensor, non_loss_data: bool = False) -> Any:
            return on_logits(microbatch, logits.squeeze(0))

        return output, loss

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=packed,
        model=model,
        num_microbatches=len(microbatches),
        seq_length=1,  # not used: variable_seq_lengths exchanges the shapes
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )
