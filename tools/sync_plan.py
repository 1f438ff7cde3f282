"""What the plan of a weight sync moves, counted for recipes without weights, ranks or devices.

`python -m tools.sync_plan` prints the table of docs/benchmarks.md. Who holds what follows from the recipe's
layout (megatron-core 0.19.2, parallel_state.py: ranks count tensor, context, data, pipeline; an expert's
ranks count expert-tensor, expert, data, pipeline) and from the model's config.json (planner/models.json).
The plan is the one that a run makes: weight_sync/plan.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import typer

from megatron_pmd.config import RunConfig
from megatron_pmd.engine.sglang_server import expert_parallel
from megatron_pmd.fp8 import is_quantized
from megatron_pmd.planner.shapes import MODELS
from megatron_pmd.planner.sharding import layers_of_stages
from megatron_pmd.weight_sync.plan import (
    PIECE_BYTES,
    BucketPlan,
    Plan,
    Region,
    make_plan,
    message_bytes,
)
from megatron_pmd.weight_sync.readers import readers_of
from megatron_pmd.weight_sync.routes import WITHIN_NODE, Route
from megatron_pmd.weight_sync.shards import blockwise, whole_blocks
from recipes import recipe

RANKS_PER_NODE = 8
GOALS = {
    "qwen3_30b_a3b_dapo_32xh100": 3.0,
    "qwen3_235b_a22b_128xh100": 5.0,
    "deepseek_v3_256xh100": 10.0,
    "kimi_k2_1t_512xh100": 15.0,
}
"""Seconds of a whole sync, by recipe."""

Split = int | None
"""The dimension that tensor parallelism divides; None: every rank has the whole tensor."""
Tensor = tuple[str, tuple[int, ...], Split]
"""Name, shape, split."""


@dataclass(frozen=True)
class Links:
    """Assumed speeds: data sheets, and orders of magnitude where there are none."""

    card_bytes_per_second: float = 50e9
    """One 400 Gb/s network card for each GPU, each direction."""
    nvlink_bytes_per_second: float = 450e9
    """Of one H100 within its node, each direction (900 GB/s in both)."""
    memory_bytes_per_second: float = 3.35e12
    round_seconds: float = 50e-6
    """Start and end of one exchange of messages, whatever their size."""
    tensor_seconds: float = 60e-6
    """The host's part in one tensor, in rank or engine: views, starts of kernels, SGLang's loader."""
    bucket_seconds: float = 20e-3
    """One request to the engines, from the rank to all of their processes and back."""


def _tensors(config: dict[str, Any], layer: int) -> Iterator[Tensor]:
    """Those of one layer outside the routed experts."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    prefix = f"model.layers.{layer}."
    attention = prefix + "self_attn."
    yield prefix + "input_layernorm.weight", (hidden,), None
    yield prefix + "post_attention_layernorm.weight", (hidden,), None
    if "kv_lora_rank" in config:
        rope, nope = config["qk_rope_head_dim"], config["qk_nope_head_dim"]
        latent, compressed, value = config["kv_lora_rank"], config["q_lora_rank"], config["v_head_dim"]
        yield attention + "q_a_proj.weight", (compressed, hidden), None
        yield attention + "q_a_layernorm.weight", (compressed,), None
        yield attention + "q_b_proj.weight", (heads * (nope + rope), compressed), 0
        yield attention + "kv_a_proj_with_mqa.weight", (latent + rope, hidden), None
        yield attention + "kv_a_layernorm.weight", (latent,), None
        yield attention + "kv_b_proj.weight", (heads * (nope + value), latent), 0
        yield attention + "o_proj.weight", (hidden, heads * value), 1
    else:
        width, groups = config["head_dim"], config["num_key_value_heads"]
        yield attention + "q_proj.weight", (heads * width, hidden), 0
        yield attention + "k_proj.weight", (groups * width, hidden), 0
        yield attention + "v_proj.weight", (groups * width, hidden), 0
        yield attention + "o_proj.weight", (hidden, heads * width), 1
        yield attention + "q_norm.weight", (width,), None
        yield attention + "k_norm.weight", (width,), None
    if layer < config.get("first_k_dense_replace", 0):
        yield from _gated(prefix + "mlp.", config["intermediate_size"], hidden)
        return
    yield prefix + "mlp.gate.weight", (_experts(config), hidden), None
    if "n_shared_experts" in config:
        yield prefix + "mlp.gate.e_score_correction_bias", (_experts(config),), None
        shared = config["n_shared_experts"] * config["moe_intermediate_size"]
        yield from _gated(prefix + "mlp.shared_experts.", shared, hidden)


def _gated(prefix: str, width: int, hidden: int) -> Iterator[Tensor]:
    yield prefix + "gate_proj.weight", (width, hidden), 0
    yield prefix + "up_proj.weight", (width, hidden), 0
    yield prefix + "down_proj.weight", (hidden, width), 1


def _experts(config: dict[str, Any]) -> int:
    # transformers 5 writes num_local_experts where the published files of Qwen say num_experts
    names = ("n_routed_experts", "num_experts", "num_local_experts")
    return int(next(config[name] for name in names if config.get(name)))


def held_by_ranks(run: RunConfig, model: dict[str, Any]) -> list[list[Region]]:
    """By rank, what it holds of a mixture of experts: what ShardExport.regions says on that rank.

    model: the fields of its config.json. Of a matrix in FP8 no block may be cut by the layout.
    """
    layout, vocabulary = run.layout, (model["vocab_size"], model["hidden_size"])
    held = []
    for rank in range(layout.ranks):
        within, stage = rank % layout.ranks_per_stage, rank // layout.ranks_per_stage
        tensor, expert_tensor = within % layout.tensor, within % layout.experts_tensor
        expert = within // layout.experts_tensor % layout.expert
        parts: list[Region] = []
        if stage == 0:
            parts += _parts(("model.embed_tokens.weight", vocabulary, 0), tensor, layout.tensor, run)
        for layer in layers_of_stages(model["num_hidden_layers"], run)[stage]:
            for whole in _tensors(model, layer):
                parts += _parts(whole, tensor, layout.tensor, run)
            if layer < model.get("first_k_dense_replace", 0):
                continue
            each = _experts(model) // layout.expert
            for number in range(expert * each, (expert + 1) * each):
                prefix = f"model.layers.{layer}.mlp.experts.{number}."
                for whole in _gated(prefix, model["moe_intermediate_size"], model["hidden_size"]):
                    parts += _parts(whole, expert_tensor, layout.experts_tensor, run)
        if stage == layout.pipeline - 1:
            parts += _parts(("model.norm.weight", vocabulary[1:], None), tensor, layout.tensor, run)
            parts += _parts(("lm_head.weight", vocabulary, 0), tensor, layout.tensor, run)
        held.append(parts)
    return held


def _parts(whole: Tensor, rank: int, ways: int, run: RunConfig) -> list[Region]:
    name, shape, split = whole
    fp32 = name.endswith("e_score_correction_bias") or run.model.precision == "fp32"
    region = Region.whole(name, "float32" if fp32 else "bfloat16", shape)
    if split is not None and ways > 1:
        length = shape[split] // ways
        region = Region(name, region.dtype, shape, split, rank * length, length)
    if not (run.rollout.fp8 and is_quantized(name)):
        return [region]
    assert whole_blocks(region), f"{name}: the layout cuts its blocks"
    return list(blockwise(region))


def model_of(run: RunConfig) -> dict[str, Any]:
    """The fields of its model's config.json."""
    known: dict[str, Any] = json.loads(MODELS.read_text())
    return dict(known[Path(run.model.path).name]["config"])


def plan_of(run: RunConfig, held: list[list[Region]]) -> Plan:
    """The plan that a run of this recipe makes on GPUs, eight a node; held: by rank, what it holds."""
    ranks, size = run.layout.ranks, run.ranks_per_engine
    nodes = [rank // RANKS_PER_NODE for rank in range(ranks)]
    serves = [range(rank, rank + run.devices_per_engine) if rank % size == 0 else () for rank in range(ranks)]
    readers = readers_of(nodes, serves, on_device=True, expert_parallel=expert_parallel(run.rollout))
    return make_plan(held, readers, capacity=run.sync.bucket_megabytes * 2**20)


@dataclass
class Traffic:
    """Of a whole sync. Arrays are by rank."""

    across_out: npt.NDArray[np.int64]
    """Bytes that its network card sends."""
    across_in: npt.NDArray[np.int64]
    within_out: npt.NDArray[np.int64]
    """Bytes that it sends over NVLink."""
    within_in: npt.NDArray[np.int64]
    messages: npt.NDArray[np.int64]
    """That it sends."""
    reads: npt.NDArray[np.int64]
    """Bytes of its own parameters that it reads, in the form that they leave in."""
    staging: int
    """Most bytes that a rank holds at one time beside its buckets, or more."""
    rounds: int
    """In which anything crosses nodes, pieces of long messages counted one by one."""
    across_seconds: float
    """Each round as long as the card that has most to carry, one after the other."""
    within_seconds: float
    loads: int
    """Tensors that the engine's rank with most of them loads."""


def traffic(plan: Plan, ranks: int, links: Links) -> Traffic:
    """Send every message of the plan, and count."""
    zeros = lambda: np.zeros(ranks, np.int64)  # noqa: E731
    found = Traffic(zeros(), zeros(), zeros(), zeros(), zeros(), zeros(), 0, 0, 0.0, 0.0, 0)
    hops: dict[Route, npt.NDArray[np.int64]] = {}
    for bucket in plan.buckets:
        _count(plan, bucket, hops, found, links)
    kinds = range(len(plan.buckets[0].layouts))
    found.loads = max(sum(len(bucket.layouts[kind].entries) for bucket in plan.buckets) for kind in kinds)
    return found


def _count(
    plan: Plan, bucket: BucketPlan, hops: dict[Route, npt.NDArray[np.int64]], found: Traffic, links: Links
) -> None:
    ranks = len(found.reads)
    rows, sizes, kept = [], [], np.zeros(ranks, np.int64)
    for way, regions in bucket.ways.items():
        size = message_bytes(regions)
        if way not in hops:
            hops[way] = np.array([(h.round, h.source, h.target) for h in way.hops], np.int64).reshape(-1, 3)
        rows.append(hops[way])
        sizes.append(np.full(len(hops[way]), size))
        found.reads[list(way.roots)] += size
        for root in way.roots:
            kind = plan.kinds.get(root)
            if kind is None or regions[0].name not in bucket.layouts[kind].entries:
                kept[root] += size  # what a rank's own bucket holds is sent on from there
    every, size_of = np.concatenate(rows), np.concatenate(sizes)
    largest = max(region.nbytes for regions in bucket.ways.values() for region in regions)
    for number in np.unique(every[:, 0]):
        now = every[:, 0] == number
        pairs, place = np.unique(every[now, 1] * ranks + every[now, 2], return_inverse=True)
        nbytes = np.bincount(place, size_of[now])
        sources, targets, pieces = pairs // ranks, pairs % ranks, -(-nbytes // PIECE_BYTES)
        out, came = (np.bincount(ends, nbytes, ranks).astype(np.int64) for ends in (sources, targets))
        found.messages += np.bincount(sources, pieces, ranks).astype(np.int64)
        at_a_time = np.minimum(nbytes, max(PIECE_BYTES, largest))
        staged = np.bincount(sources, at_a_time, ranks) + np.bincount(targets, at_a_time, ranks)
        found.staging = max(found.staging, int((kept + staged).max()))
        busiest, waits = int(max(out.max(), came.max())), int(pieces.max()) * links.round_seconds
        if number < WITHIN_NODE:
            found.across_out += out
            found.across_in += came
            found.rounds += int(pieces.max())
            found.across_seconds += busiest / links.card_bytes_per_second + waits
        else:
            found.within_out += out
            found.within_in += came
            found.within_seconds += busiest / links.nvlink_bytes_per_second + waits


@dataclass(frozen=True)
class Seconds:
    """Of a sync, computed: writing a bucket and loading the one before go on at the same time."""

    write: float
    load: float

    @property
    def total(self) -> float:
        """The slower of both, and one bucket's worth of the other at the ends."""
        return max(self.write, self.load) + min(self.write, self.load) / 8


def seconds(plan: Plan, counted: Traffic, links: Links) -> Seconds:
    """Writing: what every round takes, the rank's own reading (twice as wide before it is FP8), and three
    passes over what it packs and unpacks. Loading: a pass for the checksums and two for the copy.
    """
    own, bytes_each = int(counted.reads.max()), max(_bytes_of_kinds(plan))
    through = int((counted.across_in + counted.within_in + counted.across_out + counted.within_out).max())
    device = (3 * own + 3 * through) / links.memory_bytes_per_second
    write = counted.across_seconds + counted.within_seconds + device
    loading = 3 * bytes_each / links.memory_bytes_per_second
    host = counted.loads * links.tensor_seconds
    return Seconds(write + host, loading + host + len(plan.buckets) * links.bucket_seconds)


def _bytes_of_kinds(plan: Plan) -> list[int]:
    return [
        sum(entry.nbytes for bucket in plan.buckets for entry in bucket.layouts[kind].entries.values())
        for kind in range(len(plan.buckets[0].layouts))
    ]


def main() -> None:
    """Print the table."""
    links = Links()
    print(
        "| recipe | model, GB | buckets | into a card, GB | out of a card, GB | over NVLink, GB "
        "| messages of a rank | rounds across nodes | staging, MB | network cards, s | sync, s | goal, s |"
    )
    print("|---|" + "--:|" * 11)
    for name, goal in GOALS.items():
        run = recipe(name)
        plan = plan_of(run, held_by_ranks(run, model_of(run)))
        counted = traffic(plan, run.layout.ranks, links)
        columns = [
            f"`{name}`",
            f"{plan.bytes / 1e9:,.0f}",
            f"{len(plan.buckets)}",
            *(f"{of.max() / 1e9:.1f}" for of in (counted.across_in, counted.across_out, counted.within_out)),
            f"{counted.messages.max():,}",
            f"{counted.rounds}",
            f"{counted.staging / 1e6:,.0f}",
            f"{counted.across_seconds:.1f}",
            f"{seconds(plan, counted, links).total:.1f}",
            f"{goal:g}",
        ]
        print(f"| {' | '.join(columns)} |")


if __name__ == "__main__":
    typer.run(main)
