"""The model families of which the pinned SGLang starts no engine, anywhere or without a GPU, and why."""

from __future__ import annotations

from pathlib import Path

from megatron_pmd.errors import ModelError
from megatron_pmd.files import read_object

_WITH_IMAGES = "SGLang serves it only as a part of the model with images (EntryClass of qwen3_5.py)"
NO_ENGINE: dict[str, str] = {
    "nemotron": "SGLang has no class for it, and transformers' NemotronDecoderLayer does not hand its "
    "attention what SGLang gives it",
    "qwen3_5_moe_text": _WITH_IMAGES,
    "qwen3_5_text": _WITH_IMAGES,
}
"""By model_type: on GPUs neither."""
_ATTENTION = "SGLang takes none of its attentions for CPUs for it"
_LATENT = "SGLang's attention for CPUs takes no latent attention"
NEEDS_GPUS: dict[str, str] = {
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "glm4_moe_lite": _LATENT,
    "kimi_k2": _LATENT,
    "exaone4": _ATTENTION,
    "exaone_moe": _ATTENTION,
    "gpt_oss": "SGLang's attention for CPUs has no sinks",
    "minimax_m2": "SGLang's norm of all its heads needs CUDA",
    "qwen3_next": "SGLang's linear attention needs sgl-kernel's build for CPUs",
}
"""tests/engine/test_every_family.py starts an engine of each on a CPU, and fails where one lives."""


def check_served(path: Path, *, cpu: bool) -> None:
    """ModelError for a model whose engine would die at its start, or at its first request."""
    kind = (read_object(path / "config.json") or {}).get("model_type")
    if kind in NO_ENGINE:
        where, reason, otherwise = "", NO_ENGINE[kind], ""
    elif kind in NEEDS_GPUS and cpu:
        where, reason, otherwise = " on a CPU", NEEDS_GPUS[kind], ", or on GPUs"
    else:
        return
    raise ModelError(
        f"{path}: no engine starts{where} for models of type {kind}: {reason}. SGLang is at 0.5.23; train "
        f"from replayed rollouts (--replay){otherwise}"
    )
