"""Runs as a rank of the actor up to where it would need a device, and prints what it has as JSON.

The order is that of megatron_pmd/node/worker.py, main: Transformer Engine reads its settings while it is
imported, so nothing may import it before they are set.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from tests.gpu_contract.pretended_device import pretend

pretend()

SILENTLY_ABSENT = {
    "megatron.core.extensions.transformer_engine": [
        "TENorm", "TEColumnParallelLinear", "TERowParallelLinear", "TELayerNormColumnParallelLinear",
        "TEDotProductAttention", "TEGroupedLinear", "TEColumnParallelGroupedLinear",
        "TERowParallelGroupedLinear", "Fp8Padding", "Fp8Unpadding", "fused_permute",
        "fused_permute_with_probs", "fused_sort_chunks_by_index", "fused_sort_chunks_by_index_with_probs",
        "fused_unpermute", "fused_permute_and_pad_with_probs", "te_parallel_cross_entropy",
        "fused_apply_rotary_pos_emb_thd", "fused_apply_rotary_pos_emb", "te_checkpoint", "te_general_gemm",
        "fused_topk_with_score_function",
    ],
    "megatron.core.fp8_utils": [
        "HAVE_TE_FP8_TENSOR_CLASS", "HAVE_TE_MXFP8TENSOR", "te_post_all_gather_processing",
    ],
    "megatron.core.optimizer.distrib_optimizer": ["HAVE_APEX_OR_TE"],
}  # fmt: skip
"""What megatron-core does without, or slower, and says nothing, when Transformer Engine lacks a name."""


def main(settings: list[str]) -> dict[str, Any]:
    from megatron_pmd.node import worker  # noqa: F401
    from megatron_pmd.processes import quiet

    quiet()
    import torch  # noqa: F401

    from megatron_pmd.actor.environment import prepare_imports
    from megatron_pmd.config import override
    from recipes import recipe

    published = hasattr(importlib.import_module("deep_ep.utils"), "EventOverlap")
    early = [name for name in sys.modules if name.partition(".")[0] in ("transformer_engine", "megatron")]
    config = override(recipe("qwen3_30b_a3b_dapo_32xh100"), settings)
    prepare_imports(config)
    for name in (
        "actor.parallel", "distributed", "node.bandwidth", "actor.actor", "actor.checkpoint",
        "actor.optimizer", "training.live_engines", "training.trainer", "weight_sync.push",
        "weight_sync.device_bucket",
    ):  # fmt: skip
        importlib.import_module(f"megatron_pmd.{name}")
    importlib.import_module("megatron.bridge")
    from transformer_engine.common.recipe import Float8BlockScaling

    missing = [
        f"{module}.{name}"
        for module, names in SILENTLY_ABSENT.items()
        for name in names
        if not getattr(importlib.import_module(module), name, None)
    ]
    import megatron.core.optimizer as optimizer
    import transformer_engine

    from megatron_pmd.actor import settings as actor_settings

    return {
        "before the environment was set": early,
        "missing": missing,
        "adam": optimizer.Adam.__module__,
        "power of two": Float8BlockScaling().fp8_quant_fwd_weight.power_2_scale,
        "transformer engine": transformer_engine.__version__,
        "deepep has the name by itself": published,
        "deepep": importlib.import_module("megatron.core.transformer.moe.fused_a2a").HAVE_DEEP_EP,
        "fused accumulation": actor_settings._has_fused_accumulation(),
    }


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(main(sys.argv[2:])))
