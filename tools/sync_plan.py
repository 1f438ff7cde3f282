"""What the plan of a weight sync moves, counted for recipes without weights, ranks or devices.

`python -m tools.sync_plan` prints the table of docs/benchmarks.md. Who holds what follows from the recipe's
layout (megatron-core 0.19.2, parallel_state.py: ranks count tensor, context, data, pipeline; an expert's
ranks count expert-tensor, expert, data, pipeline) and from the model's config.json (planner/models.json).
The plan is the one that a run makes: weight_sync/plan.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import typer

from megatron_pmd.config import RunConfig, override
from megatron_pmd.engine.placement import senders_of
from megatron_pmd.engine.sglang_server import expert_parallel
from megatron_pmd.fp8 import is_quantized
from megatron_pmd.planner.shapes import MODELS
from megatron_pmd.planner.sharding import layers_of_stages
from megatron_pmd.weight_sync.plan import Plan, Region, make_plan
from megatron_pmd.weight_sync.readers import Readers, readers_of, senders_readers
from megatron_pmd.weight_sync.shards import blockwise, whole_blocks
from recipes import recipe
from tools.sync_traffic import LastHop, Links, last_hop, longest_path, seconds, traffic

RANKS_PER_NODE = 8
GOALS = {
    "qwen3_30b_a3b_dapo_32xh100": 3.0,
    "qwen3_235b_a22b_128xh100": 5.0,
    "deepseek_v3_256xh100": 10.0,
    "kimi_k2_1t_512xh100": 15.0,
}
"""Seconds of a whole sync, by recipe."""


def separate(run: RunConfig) -> RunConfig:
    """The recipe with as many nodes of engines beside those of its ranks, and twice as large buckets.

    An engine has a node at most; the largest models then need the memory of 8 H200 (141 GB each).
    """
    size = min(run.rollout.tensor_parallel, RANKS_PER_NODE)
    settings = [
        f"layout.engine_nodes={run.layout.ranks // RANKS_PER_NODE}", "rollout.placement=separate",
        "sync.transport=broadcast", f"rollout.tensor_parallel={size}",
        f"sync.bucket_megabytes={2 * run.sync.bucket_megabytes}",
        *([f"rollout.sglang.ep_size={size}"] if "ep_size" in run.rollout.sglang else []),
    ]  # fmt: skip
    return override(run, settings)


OVERLAP = "qwen3_30b_a3b_overlap_48xh100"
SEPARATE = {
    OVERLAP: (recipe(OVERLAP), 3.0),
    **{name: (separate(recipe(name)), goal) for name, goal in GOALS.items()},
}
"""With engines on nodes of their own: the run, and seconds of a whole sync, by recipe."""

Split = int | None
"""The dimension that tensor parallelism divides; None: every rank has the whole tensor."""
Tensor = tuple[str, tuple[int, ...], Split]
"""Name, shape, split."""


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
    if run.engines_elsewhere:
        readers, _ = _elsewhere(run)
    else:
        devices, size = run.devices_per_engine, run.ranks_per_engine
        serves = [tuple(range(r, r + devices)) if r % size == 0 else () for r in range(run.layout.ranks)]
        shares = expert_parallel(run.rollout)
        readers = readers_of(_nodes(run), serves, on_device=True, expert_parallel=shares)
    return make_plan(held, readers, capacity=run.sync.bucket_megabytes * 2**20)


def _nodes(run: RunConfig) -> list[int]:
    return [rank // RANKS_PER_NODE for rank in range(run.layout.ranks)]


def _machines(run: RunConfig) -> list[tuple[int, ...]]:
    """By engine node, the ranks that send there."""
    nodes = _nodes(run)
    return list(dict.fromkeys(senders_of(rank, nodes, run) for rank in range(run.layout.ranks)))


def _elsewhere(run: RunConfig) -> tuple[Readers, list[int]]:
    firsts = {senders[0]: senders for senders in _machines(run)}
    serves = [firsts.get(rank, ()) for rank in range(run.layout.ranks)]
    return senders_readers(_nodes(run), serves, on_device=True)


def last_hop_of(run: RunConfig, plan: Plan, links: Links) -> LastHop:
    """To the engine nodes of this recipe."""
    _, kinds = _elsewhere(run)
    return last_hop(
        plan, kinds, _machines(run), run.devices_per_engine_node, expert_parallel(run.rollout), links
    )


def _row(name: str, run: RunConfig, plan: Plan, figures: Sequence[str], total: float, goal: float) -> str:
    start = [f"`{name}`", f"{plan.bytes / 1e9:,.0f}", f"{len(plan.buckets)}"]
    return f"| {' | '.join([*start, *figures, f'{total:.1f}', f'{goal:g}'])} |"


def main() -> None:
    """Print the tables: engines on the ranks' devices, and on nodes of their own."""
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
        figures = [
            *(f"{of.max() / 1e9:.1f}" for of in (counted.across_in, counted.across_out, counted.within_out)),
            f"{counted.messages.max():,}",
            f"{counted.rounds}",
            f"{counted.staging / 1e6:,.0f}",
            f"{counted.across_seconds:.1f}",
        ]
        print(_row(name, run, plan, figures, seconds(plan, counted, links).total, goal))
    print(
        "\n| recipe | model, GB | buckets | nodes: ranks + engines | into a card, GB | out of a card, GB "
        "| over NVLink, GB | into an engine node, GB | messages of a rank "
        "| longest path | cards, s | write, s | load, s | sync, s | goal, s |"
    )
    print("|---|" + "--:|" * 14)
    for name, (run, goal) in SEPARATE.items():
        plan = plan_of(run, held_by_ranks(run, model_of(run)))
        counted, hop = traffic(plan, run.layout.ranks, links), last_hop_of(run, plan, links)
        took = seconds(plan, counted, links, hop)
        figures = [
            f"{run.layout.ranks // RANKS_PER_NODE} + {run.layout.engine_nodes}",
            f"{counted.across_in.max() / 1e9:.1f}",
            f"{(counted.across_out + hop.out).max() / 1e9:.1f}",
            f"{(counted.within_out + hop.within_out).max() / 1e9:.1f}",
            f"{hop.into.max() / 1e9:,.0f}",
            f"{counted.messages.max() + hop.messages:,}",
            f"{longest_path(plan)} + {hop.chain}",
            f"{took.cards:.1f}",
            f"{took.write:.1f}",
            f"{took.load:.1f}",
        ]
        print(_row(name, run, plan, figures, took.total, goal))


if __name__ == "__main__":
    typer.run(main)
