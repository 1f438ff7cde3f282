"""Tiny models of all families, converted there and back in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_pmd.actor.model import LAYER
from megatron_pmd.hugging_face import bytes_of, write_index
from tests.actor.family_models import MODELS
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
}
"""Names of models: (family, what differs from it): biases, qk-norm, tied and untied, dense and MoE."""
FURTHER = [name for name in VARIANTS if name.endswith("further tokens")]
"""With a layer behind the last that predicts further tokens."""
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
            add_further_layer(folder / name)
    return folder


def add_further_layer(folder: Path) -> None:
    """A layer as the last, with what DeepSeek and GLM have around it, in a file of its own; all random."""
    file = folder / "model.safetensors"
    held = load_file(file)
    last = max(int(found[1]) for name in held if (found := LAYER.match(name)))
    prefix = f"model.layers.{last + 1}."
    width = held["model.norm.weight"].shape[0]
    shapes = {
        prefix + name.removeprefix(f"model.layers.{last}."): tensor.shape
        for name, tensor in held.items()
        if name.startswith(f"model.layers.{last}.")
    }
    shapes |= {prefix + name: torch.Size([width]) for name in ("enorm.weight", "hnorm.weight")}
    shapes |= {prefix + "eh_proj.weight": torch.Size([width, 2 * width])}
    shapes |= {prefix + "shared_head.norm.weight": torch.Size([width])}
    rows = held["lm_head.weight"].shape
    shapes |= {prefix + name: rows for name in ("embed_tokens.weight", "shared_head.head.weight")}
    further = {name: torch.randn(shape) for name, shape in shapes.items()}
    save_file(further, folder / "further.safetensors", metadata={"format": "pt"})
    places = {**dict.fromkeys(held, file.name), **dict.fromkeys(further, "further.safetensors")}
    write_index(folder, places, sum(len(bytes_of(t)) for t in (held | further).values()))


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
