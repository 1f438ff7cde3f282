"""Tiny models of all families, converted there and back in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.actor.launch import launch
from tests.actor.tiny_models import FAMILIES, write_model

PROGRAMS = "tests.convert.conversion_programs"
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "qwen2, untied": ("qwen2", dict(tie_word_embeddings=False)),
    "llama, tied": ("llama", dict(tie_word_embeddings=True)),
    "qwen3, no grouping": ("qwen3", dict(num_key_value_heads=4)),
    "kimi": ("deepseek", dict(n_group=1, topk_group=1)),
    "qwen3moe, an odd vocabulary": ("qwen3moe", dict(vocab_size=509)),
}
"""Names of models: (family, what differs from it): biases, qk-norm, tied and untied, dense and MoE."""
VERIFIED = [*FAMILIES, "kimi", "bf16"]
"""On the way back also by the logits of both models; some on the way there, too: each takes a process."""
VERIFIED_THERE = ["qwen3", "deepseek", "bf16"]


@pytest.fixture(scope="session")
def variants(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("variants")
    for name, (family, changes) in VARIANTS.items():
        write_model(folder / name, family, **changes)
    return folder


@pytest.fixture(scope="session")
def converted(
    variants: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, tuple[dict, dict]]]:
    """The folder with NAME/megatron and NAME/hf of every variant, and both manifests of each."""
    folder = tmp_path_factory.mktemp("converted")
    cases: list[Any] = [(variants / name, folder / name, None) for name in VARIANTS]
    cases.append((variants / "qwen3", folder / "bf16", "bf16"))
    manifests = launch("round_trips", module=PROGRAMS, cases=cases, verified=(VERIFIED_THERE, VERIFIED))[0]
    return folder, manifests
