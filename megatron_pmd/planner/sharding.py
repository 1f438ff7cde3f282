"""Which parameters a rank holds: what megatron-core's layout comes to, counted without megatron-core."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_pmd.config import RunConfig
from megatron_pmd.errors import LayoutError
from megatron_pmd.planner.shapes import Shape

BYTES = {"fp32": 4, "bf16": 2}

STATE_BYTES = 12
"""Of one parameter in a checkpoint: fp32 main parameter and both moments, whatever they are in memory."""
GRADIENT_BYTES = 4
"""Gradients are summed in fp32 (grad_reduce_in_fp32)."""


def optimizer_bytes_each(config: RunConfig) -> int:
    """Of one parameter: two moments, and for bf16 parameters an fp32 main copy. fp32 ones are their own."""
    return 2 * BYTES[config.optimizer.moments] + (4 if config.model.precision == "bf16" else 0)


def muon_bytes_each(config: RunConfig) -> int:
    """The same of a matrix of Muon's, in memory and in a checkpoint: one momentum instead of two moments."""
    return 4 + (4 if config.model.precision == "bf16" else 0)


def computed_in_fp8(shape: Shape, config: RunConfig, layer: int) -> tuple[int, int]:
    """(dense, routed experts') parameters of a layer on one rank that an FP8 recipe multiplies with: all
    matrices but the router's."""
    layout, fp8, attention = config.layout, config.actor.fp8, shape.attention_of(layer)
    if fp8 is None or not fp8.first_layers_bf16 <= layer < shape.layers - fp8.last_layers_bf16:
        return 0, 0
    split, _, routed = shape.feed_forward_of(layer)
    divided = split + attention.split - attention.split_vectors
    whole = attention.replicated - attention.replicated_vectors
    routed -= shape.routed_vectors if routed else 0
    return divided // layout.tensor + whole, routed // (layout.expert * layout.experts_tensor)


@dataclass(frozen=True)
class Stage:
    """One pipeline stage, seen from any of its ranks."""

    number: int
    layers: range
    dense: int
    """Parameters outside routed experts on one rank."""
    experts: int
    """Parameters of routed experts on one rank."""
    trained_dense: int
    """Those of `dense` that are trained: all, or those of adapters."""
    trained_experts: int
    dense_shards: int
    """Ranks that share out the optimizer state of the dense parameters."""
    expert_shards: int
    muon_dense: int
    """Of `dense`, parameters of matrices that Muon updates: it keeps one momentum of them; 0 under Adam."""
    muon_experts: int
    """The same of `experts`."""
    holds_logits: bool
    bytes_each: int
    """Of a weight that is not held in FP8."""
    fp8_dense: int
    """Of `dense`, parameters of matrices that are multiplied in FP8; 0 without a recipe."""
    fp8_experts: int
    """The same of `experts`."""
    holds_fp8: bool
    """Whether those are held in FP8 alone (actor.fp8.parameter_gather)."""
    optimizer_bytes_each: int
    muon_bytes_each: int

    @property
    def parameters(self) -> int:
        return self.dense + self.experts

    @property
    def in_fp8(self) -> int:
        return self.fp8_dense + self.fp8_experts

    @property
    def share(self) -> float:
        """Parameters of which this rank holds the optimizer state, and writes the weights."""
        return self.trained_dense / self.dense_shards + self.trained_experts / self.expert_shards

    @property
    def muon_share(self) -> float:
        """Of `share`, parameters of matrices that Muon updates."""
        return self.muon_dense / self.dense_shards + self.muon_experts / self.expert_shards

    @property
    def weight_bytes(self) -> int:
        held = self.in_fp8 if self.holds_fp8 else 0
        return (self.parameters - held) * self.bytes_each + held

    @property
    def fp8_copies_bytes(self) -> int:
        """What Transformer Engine makes of the weights in the first forward pass after a step, and keeps: one
        copy by row and one by column; of weights held in FP8 that by row is the weight itself."""
        return self.in_fp8 * (1 if self.holds_fp8 else 2)

    @property
    def gradient_bytes(self) -> int:
        return (self.trained_dense + self.trained_experts) * GRADIENT_BYTES

    @property
    def optimizer_bytes(self) -> float:
        """Mean over the ranks that share it. One rank's part differs by less than its padding; under Muon, of
        which a rank has whole matrices, by less than the largest of them."""
        adams = self.share - self.muon_share
        return adams * self.optimizer_bytes_each + self.muon_share * self.muon_bytes_each


def layers_of_stages(layers: int, config: RunConfig) -> list[range]:
    """The layers of each pipeline stage; uneven ends as megatron-core's own two settings ask.

    Raises LayoutError when the layers cannot be dealt out.
    """
    stages, chunks, settings = config.layout.pipeline, config.layout.virtual_pipeline, config.actor.megatron
    first = settings.get("num_layers_in_first_pipeline_stage")
    last = settings.get("num_layers_in_last_pipeline_stage")
    rest = layers - (first or 0) - (last or 0)
    middle = stages - (first is not None) - (last is not None)
    if rest < 0 or (rest % (middle * chunks) if middle > 0 else rest):
        virtual = f" x virtual_pipeline={chunks}" if chunks > 1 else ""
        raise LayoutError(
            f"layout.pipeline={stages}{virtual} does not divide the {layers} layers; choose another, or set "
            "num_layers_in_first_pipeline_stage and num_layers_in_last_pipeline_stage in actor.megatron"
        )
    counts = [rest // middle if middle > 0 else 0] * stages
    if first is not None:
        counts[0] = first
    if last is not None:
        counts[-1] = last
    starts = [sum(counts[:i]) for i in range(stages)]
    return [range(start, start + count) for start, count in zip(starts, counts, strict=True)]


def check_divides(shape: Shape, config: RunConfig) -> None:
    """Raise LayoutError naming the first thing that the layout does not divide."""
    linear = shape.linear.attention if shape.linear else None
    config.layout.check_model(
        shape.name,
        heads=shape.attention.heads,
        vocabulary=shape.vocabulary,
        key_value_heads=shape.attention.key_value_heads,
        experts=shape.feed_forward.experts,
        linear_key_heads=linear.key_value_heads if linear else None,
    )
    if config.actor.lora:
        shape.targets(config)
    layers_of_stages(shape.layers, config)


def adapters_of_layers(shape: Shape, config: RunConfig, layers: range) -> tuple[int, int]:
    """(dense, routed experts') parameters of their adapters, over all ranks."""
    assert config.actor.lora is not None
    targets = shape.targets(config)
    counts = [shape.adapters(layer, config.actor.lora.rank, targets) for layer in layers]
    return sum(dense for dense, _ in counts), sum(routed for _, routed in counts)


def stages(shape: Shape, config: RunConfig) -> list[Stage]:
    """Every pipeline stage. Raises LayoutError for a layout that the model cannot have."""
    check_divides(shape, config)
    layout, muon = config.layout, config.optimizer.name == "muon"
    pieces = layers_of_stages(shape.layers, config)
    result = []
    for number, layers in enumerate(pieces):
        first, last = number == 0, number == layout.pipeline - 1
        # tied embeddings: the last stage keeps a copy of its own
        matrices = int(first) + int(last and not (shape.embeddings.tied and first))
        split, replicated, routed = matrices * shape.embedding, int(last) * shape.norms.each, 0
        adams, experts_adams = split // layout.tensor + replicated, 0
        for layer in layers:
            adams += shape.attention_of(layer).split_vectors // layout.tensor + shape.replicated_vectors(
                layer
            )
            parts = shape.layer(layer)
            split, replicated, routed = split + parts[0], replicated + parts[1], routed + parts[2]
            experts_adams += shape.routed_vectors if parts[2] else 0
        dense = split // layout.tensor + replicated
        experts = routed // (layout.expert * layout.experts_tensor)
        trained_dense, trained_experts = dense, experts
        if config.actor.lora:
            counts = adapters_of_layers(shape, config, layers)
            trained_dense = counts[0] // layout.tensor
            trained_experts = counts[1] // (layout.expert * layout.experts_tensor)
            dense, experts = dense + trained_dense, experts + trained_experts
        in_fp8 = [computed_in_fp8(shape, config, layer) for layer in layers]
        result.append(
            Stage(
                number=number,
                layers=layers,
                dense=dense,
                experts=experts,
                trained_dense=trained_dense,
                trained_experts=trained_experts,
                dense_shards=layout.ranks // (layout.pipeline * layout.tensor),
                expert_shards=layout.ranks // (layout.pipeline * layout.expert * layout.experts_tensor),
                muon_dense=dense - adams if muon else 0,
                muon_experts=experts - experts_adams // layout.expert if muon else 0,
                holds_logits=last,
                bytes_each=BYTES[config.model.precision],
                fp8_dense=sum(dense for dense, _ in in_fp8),
                fp8_experts=sum(routed for _, routed in in_fp8),
                holds_fp8=bool(config.actor.fp8 and config.actor.fp8.parameter_gather),
                optimizer_bytes_each=optimizer_bytes_each(config),
                muon_bytes_each=muon_bytes_each(config),
            )
        )
    return result
