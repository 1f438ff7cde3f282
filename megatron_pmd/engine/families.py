"""The model families of which the pinned SGLang starts no engine where there is no GPU, and why."""

from __future__ import annotations

from pathlib import Path

from megatron_pmd.errors import ModelError
from megatron_pmd.files import read_object

NEEDS_GPUS: dict[str, str] = {
    "exaone_moe": "SGLang takes none of its attentions for CPUs for it",
    "gpt_oss": "SGLang's attention for CPUs has no sinks",
    "minimax_m2": "SGLang's norm of all its heads needs CUDA",
    "nemotron": "SGLang has no class for it, and cannot run transformers'",
    "qwen3_5_text": "SGLang's class for it needs sgl-kernel's build for CPUs",
    "qwen3_next": "SGLang's linear attention needs sgl-kernel's build for CPUs",
}
"""By model_type. tests/engine/test_every_family.py starts an engine of each, and fails where one lives."""


def refuse_without_gpus(path: Path) -> None:
    """ModelError for a model whose engine would die at its start, or at its first request, on a CPU."""
    kind = (read_object(path / "config.json") or {}).get("model_type")
    if kind in NEEDS_GPUS:
        raise ModelError(
            f"{path}: on a CPU no engine starts for models of type {kind}: {NEEDS_GPUS[kind]} (SGLang "
            "0.5.23); train from replayed rollouts (--replay), or on GPUs"
        )
