"""Memory of the devices by phase and owner, of the hosts, of the KV cache and of a checkpoint, in bytes.

Weights, gradients and optimizer are counted. Activations, left-overs and processes are estimates, whose
assumptions are in hardware.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_pmd.config import RunConfig
from megatron_pmd.engine.placement import groups_of, sampled_by, senders_of
from megatron_pmd.planner.engine_reserve import engine_reserve, mem_fraction_static
from megatron_pmd.planner.hardware import Assumptions, Machines
from megatron_pmd.planner.saving import save_of
from megatron_pmd.planner.shapes import Shape
from megatron_pmd.planner.sharding import (
    BYTES,
    STATE_BYTES,
    Stage,
    adapters_of_layers,
    muon_bytes_each,
)

Owners = dict[str, float]
"""Bytes by owner."""

ENGINE_COMMUNICATORS = 3
"""Process groups in which an engine's ranks talk through NCCL: all of them, tensor, experts or attention."""
FP8_BLOCK = 128
ROLLOUT_TOKEN_BYTES = 32
"""A token on the driver's node: 8 as a sample's arrays, some 4 of text, 13 packed for the ranks."""


@dataclass(frozen=True)
class Cache:
    """An engine's KV cache."""

    bytes_per_device: float
    tokens: int
    """Over the whole engine."""
    longest_samples: int
    """So many samples of the greatest length fit at one time."""
    slots: int
    """Requests of mean length that the engine may decode at one time, as rollout.max_running_requests and the
    cache allow."""
    running: int
    """Requests decoded at one time: as many as a rollout asks of the engine, at most `slots`."""


def mean_response(config: RunConfig, assume: Assumptions) -> float:
    """Tokens of a response."""
    return config.batch.max_response_tokens * assume.response_share


def mean_length(config: RunConfig, assume: Assumptions) -> float:
    """Tokens of a prompt with its response."""
    return config.batch.max_prompt_tokens / 2 + mean_response(config, assume)


def activation_bytes(shape: Shape, config: RunConfig, stage: Stage, assume: Assumptions) -> float:
    """Greatest sum of what the passes keep for the backward pass, on one rank of a stage.

    1F1B keeps as many micro-batches in flight as there are stages after this one, and itself.
    """
    tokens, width = config.batch.max_tokens_per_microbatch, BYTES[config.model.precision]
    inputs = tokens * shape.hidden * width / config.layout.tensor  # sequence parallelism shares it out
    whole = max((_layer_bytes(shape, config, layer, assume) for layer in stage.layers), default=0.0)
    pipeline, chunks, layers = config.layout.pipeline, config.layout.virtual_pipeline, len(stage.layers)
    in_flight = float(min(pipeline - stage.number, microbatches_per_step(config)))
    if chunks > 1:  # interleaved stages hold more: arXiv 2205.05198, section 4.2.3
        in_flight *= 1 + (pipeline - 1) / (pipeline * chunks)
    if config.actor.recompute == "full":
        # inputs of all layers in flight, those not computed again, and one layer with its gradients
        again = min(layers, (config.actor.recompute_layers or layers) * chunks)
        kept = in_flight * (layers * inputs + (layers - again) * whole) + 2 * whole
    else:
        kept = in_flight * layers * (whole + inputs)
    return kept + (_logits_bytes(shape, config) if stage.holds_logits else 0.0)


def _layer_bytes(shape: Shape, config: RunConfig, layer: int, assume: Assumptions) -> float:
    """One layer's activations with fused attention: every matrix's input, and what the norms keep."""
    tokens, width, tensor = (
        config.batch.max_tokens_per_microbatch,
        BYTES[config.model.precision],
        config.layout.tensor,
    )
    attention = shape.attention_of(layer)
    residual = 2 * shape.norms.in_layer * shape.hidden / tensor  # the norms' inputs and outputs
    heads = (attention.score_width + attention.query_values + 2 * attention.cached_values) / tensor
    again, has_experts = config.actor.recompute_modules, layer >= shape.feed_forward.dense_layers
    dense = 3 * (
        shape.feed_forward.shared_intermediate if has_experts else shape.feed_forward.dense_intermediate
    )
    if ("shared_experts" if has_experts else "mlp") in again:
        dense = 0
    values = residual + heads + dense / tensor
    if has_experts and "moe" not in again:
        # tokens arrive once for each expert chosen; input, gate and up, product, output
        widths = 2 if "moe_act" in again else 3
        routed = (
            2 * shape.hidden + widths * shape.feed_forward.expert_intermediate / config.layout.experts_tensor
        )
        values += assume.expert_imbalance * shape.feed_forward.experts_per_token / tensor * routed
    return tokens * values * width


def _logits_bytes(shape: Shape, config: RunConfig) -> float:
    """All logits with their gradient, and a chunk of them in fp32, with a copy and a gradient."""
    columns = shape.vocabulary / config.layout.tensor
    whole = 2 * config.batch.max_tokens_per_microbatch * BYTES[config.model.precision]
    return columns * (whole + 3 * config.actor.log_prob_chunk_tokens * 4)


def microbatches_per_step(config: RunConfig) -> int:
    """Micro-batches of one optimizer step on each rank, were every sample of half the greatest length."""
    batch = config.batch
    tokens = batch.samples_per_step * (batch.max_prompt_tokens + batch.max_response_tokens) / 2
    replicas = config.layout.ranks // (config.layout.tensor * config.layout.pipeline)
    return max(1, round(tokens / replicas / batch.max_tokens_per_microbatch + 0.499))


def engine_weight_bytes(shape: Shape, config: RunConfig) -> float:
    """On one device of an engine, with the parts that SGLang's options hold more than once."""
    options, size = config.rollout.sglang, config.rollout.tensor_parallel
    parts = [shape.attention_of(layer) for layer in range(shape.layers)]
    attention = sum(part.split + part.replicated for part in parts)
    sparse = shape.layers - shape.feed_forward.dense_layers if shape.feed_forward.experts else 0
    dense = (
        shape.feed_forward.dense_layers * shape.feed_forward_of(0)[0]
        if options.get("moe_dense_tp_size") == 1
        else 0
    )
    shared = sparse * 3 * shape.hidden * shape.feed_forward.shared_intermediate
    shared = shared if options.get("moe_a2a_backend") == "deepep" else 0
    divided = shape.total - attention - dense - shared
    values = divided / size + attention / attention_ranks(config) + dense + shared
    return _bytes_in_engines(values, shape.ends / size, config)


def transferred_bytes(shape: Shape, config: RunConfig) -> float:
    """Of all weights, as they pass from the actors to the engines."""
    return _bytes_in_engines(shape.total, shape.ends, config)


def _bytes_in_engines(values: float, ends: float, config: RunConfig) -> float:
    """ends: how many of the values are of the embedding and the output layer, which FP8 engines keep as they
    are (fp8.QUANTIZED)."""
    width = BYTES[config.model.precision]
    return (values - ends) * (1 if config.rollout.fp8 else width) + ends * width


def unaligned_widths(shape: Shape, config: RunConfig) -> list[str]:
    """Matrices whose part on one device of an FP8 engine is not made of whole blocks: SGLang refuses them."""
    if not config.rollout.fp8:
        return []
    options, size = config.rollout.sglang, config.rollout.tensor_parallel
    widths = []
    if shape.feed_forward.experts:
        slices = size // config.rollout.expert_groups
        widths.append(("an expert", shape.feed_forward.expert_intermediate, slices))
    if shape.feed_forward.dense_layers:
        widths.append(
            ("a dense layer", shape.feed_forward.dense_intermediate, options.get("moe_dense_tp_size") or size)
        )
    if shape.feed_forward.shared_intermediate and options.get("moe_a2a_backend") != "deepep":
        widths.append(("the shared experts", shape.feed_forward.shared_intermediate, size))
    return [f"{what}'s {width} / {ways}" for what, width, ways in widths if width % (ways * FP8_BLOCK)]


def attention_ranks(config: RunConfig) -> int:
    """Ranks of an engine that share one copy of attention and its cache."""
    return config.rollout.tensor_parallel // config.rollout.sglang.get("attn_dp_size", 1)


def cache(shape: Shape, config: RunConfig, machines: Machines, assume: Assumptions) -> Cache:
    """What is left to the KV cache beside an engine's weights; zero tokens when those alone do not fit."""
    rollout, batch = config.rollout, config.batch
    ways = attention_ranks(config)
    groups = rollout.tensor_parallel // ways
    value = 1 if str(rollout.sglang.get("kv_cache_dtype", "")).startswith("fp8") else None
    width = value or BYTES[config.model.precision]
    token = (
        shape.caching_layers * shape.attention.cached_values / min(ways, shape.attention.cache_heads) * width
    )
    states = 0.0
    if machines.shares_host_memory:
        tokens = rollout.max_total_tokens or 0
    else:
        # An engine starts before its actor: of that there is no more than a CUDA context on the device.
        device = machines.device.memory_bytes
        room = device - assume.cuda_context_bytes - _engine_processes_bytes(config, assume)
        share = mem_fraction_static(shape, config, device)
        free = max(0.0, share * room - engine_weight_bytes(shape, config))
        # of free memory, beside a cache's part of 1, this part is for the states of linear attention
        states = rollout.sglang.get("mamba_full_memory_ratio", 0.9) if shape.linear else 0.0
        tokens = int(free / (1 + states) / token) * groups
        if rollout.max_total_tokens is not None:
            tokens = min(tokens, rollout.max_total_tokens)
    longest = batch.max_prompt_tokens + batch.max_response_tokens
    asked = -(-batch.samples_per_rollout // config.engines)
    slots = min(rollout.max_running_requests, int(tokens / mean_length(config, assume)))
    return Cache(
        bytes_per_device=tokens / groups * token * (1 + states),
        tokens=tokens,
        longest_samples=tokens // longest,
        slots=slots,
        running=min(slots, asked),
    )


def actor_communicators(config: RunConfig) -> int:
    """Process groups of more than one rank in which an actor rank talks through NCCL."""
    layout = config.layout
    together = layout.tensor * layout.pipeline
    experts = layout.expert * layout.experts_tensor
    sizes = [
        layout.tensor, layout.pipeline, layout.context, layout.data * layout.context, layout.expert,
        layout.experts_tensor, layout.ranks // (layout.pipeline * experts), together,
        layout.ranks,  # all, for the schedule
        min(layout.ranks, 2),  # one of all ranks, for the weight sync
    ]  # fmt: skip
    return sum(size > 1 for size in sizes)


def actor_left_over_bytes(config: RunConfig, assume: Assumptions) -> float:
    """What an actor rank keeps on its device while engines generate: context, NCCL's buffers, fragments."""
    communicators = actor_communicators(config) * assume.communicator_bytes
    return assume.cuda_context_bytes + communicators + assume.fragment_bytes


def update_groups(config: RunConfig, machines: Machines) -> int:
    """Process groups in which a rank sends weights to engines elsewhere, and an engine takes them
    (weight_sync/broadcast.py)."""
    if config.sync.transport != "broadcast":
        return 0
    per_node = machines.ranks_per_node(config)
    nodes = [rank // per_node for rank in range(config.layout.ranks)]
    return groups_of(senders_of(rank, nodes, config) for rank in range(config.layout.ranks))


def _engine_processes_bytes(config: RunConfig, assume: Assumptions) -> float:
    """An engine's context and NCCL buffers on one device."""
    groups = ENGINE_COMMUNICATORS if config.rollout.tensor_parallel > 1 else 0
    return assume.cuda_context_bytes + groups * assume.communicator_bytes


def device_phases(
    shape: Shape,
    config: RunConfig,
    all_stages: list[Stage],
    machines: Machines,
    assume: Assumptions,
    *,
    replay: bool,
) -> dict[str, Owners]:
    """By phase, what the fullest device holds, by owner: in `rollout` an engine's, else an actor rank's.

    `rollout` is there if the run has engines of its own, `sync` if anybody takes its weights.
    """
    separate, sampler = config.rollout.placement == "separate", sampled_by(config, replay=replay)
    beside_ranks = sampler == "engines" and not separate
    left_overs = 0.0 if machines.shares_host_memory else actor_left_over_bytes(config, assume)
    if beside_ranks and not machines.shares_host_memory:
        # CUDA graphs with their buffers stay while the actor trains
        graphs = engine_reserve(shape, config, machines.device.memory_bytes).graphs
        left_overs += _engine_processes_bytes(config, assume) + graphs
    bucket = config.sync.bucket_megabytes * 2**20
    groups = 0 if machines.shares_host_memory or sampler is None else update_groups(config, machines)
    # made in the first update, and kept
    to_engines: Owners = {"groups of weight updates": groups * assume.communicator_bytes} if groups else {}

    def weights(stage: Stage) -> Owners:
        copies = {"FP8 copies of weights": float(stage.fp8_copies_bytes)} if stage.in_fp8 else {}
        return {"actor weights": stage.weight_bytes} | copies | to_engines

    def update(stage: Stage) -> Owners:
        return weights(stage) | {
            "gradients": stage.gradient_bytes,
            "optimizer": stage.optimizer_bytes * (1 - config.optimizer.offload),
            "activations": activation_bytes(shape, config, stage, assume),
            "left-overs": left_overs,
        }

    fullest = max((update(stage) for stage in all_stages), key=lambda owners: sum(owners.values()))

    def save(stage: Stage) -> Owners:
        rest = {owner: size for owner, size in update(stage).items() if owner != "activations"}
        return rest | {"gathered states": save_of(shape, config, stage, machines, assume).device_bytes}

    heaviest = max(all_stages, key=lambda stage: stage.weight_bytes + stage.fp8_copies_bytes)
    phases = {
        "rollout": _of_an_engine(shape, config, machines, assume) | to_engines,
        "update": fullest,
        "save": max((save(stage) for stage in all_stages), key=lambda owners: sum(owners.values())),
        "sync": weights(heaviest)
        | {
            "gradients": heaviest.gradient_bytes,
            # separate: the optimizer need not leave
            **({"optimizer": fullest["optimizer"]} if separate else {}),
            **({"engine weights": engine_weight_bytes(shape, config)} if beside_ranks else {}),
            "buckets": _buckets_on_device(config) * bucket + _gathered_bytes(shape, config),
            "left-overs": left_overs,
        },
    }
    absent = {"engines": (), "servers": ("rollout",), None: ("rollout", "sync")}[sampler]
    return {phase: owners for phase, owners in phases.items() if phase not in absent}


def _of_an_engine(shape: Shape, config: RunConfig, machines: Machines, assume: Assumptions) -> Owners:
    """What its device holds while it samples; colocated with what an actor rank leaves there."""
    reserve = left_overs = 0.0
    if not machines.shares_host_memory:
        reserve = engine_reserve(shape, config, machines.device.memory_bytes).total
        actor = 0.0 if config.rollout.placement == "separate" else actor_left_over_bytes(config, assume)
        left_overs = actor + _engine_processes_bytes(config, assume)
    return {
        "engine weights": engine_weight_bytes(shape, config),
        "KV cache": cache(shape, config, machines, assume).bytes_per_device,
        "engine graphs, activations": reserve,
        "left-overs": left_overs,
    }


def _buckets_on_device(config: RunConfig) -> int:
    """As large as so many: two, and a message to engines elsewhere. Engines that have other devices of the
    node open buckets in the host's memory."""
    return 3 if config.engines_elsewhere else 0 if config.devices_beside_ranks else 2


def _gathered_bytes(shape: Shape, config: RunConfig) -> float:
    """The largest tensor, gathered whole, and its parts."""
    largest = max(shape.embedding, 3 * shape.hidden * shape.feed_forward.dense_intermediate)
    return 2 * largest * BYTES[config.model.precision]


def _recorded_routing_bytes(shape: Shape, config: RunConfig) -> int:
    """Of one token: a number for each layer and expert chosen, in the sample and packed for its rank."""
    if not config.actor.experts.replay_routing:
        return 0
    part = shape.feed_forward
    return 2 * shape.layers * part.experts_per_token * (1 if part.experts <= 256 else 2)


def host_phases(
    shape: Shape, config: RunConfig, all_stages: list[Stage], machines: Machines, assume: Assumptions
) -> dict[str, Owners]:
    """Of the fullest node, by owner: what leaves the devices, weight buckets, processes, rollouts; and the
    states of a checkpoint, while they are gathered, and while they are written beside the other phases."""
    per_node = machines.ranks_per_node(config)
    heaviest = max(all_stages, key=lambda stage: stage.weight_bytes + stage.optimizer_bytes)
    batch = config.batch
    rollout = batch.samples_per_rollout * (batch.max_prompt_tokens + batch.max_response_tokens)
    process = assume.cpu_process_bytes if machines.shares_host_memory else assume.process_host_bytes
    owners: Owners = {
        "processes": per_node * process,
        "rollouts": rollout * (ROLLOUT_TOKEN_BYTES + _recorded_routing_bytes(shape, config)),
    }
    separate = config.rollout.placement == "separate"
    if machines.shares_host_memory or config.devices_beside_ranks:
        owners["weight buckets"] = 2 * config.sync.bucket_megabytes * 2**20
    if not machines.shares_host_memory:
        offloaded = {"weights": heaviest.weight_bytes, "optimizer": heaviest.optimizer_bytes}
        if separate:  # the actor leaves its device to nobody
            offloaded = {"optimizer": heaviest.optimizer_bytes * config.optimizer.offload}
        owners |= {f"offloaded {what}": per_node * size for what, size in offloaded.items() if size}
    saves = [save_of(shape, config, stage, machines, assume) for stage in all_stages]
    save = max(saves, key=lambda save: save.gathered_bytes + save.copies_bytes)
    return {
        "save": owners
        | {"gathered states": save.gathered_bytes, "copies of gathered states": save.copies_bytes},
        "other phases": owners | {"checkpoint being written": max(save.written_bytes for save in saves)},
    }


def checkpoint_bytes(shape: Shape, config: RunConfig) -> int:
    """One sharded checkpoint: weights, and the optimizer's moments with its fp32 main parameters."""
    saved = shape.total
    if config.actor.lora:
        saved = sum(adapters_of_layers(shape, config, range(shape.layers)))
    muons = shape.total - shape.outside_matrices if config.optimizer.name == "muon" else 0
    states = (saved - muons) * STATE_BYTES + muons * muon_bytes_each(config)
    return saved * BYTES[config.model.precision] + states
