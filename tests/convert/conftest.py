"""Tiny models of all families, converted there and back in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.actor.family_models import MODELS
from tests.actor.further_tokens import add_layer
from tests.actor.launch import launch
from tests.actor.tiny_models import FAMILIES, write

PROGRAMS = "tests.convert.conversion_programs"
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in FAMILIES},
    "qwen2, untied": ("qwen2", dict(tie_word_embeddings=False)),
    "llama, tied": ("llama", dict(tie_word_embeddings=True)),
    "qwen3, no grouping": ("qwen3", dict(num_key_value_heads=4)),
    "kimi": ("deepseek", dict(n_group=1, topk_group=1)),
    "qwen3moe, an odd vocabulary": ("qwen3moe", dict(vocab_size=509)),
    "deepseek, further tokens": ("deepseek", dict(num_nextn_predict_layers=1)),
    "glm, further tokens": ("glm4_moe", dict(num_nextn_predict_layers=1)),
    "qwen3_next, further tokens": ("qwen3_next", dict(num_hidden_layers=2)),
}
"""Names of models: (family, what differs from it): biases, qk-norm, tied and untied, dense and MoE."""
FURTHER = [name for name in VARIANTS if name.endswith("further tokens")]
"""With a layer that predicts further tokens."""
VERIFIED = [*FAMILIES, "kimi", "bf16"]
"""On the way back also by the logits of both models; some on the way there, too: each takes a process."""
VERIFIED_THERE = ["qwen3", "deepseek", "bf16"]


@pytest.fixture(scope="session")
def variants(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("variants")
    for name, (family, changes) in VARIANTS.items():
        kind, settings = FAMILIES.get(family) or MODELS[family][:2]
        write(folder / name, kind, {**settings, **changes})
        if name in FURTHER:
            add_layer(folder / name, family)
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
