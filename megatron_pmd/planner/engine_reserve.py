"""What an engine needs of a device beside its weights and its KV cache, by SGLang's own rule.

Source: SGLang 0.5.23, srt/arg_groups/memory_hook.py: handle_gpu_memory_settings, reserve_for_graph_mb and
reserve_for_deepep_a2a_mb, for engines with the memory saver, whose cache is sized before graphs are captured
(post_capture_kv_sizing_planned in srt/arg_groups/overrides.py). tests/planner/test_engine_reserve.py reads
these functions of the installed SGLang.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_pmd.config import RunConfig
from megatron_pmd.planner.shapes import Shape

MIB = 2**20
# (a device's MiB below which the rest holds, tokens of one prefill, requests of the largest decode graph for
# tp_size below 4 and from 4 on)
DEFAULTS = (
    (20 * 1024, 2048, (8, 8)),
    (35 * 1024, 4096, (48, 160)),
    (60 * 1024, 4096, (32, 160)),
    (160 * 1024, 8192, (256, 512)),
    (float("inf"), 16384, (512, 512)),
)
FLOOR_MIB, LARGE_DEVICE_MIB = 10 * 1024, 60 * 1024


@dataclass(frozen=True)
class EngineReserve:
    """Bytes on one device of an engine."""

    activations: float
    """Of the largest prefill, with the attention backend's data."""
    graphs: float
    """CUDA graphs and their buffers, those of attention's data parallelism included: they stay while the
    actor trains."""
    exchange: float
    """Of DeepEP's dispatch and combine."""
    floor: float
    """What SGLang adds to the first two on a large device."""

    @property
    def total(self) -> float:
        return self.activations + self.graphs + self.exchange + self.floor


def engine_reserve(shape: Shape, config: RunConfig, device_memory_bytes: float) -> EngineReserve:
    """What SGLang reserves on a device of this memory with the options of rollout.sglang."""
    options, size = config.rollout.sglang, config.rollout.tensor_parallel
    device = device_memory_bytes / MIB
    _, chunk, largest = next(row for row in DEFAULTS if device < row[0])
    prefill = options.get("chunked_prefill_size", chunk)
    decode = options.get("cuda_graph_max_bs_decode")
    if decode is None:
        decode = min(largest[size >= 4], config.rollout.max_running_requests)
    attention_groups = options.get("attn_dp_size", 1)
    deepep = options.get("moe_a2a_backend") == "deepep"
    graphs = 0.0
    if not _disabled(options, "decode"):
        graphs += 2 * decode
    if attention_groups > 1:
        graphs += decode * attention_groups * (4.5 if decode > 300 else 3)
    if not _disabled(options, "prefill"):
        latent = shape.attention.key_value_heads is None
        graphs += 1536 if latent else 8 * len(_prefill_sizes(prefill, config.rollout.max_total_tokens))
        graphs += 1024 if deepep else 0
    activations = 512 + 1.5 * max(prefill, 2048) + size / 8 * 1024
    floor = max(0.0, FLOOR_MIB - activations - graphs) if device > LARGE_DEVICE_MIB else 0.0
    exchange = 2048 if deepep and not _disabled(options, "decode") else 0
    return EngineReserve(activations * MIB, graphs * MIB, exchange * MIB, floor * MIB)


def _disabled(options: dict, phase: str) -> bool:
    """Whether a phase runs without CUDA graphs."""
    return bool(
        options.get(f"disable_{phase}_cuda_graph") or options.get(f"cuda_graph_backend_{phase}") == "disabled"
    )


def _prefill_sizes(most: int, max_total_tokens: int | None) -> list[int]:
    """Tokens of each graph; arg_groups/cuda_graph_hook.py: generate_prefill_cuda_graph_batch_sizes."""
    most = min(most, max_total_tokens or most)
    small = ((4, 33, 4), (48, 257, 16), (288, 513, 32), (576, 1025, 64), (1280, 4097, 256))
    steps = (*small, (4608, most + 1, 512))
    return [size for step in steps for size in range(*step) if size <= most]


def mem_fraction_static(shape: Shape, config: RunConfig, device_memory_bytes: float) -> float:
    """The share of a device's free memory that weights and KV cache get: as set, or as SGLang chooses it."""
    given = config.rollout.sglang.get("mem_fraction_static")
    if given is not None:
        return float(given)
    return round(1 - engine_reserve(shape, config, device_memory_bytes).total / device_memory_bytes, 3)
