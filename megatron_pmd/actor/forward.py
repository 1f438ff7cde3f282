"""Packed micro-batches through megatron-core's pipeline schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.utils import get_model_config

from megatron_pmd.actor.batching import Microbatches
from megatron_pmd.actor.packing import PackedMicrobatch, Row, pack_microbatch
from megatron_pmd.actor.routing_replay import RoutingReplay
from megatron_pmd.batch import RolloutBatch
from megatron_pmd.device import current_device


def logits_of_rows(
    *, hidden_states: torch.Tensor, output_layer: Any, output_weight: torch.Tensor | None,
    context: torch.Tensor, **_: Any,
) -> torch.Tensor:  # fmt: skip
    """An `output_processor` of GPTModel.forward: the logits of these rows alone, [1, rows, vocabulary slice].

    hidden_states  [tokens here, 1, hidden]
    context        numbers of the rows; a prompt's logits, which no loss reads, are neither computed nor kept

    Under sequence parallelism the ranks gather their rows before the layer instead of in it, as GPTModel
    itself does to take the last token's logits.
    """
    scattered = output_layer.sequence_parallel
    if scattered:
        # the layer sums the gradient of the whole rows over the ranks; each then keeps its part
        hidden_states = gather_from_sequence_parallel_region(
            hidden_states, tensor_parallel_output_grad=False, group=output_layer.tp_group
        )
    output_layer.sequence_parallel = False
    try:
        logits, _ = output_layer(hidden_states.index_select(0, context), weight=output_weight)
    finally:
        output_layer.sequence_parallel = scattered
    return logits.transpose(0, 1)


def _packed(
    batch: RolloutBatch, work: Sequence[tuple[list[int], bool]], row: Row
) -> Iterator[PackedMicrobatch]:
    """Each of the micro-batches, samples and whether they are supervised, when it is asked for."""
    device = current_device()
    for samples, supervised in work:
        yield pack_microbatch(batch, samples, row, device, supervised=supervised)


def run_schedule(
    chunks: list[Any],
    batch: RolloutBatch,
    microbatches: Microbatches,
    row: Row,
    on_logits: Callable[[PackedMicrobatch, torch.Tensor], Any],
    *,
    forward_only: bool,
    on_microbatch: Callable[[], None],
    examples: Microbatches | None = None,
    replay: RoutingReplay | None = None,
) -> list[Any]:
    """Drive all micro-batches through megatron-core's pipeline schedule and this rank's chunks of the model.

    examples: micro-batches of supervised examples, which come after those of responses.
    on_logits(microbatch, logits [response tokens here, vocabulary slice]) runs on the last stage. With
    forward_only it returns anything, which comes back as a list; otherwise (summed loss, count, anything),
    and gradients are divided by the global count. on_microbatch() is called before each, on every stage.
    replay: routers choose the experts that the batch has recorded.
    """
    # else Float16Module hands on an fp32 copy of all logits
    as_computed = {"fp32_output": False} if get_model_config(chunks[0]).bf16 else {}
    work = [(samples, False) for samples in microbatches] + [(samples, True) for samples in examples or []]
    # every chunk of an interleaved pipeline reads the micro-batches by itself
    packed = [_packed(batch, work, row) for _ in chunks]

    def forward_step(iterator: Any, model: Any) -> tuple[torch.Tensor, Callable]:
        on_microbatch()
        microbatch = next(iterator)
        if replay:
            layers = get_model_config(model).num_layers
            replay.begin(model, microbatch.experts.view(len(microbatch.experts), layers, -1))
        output = model(
            microbatch.tokens, microbatch.positions, None, packed_seq_params=microbatch.attention,
            output_processor=logits_of_rows, output_processor_context=microbatch.rows, **as_computed,
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
        for chunk in chunks:
            replay.clear(chunk)
    return results
