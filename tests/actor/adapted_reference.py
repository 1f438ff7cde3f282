"""What an actor with adapters must compute, by the library peft, autograd and reference.AdamW, in float64.

peft has an A each for q, k and v, and for gate and up; Megatron-Bridge has one for its fused layer. Here they
are one parameter. Experts, of which transformers 5 holds a layer's in one tensor, are peft's
target_parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file

from megatron_pmd.batch import Sample
from tests.actor.reference import AdamW, Reference, anchors_of, as_in_files, log_probs_of, loss_of
from tests.actor.tiny_models import STEPS

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
PREFIX = "base_model.model."
FILE_NAMES = {
    "hy_v3": [(".mlp.shared_experts.", ".mlp.shared_mlp.")],
    "minimax_m2": [
        (".mlp.experts.", ".block_sparse_moe.experts."), ("gate_proj.", "w1."), ("up_proj.", "w3."),
        ("down_proj.", "w2."),
    ],
}  # fmt: skip
"""By model_type, parts of names in transformers 5 and in published files, which adapters are named after."""


@dataclass
class Adapted:
    log_probs: torch.Tensor
    """float64 [tokens of the rollout], NaN at prompt tokens."""
    merged: dict[str, torch.Tensor]
    """The weights of merge_and_unload, as files hold them."""
    losses: list[float]
    gradient_norms: list[float]
    gradient: dict[str, torch.Tensor]
    """Of the first step, by the adapters' names."""
    weights: list[dict[str, torch.Tensor]]
    """Adapters after each of three steps."""


def compute(model_folder: Path, adapters: Path, reference: Reference, lora: dict[str, Any]) -> Adapted:
    torch.set_num_threads(1)
    from peft import LoraConfig, get_peft_model
    from peft.utils import transformers_weight_conversion
    from transformers import AutoConfig

    tensors = {
        name.removeprefix(PREFIX): tensor
        for name, tensor in load_file(adapters / "adapter_model.safetensors").items()
    }
    read = AutoConfig.from_pretrained(model_folder)
    names = {name: _renamed(name, read.model_type, inverse=True) for name in tensors}
    modules = sorted({name.split(".lora_")[0] for name in names.values() if ".experts." not in name})
    experts = [f"mlp.experts.{name}_proj" for name in ("gate_up", "down")]
    config = LoraConfig(
        r=lora["rank"], lora_alpha=lora["alpha"], target_modules=modules,
        target_parameters=experts if any(".experts." in name for name in tensors) else None,
    )  # fmt: skip
    # see peft_folder._beside_experts
    with mock.patch.object(transformers_weight_conversion, "convert_peft_config_for_transformers"):
        model = get_peft_model(_base(model_folder), config).double()
    _tie(model)
    places = {_renamed(name, read.model_type): place for name, place in _places(model)}
    assert places.keys() == tensors.keys()
    with torch.no_grad():
        for name, (parameter, view) in places.items():
            view(parameter).copy_(tensors[name])
    state = as_in_files(copy.deepcopy(model).merge_and_unload().state_dict())
    merged = {_renamed(name, read.model_type): tensor for name, tensor in state.items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = AdamW(SimpleNamespace(parameters=lambda: trained))
    anchors = anchors_of(reference)
    log_probs = log_probs_of(model, reference.samples)
    losses, norms, gradients, weights = [], [], [], []
    for indices in STEPS:
        model.zero_grad()
        loss, _ = loss_of(model, reference.samples, anchors, indices)
        loss.backward()
        gradients.append({name: view(p.grad).clone() for name, (p, view) in places.items()})
        norms.append(optimizer.step())
        losses.append(float(loss.detach()))
        weights.append({name: view(p).detach().clone() for name, (p, view) in places.items()})
    return Adapted(log_probs, merged, losses, norms, gradients[0], weights)


def folder_log_probs(model_folder: Path, adapters: Path, samples: list[Sample]) -> torch.Tensor:
    """As Adapted.log_probs, of the folder as PeftModel.from_pretrained reads it."""
    from peft import PeftModel

    return log_probs_of(PeftModel.from_pretrained(_base(model_folder), adapters).double(), samples)


def _base(model_folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        model_folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )


def _renamed(name: str, kind: str, *, inverse: bool = False) -> str:
    for here, there in FILE_NAMES.get(kind, []):
        name = name.replace(there, here) if inverse else name.replace(here, there)
    return name


def _tie(model: Any) -> None:
    for module in list(model.modules()):
        for names in FUSED:
            there = [
                getattr(module, name) for name in names if hasattr(getattr(module, name, None), "lora_A")
            ]
            for other in there[1:]:
                other.lora_A["default"].weight = there[0].lora_A["default"].weight


def _places(model: Any) -> Iterator[tuple[str, tuple[torch.nn.Parameter, Any]]]:
    """Each adapter tensor's name, and where it lies: a parameter, and the view of it, or of its gradient."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not parameter.requires_grad:
            continue
        plain = name.removeprefix(PREFIX).replace(".default", "")
        layer, matrix, _ = plain.rsplit(".", 2)
        if not layer.removesuffix(".base_layer").endswith(".experts"):
            yield plain, (parameter, lambda p: p)
            continue
        # peft wraps once for each of the two parameters
        layer = layer.removesuffix(".base_layer")
        wrapper = model.get_submodule(name.rsplit(".lora_", 1)[0])
        for expert in range(wrapper.num_experts):
            view = _of_expert(matrix, expert, wrapper.num_experts)
            gate_up = wrapper.parameter_name == "gate_up_proj"
            for i, projection in enumerate(("gate_proj", "up_proj") if gate_up else ("down_proj",)):
                half = _half(view, i) if gate_up and matrix == "lora_B" else view
                yield f"{layer}.{expert}.{projection}.{matrix}.weight", (parameter, half)


def _of_expert(matrix: str, expert: int, experts: int) -> Any:
    """A is [experts · rank, in], B [out, rank · experts] (peft's ParamWrapper.get_delta_weight)."""
    if matrix == "lora_A":
        return lambda p: p.reshape(experts, -1, p.shape[-1])[expert]
    return lambda p: p.reshape(p.shape[0], -1, experts)[:, :, expert]


def _half(view: Any, i: int) -> Any:
    return lambda p: view(p).chunk(2)[i]
