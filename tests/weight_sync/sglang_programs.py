"""What the loader makes good in SGLang's own models: their code, without an engine. Prints JSON.

A program of its own: the stand-ins for CUDA must be on the path before anything looks for the real packages.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.quantization.kv_cache import BaseKVCacheMethod
from sglang.srt.models.qwen3_moe import Qwen3MoeForCausalLM

from megatron_pmd.weight_sync.bucket import SharedBucket
from tests.weight_sync.filling import fill
from tests.weight_sync.test_bucket import Linear, deliver, verify

EXPERTS = ((128, 8, 8), (128, 4, 2), (256, 32, 32), (128, 4, 1))
"""Experts, ranks of an engine, and its expert parallelism."""


class Fp8Attention(Linear):
    """Scales of the KV cache are parameters of an FP8 model, which no checkpoint need have."""

    attn: Any

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.method = torch.nn.Module(), BaseKVCacheMethod(None)
        self.method.create_weights(self.attn)


class Qwen3Moe(torch.nn.Module):
    """One parameter, filled by SGLang's Qwen3-MoE."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_experts=2)
        self.model: Any = torch.nn.Module()
        self.model.norm = torch.nn.LayerNorm(4, bias=False)

    def load_weights(self, weights: Any) -> None:
        with torch.no_grad():
            Qwen3MoeForCausalLM.load_weights(self, weights)


def cache_scales(bucket: SharedBucket, folder: Path, left: tuple[float, float]) -> list[Any]:
    """What an update says, and what SGLang makes of the scales when it ends."""
    model = Fp8Attention()
    model.attn.k_scale.data.fill_(left[0])
    model.attn.v_scale.data.fill_(left[1])
    [failure] = deliver(model, fill(bucket, {"a": torch.ones(4)}), folder)["failures"]
    model.method.process_weights_after_loading(model.attn)
    return [failure, model.attn.k_scale_float, model.attn.v_scale_float]


def served_experts(experts: int, ranks: int, expert_parallel: int) -> list[list[int]]:
    """By rank of an engine, the experts of a layer that SGLang's loader takes there."""
    served, each = [], experts // expert_parallel
    for rank in range(ranks):
        # parallel_state.py: a group of moe_ep is every (ranks / expert_parallel)-th rank
        place = rank // (ranks // expert_parallel)
        layer: Any = SimpleNamespace(_expert_storage_rank=place, _num_local_routed=each)
        layer._has_fused_shared, layer._num_global_routed = False, experts
        take = FusedMoE._map_global_expert_id_to_local_expert_id
        served.append([number for number in range(experts) if take(layer, number) >= 0])
    return served


def main(folder: Path) -> dict[str, Any]:
    bucket = SharedBucket("sglang-models", 1 << 16, folder=folder)
    model, norm = Qwen3Moe(), {"model.norm.weight": torch.full((4,), 2.0)}
    left = ((-3.0, 2.0), (float("nan"), 0.5), (2.0, 2.0))
    seen: dict[str, Any] = {"fp8 verified": verify(Fp8Attention(), bucket, folder)}
    seen["scales"] = [cache_scales(bucket, folder, scales) for scales in left]
    seen["known"] = deliver(model, fill(bucket, norm), folder)["failures"]
    seen["loaded"] = model.model.norm.weight.tolist()
    misspelt = norm | {"model.nrom.weight": torch.ones(4)}
    seen["unknown"] = deliver(model, fill(bucket, misspelt), folder)["failures"]
    seen["served"] = {f"{shape}": served_experts(*shape) for shape in EXPERTS}
    return seen


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        json.dump(main(Path(name)), sys.stdout)
