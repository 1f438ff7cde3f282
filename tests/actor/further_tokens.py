"""Layers that predict further tokens, put beside tiny models as they are published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from megatron_pmd.hugging_face import bytes_of, write_index

FILE = "further.safetensors"
NAMED_MTP: dict[str, dict[str, Any]] = {
    "exaone_moe": dict(like=0),
    "qwen3_5_moe_text": dict(like=1, stacked=True),
    "qwen3_5_text": dict(like=1),
    "qwen3_next": dict(like=1),
}
"""Families whose layer is named `mtp`, and what it is like: that of K-EXAONE has no experts, those of Qwen
attend to all tokens, and Qwen3.6 stacks its experts. Seen in Megatron-Bridge 0.6.2's mappings."""
FURTHER_TOKENS = (*NAMED_MTP, "glm4_moe", "glm4_moe_lite", "hy_v3")
"""The families of family_models.MODELS that are published with such a layer."""


def add_layer(folder: Path, kind: str) -> None:
    """The layer of a family in the folder of its tiny model."""
    if kind in NAMED_MTP:
        add_mtp(folder, **NAMED_MTP[kind])
    else:
        add_numbered(folder)


def add_mtp(folder: Path, *, like: int, stacked: bool = False) -> None:
    """As Qwen and K-EXAONE have it, its matrices as in the policy's layer `like`."""
    layer, width = _shapes(folder, like)
    around = {"fc.weight": torch.Size([width, 2 * width])}
    around |= {
        f"{name}.weight": torch.Size([width])
        for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")
    }
    if stacked:
        each = {name: shape for name, shape in layer.items() if ".experts." in name}
        experts = len(each) // 3
        rows, columns = each["mlp.experts.0.gate_proj.weight"]
        layer = {name: shape for name, shape in layer.items() if name not in each}
        layer["mlp.experts.gate_up_proj"] = torch.Size([experts, 2 * rows, columns])
        layer["mlp.experts.down_proj"] = torch.Size([experts, columns, rows])
    around |= {f"layers.0.{name}": shape for name, shape in layer.items()}
    _add(folder, {f"mtp.{name}": shape for name, shape in around.items()})


def add_numbered(folder: Path) -> None:
    """Behind the last and like it, with what DeepSeek and GLM have around it."""
    config = json.loads((folder / "config.json").read_text())
    number = config["num_hidden_layers"]
    layer, width = _shapes(folder, number - 1)
    rows = torch.Size([config["vocab_size"], width])
    layer |= dict.fromkeys(("enorm.weight", "hnorm.weight", "shared_head.norm.weight"), torch.Size([width]))
    layer |= dict.fromkeys(("embed_tokens.weight", "shared_head.head.weight"), rows)
    layer |= {"eh_proj.weight": torch.Size([width, 2 * width])}
    _add(folder, {f"model.layers.{number}.{name}": shape for name, shape in layer.items()})
    (folder / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))


def _shapes(folder: Path, layer: int) -> tuple[dict[str, torch.Size], int]:
    """The names within one of the policy's layers with their shapes; and the model's width."""
    held, prefix = load_file(folder / "model.safetensors"), f"model.layers.{layer}."
    own = {name.removeprefix(prefix): t.shape for name, t in held.items() if name.startswith(prefix)}
    return own, held["model.norm.weight"].shape[0]


def _add(folder: Path, shapes: dict[str, torch.Size]) -> None:
    """Random tensors in a file of their own, and an index of both files."""
    held = load_file(folder / "model.safetensors")
    further = {name: torch.randn(shape) for name, shape in shapes.items()}
    save_file(further, folder / FILE, metadata={"format": "pt"})
    places = {**dict.fromkeys(held, "model.safetensors"), **dict.fromkeys(further, FILE)}
    write_index(folder, places, sum(len(bytes_of(tensor)) for tensor in (held | further).values()))
