"""Blockwise FP8 of Hugging Face weights: e4m3 values and one fp32 scale for each 128x128 block.

The format of DeepSeek-V3's checkpoints, which SGLang, vLLM and transformers read: `x.weight` in float8_e4m3fn
and `x.weight_scale_inv` with weight ≈ value * scale_inv, block by block.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from typing import Any

import torch

BLOCK = 128
"""Rows and columns that share a scale."""
BAND = 16 * BLOCK
"""Rows that are quantised at a time."""
LARGEST = 448.0
"""The largest finite float8_e4m3fn."""
SCALE_SUFFIX = "_scale_inv"
Blocks = tuple[torch.Tensor, torch.Tensor]
"""Values and scales."""

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LATENT_ATTENTION = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
QUANTIZED = frozenset((*ATTENTION, *LATENT_ATTENTION, *MLP))
"""The modules whose matrices are quantised; an MLP is dense, shared, or one expert.

Everything else keeps its precision, as in the published FP8 checkpoints of DeepSeek-V3, Kimi-K2 and Qwen3:
embeddings, output layer, norms, biases, the routers (`mlp.gate`, `e_score_correction_bias`,
`shared_expert_gate`), the projection of a multi-token-prediction layer (`eh_proj`), and whatever a new family
brings that is not named here.
"""


def is_quantized(name: str) -> bool:
    """Whether the tensor of this Hugging Face name becomes FP8; see QUANTIZED for what does not."""
    module, _, kind = name.rpartition(".")
    return kind == "weight" and module.rpartition(".")[2] in QUANTIZED


def is_scale(name: str, names: Container[str]) -> bool:
    """Whether a tensor is the scales of another one of a folder; names: of all its tensors."""
    return name.endswith(SCALE_SUFFIX) and name.removesuffix(SCALE_SUFFIX) in names


def quantize(weight: torch.Tensor) -> Blocks:
    """Values and scales of a matrix; a block at the edge may be smaller.

    weight    [rows, columns], floating point
    returns   float8_e4m3fn [rows, columns] and fp32 [⌈rows/128⌉, ⌈columns/128⌉]
    A block's scale is its largest magnitude / 448, and 1 where the block is all zero. Computed in fp32.
    Raises ValueError for a tensor that is not a matrix, or holds NaN or an infinity.
    """
    if weight.ndim != 2:
        raise ValueError(
            f"only matrices are quantised in blocks, not a tensor of shape {tuple(weight.shape)}"
        )
    rows, columns = weight.shape
    values = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    largest = torch.empty(-(-rows // BLOCK), -(-columns // BLOCK), device=weight.device)
    # some rows at a time: the fp32 copies stay small beside the matrix
    for first in range(0, rows, BAND):
        source = weight[first : first + BAND].float()
        padded = torch.nn.functional.pad(source, (0, -columns % BLOCK, 0, -len(source) % BLOCK))
        blocks = padded.view(len(padded) // BLOCK, BLOCK, -1, BLOCK)
        found = blocks.abs().amax(dim=(1, 3))
        scaled = (blocks / _scales(found)[:, None, :, None]).clamp_(-LARGEST, LARGEST).view(padded.shape)
        values[first : first + BAND] = scaled[: len(source), :columns].to(torch.float8_e4m3fn)
        largest[first // BLOCK : first // BLOCK + len(found)] = found
    # read once: on a device each look at a number waits for all that was asked of it
    if not bool(largest.isfinite().all()):
        band = int((~largest.isfinite()).any(dim=1).nonzero()[0]) * BLOCK
        raise ValueError(f"rows {band} to {min(band + BLOCK, rows)} hold a value that is not finite")
    return values, _scales(largest)


def _scales(largest: torch.Tensor) -> torch.Tensor:
    """Of blocks by their largest magnitudes."""
    return torch.where(largest > 0, largest / LARGEST, 1.0)


def dequantize(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The fp32 matrix that quantize's two results stand for."""
    rows, columns = values.shape
    spread = scales.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    return values.float() * spread


def blocks_held(parameter: torch.Tensor, view: Callable[[torch.Tensor], torch.Tensor]) -> Blocks | None:
    """Values and scales of a part of a parameter that is in such blocks already; None if it is not.

    parameter  [rows, columns]; Transformer Engine's Float8BlockwiseQTensor with 2-D scaling, or anything else
    view       cuts whole rows out of a matrix of these rows, as weight_sync/shards.py's views do
    None also where the cut goes through a block: its rows then need a scale that the parameter has not.
    Source: Transformer Engine 2.11, tensor/storage/float8_blockwise_tensor_storage.py (get_metadata; scales
    are padded to four columns).
    """
    metadata: dict[str, Any] = getattr(parameter, "get_metadata", dict)()
    if not metadata.get("is_2D_scaled") or metadata["rowwise_data"] is None:
        return None
    data, scales = metadata["rowwise_data"], metadata["rowwise_scale_inv"]
    rows = view(torch.arange(len(data))[:, None]).reshape(-1)
    firsts = rows[::BLOCK]
    together = (firsts[:, None] + torch.arange(BLOCK)).reshape(-1)[: len(rows)]
    ends_with_matrix = len(rows) % BLOCK == 0 or int(rows[-1]) == len(data) - 1
    if bool((firsts % BLOCK).any()) or not torch.equal(rows, together) or not ends_with_matrix:
        return None
    values = view(data.view(torch.float8_e4m3fn)).reshape(len(rows), -1)
    return values, scales[(firsts // BLOCK).to(scales.device), : -(-data.shape[1] // BLOCK)]


def quantized(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """The same tensors with those of QUANTIZED as FP8, each followed by its scales; others as they come.

    One that is FP8 already passes unchanged.
    """
    for name, tensor in tensors:
        if not is_quantized(name) or tensor.dtype is torch.float8_e4m3fn:
            yield name, tensor
            continue
        values, scales = quantize(tensor)
        yield name, values
        yield name + SCALE_SUFFIX, scales


def quantization_config(names: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json for a model of these tensors after quantized()."""
    matrices = (name.removesuffix(".weight") for name in names if name.endswith(".weight"))
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": sorted(m for m in matrices if not is_quantized(f"{m}.weight")),
    }
