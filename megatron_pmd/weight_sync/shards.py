"""What this rank holds of each Hugging Face tensor, so that no rank needs to gather what it does not send.

Megatron-Bridge's mapping registry says which parameter becomes which tensors; where a shard lies in them
follows from the shapes. Its own export gathers every tensor on every rank. It is still asked for the few
whose conversion is more than cutting up a parameter (`irregular`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from megatron_pmd.distributed import Control
from megatron_pmd.errors import ModelError
from megatron_pmd.fp8 import (
    BLOCK,
    SCALE_SUFFIX,
    Blocks,
    blocks_held,
    is_quantized,
    quantize,
    quantized,
)
from megatron_pmd.weight_sync.adapters import Adapters
from megatron_pmd.weight_sync.plan import Region

View = Callable[[torch.Tensor], torch.Tensor]
Cut = tuple[str, int, int, int, View]
"""Which of a parameter's tensors, the region's dim, start and length, and where it lies in the parameter."""
Shapes = Mapping[str, Sequence[int]]
PLAIN = ("AutoMapping", "ColumnParallelMapping", "RowParallelMapping", "ReplicatedMapping", "DirectMapping")
"""Megatron-Bridge's classes by name: it can be imported only once model.load_bridge has prepared for it."""
ONE_OF_THE_EXPERTS: dict[str, View] = {
    # columns of the gate and of the up-projection in turn
    "GPTOSSMLPGateUpProjMapping": lambda p: p.view(2, -1, *p.shape[1:]).transpose(0, 1).flatten(0, 1).T,
    "GPTOSSMLPDownProjMapping": lambda p: p.T,
}
"""Those that put a parameter into a tensor of all experts, and what they make of it."""
CONSTANTS = ("rotary_emb.inv_freq",)
"""Ends of the names of tensors that some model folders hold and no training changes."""


@dataclass(frozen=True)
class Shard:
    """A region of a Hugging Face tensor, and how to read it where this rank has it."""

    region: Region
    tensor: Callable[[], torch.Tensor]
    """The region's values: as many elements, in its order, mostly a view of a parameter. Read anew at every
    export: between them parameters leave the device, and come back elsewhere."""
    blocks: Callable[[], Blocks | None] = lambda: None
    """Its FP8 values and scales, where the parameter itself is held in such blocks."""


class ShardExport:
    """The policy's weights as regions of Hugging Face tensors; made once, used at every export."""

    def __init__(
        self, bridge: Any, models: list[Any], control: Control, shapes: Shapes, *, fp8: bool = False
    ) -> None:
        """Collective. shapes: name -> shape of every tensor of the model folder. fp8: matrices leave as
        blockwise FP8 and its scales.

        Raises ModelError for a tensor of the folder that no parameter becomes, on all ranks.
        """
        self._bridge, self._models, self._fp8 = bridge, models, fp8
        self._adapters = Adapters(models)
        tasks = bridge.get_conversion_tasks(models)
        shards = [_shards(task, shapes, self._adapters) for task in tasks]
        if not _only_renames(bridge):
            shards = [None] * len(tasks)
        irregular = {i for i, found in enumerate(shards) if found is None}
        if fp8:  # a block that ranks share has one scale, which none of them can tell
            irregular |= {
                i for i, found in enumerate(shards) if not all(whole_blocks(s.region) for s in found or [])
            }
        # one rank may see of a parameter what another, without it, cannot
        irregular = set().union(*control.all_gather(irregular))
        self._irregular_tasks = [task for i, task in enumerate(tasks) if i in irregular]
        self.shards: dict[Region, Shard] = {
            shard.region: shard
            for i, found in enumerate(shards)
            if i not in irregular
            for shard in found or []
        }
        self._tie_embeddings(shapes)
        if fp8:
            self.shards = {s.region: s for shard in self.shards.values() for s in _quantized(shard)}
        self.irregular: list[Region] = [_whole(name, tensor) for name, tensor in self.irregular_tensors()]
        """Tensors that every rank gets whole, in the order of irregular_tensors()."""
        self._check_complete(control, shapes)

    def begin(self) -> None:
        """Collective: the weights have changed, and are about to be read."""
        self._adapters.gather()

    @property
    def regions(self) -> list[Region]:
        """Everything this rank holds, the irregular last."""
        return [*self.shards, *self.irregular]

    def irregular_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Collective: Megatron-Bridge's own export, of those tensors that it alone can make."""
        if not self._irregular_tasks:
            return
        tensors = self._bridge.export_hf_weights(
            self._models, cpu=False, show_progress=False, conversion_tasks=self._irregular_tasks,
            merge_adapter_weights=bool(self._adapters),
        )  # fmt: skip
        yield from quantized(tensors) if self._fp8 else tensors

    def _tie_embeddings(self, shapes: Shapes) -> None:
        """A tied model's folder may name the output layer all the same."""
        heads = [r for r in self.shards if r.name == "lm_head.weight"]
        tied = self._bridge.hf_pretrained.config.tie_word_embeddings
        if heads or not tied or "lm_head.weight" not in shapes:
            return
        for region, shard in list(self.shards.items()):
            if region.name == "model.embed_tokens.weight":
                head = replace(region, name="lm_head.weight")
                self.shards[head] = Shard(head, shard.tensor)

    def _check_complete(self, control: Control, shapes: Shapes) -> None:
        exported = {
            region.name.removesuffix(SCALE_SUFFIX if self._fp8 else "")
            for regions in control.all_gather(self.regions)
            for region in regions
        }
        missing = sorted(name for name in shapes.keys() - exported if not name.endswith(CONSTANTS))
        extra = sorted(exported - shapes.keys())
        if missing:
            raise ModelError(f"tensor {missing[0]} would not be exported ({len(missing)} missing in all)")
        if extra:
            raise ModelError(
                f"tensor {extra[0]} would be exported, but the model folder has none of that name"
            )


def _only_renames(bridge: Any) -> bool:
    """Whether what the mappings give is what the family's files hold.

    Some bridges change tensors after their mapping; DeepSeek's and Llama's only add CONSTANTS.
    """
    change = type(bridge._model_bridge).maybe_modify_converted_hf_weight
    return change.__qualname__.split(".")[0] in ("MegatronModelBridge", "DeepSeekV3Bridge", "LlamaBridge")


def _shards(task: Any, shapes: Shapes, adapters: Adapters) -> list[Shard] | None:
    """What this rank's part of a parameter becomes; None if that is more than cutting it up.

    With an adapter: base + alpha / rank · B A, in the parameter's dtype.
    """
    if task.param_weight is None:
        return []
    mapping, parameter, kind_of_mapping = task.mapping, task.param_weight, type(task.mapping).__name__
    names = mapping.hf_param if isinstance(mapping.hf_param, dict) else {"": mapping.hf_param}
    if any(name not in shapes for name in names.values()):
        return None
    whole = {kind: tuple(shapes[name]) for kind, name in names.items()}
    cuts: list[Cut] | None = None
    if kind_of_mapping == "QKVMapping":
        cuts = _cut_qkv(task, whole)
    elif kind_of_mapping == "GatedMLPMapping":
        cuts = _cut_gated(mapping, tuple(parameter.shape), whole)
    elif kind_of_mapping in ONE_OF_THE_EXPERTS:
        cuts = _cut_expert(mapping, tuple(parameter.shape), whole[""], ONE_OF_THE_EXPERTS[kind_of_mapping])
    elif kind_of_mapping in PLAIN and getattr(mapping, "permute_dims", None) is None:
        cuts = _cut_plain(mapping, tuple(parameter.shape), whole[""])
    if cuts is None:
        return None
    dtype = str(parameter.dtype).removeprefix("torch.")
    adapted = adapters.of(task)

    def read(view: View) -> torch.Tensor:
        base = view(mapping.maybe_dequantize(parameter.detach()))
        if adapted is None:
            return base
        adapter, expert = adapted
        return (base.float() + adapter.added(view, expert)).to(base.dtype)

    return [
        Shard(
            Region(str(names[kind]), dtype, whole[kind], dim, start, length),
            partial(read, view),
            # an adapter's share is not in the blocks
            partial(blocks_held, parameter, view) if adapted is None else lambda: None,
        )
        for kind, dim, start, length, view in cuts
    ]


def blockwise(region: Region) -> tuple[Region, Region]:
    """The FP8 values and the scales that a region of a matrix becomes; its edges cut no block."""
    blocks = tuple(-(-extent // BLOCK) for extent in region.shape)
    first, count = region.start // BLOCK, -(-region.length // BLOCK)
    scales = Region(region.name + SCALE_SUFFIX, "float32", blocks, region.dim, first, count)
    return replace(region, dtype="float8_e4m3fn"), scales


def whole_blocks(region: Region) -> bool:
    """Whether no block of a matrix that becomes FP8 is cut by this region's edges."""
    if not is_quantized(region.name):
        return True
    end = region.start + region.length
    return region.start % BLOCK == 0 and (end % BLOCK == 0 or end == region.shape[region.dim])


class _BlockwiseShard:
    """A shard as FP8 values and their scales: two regions of one quantisation.

    An export reads the values first and the scales in the same bucket (plan.fused), so the values' reader
    quantises and leaves the scales here, and the scales' reader takes them away: the matrix is quantised
    once, and no more scales than one shard's are held. Whoever reads the scales alone quantises again.
    """

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._scales: torch.Tensor | None = None
        """Of the values that were read last, until they are read too."""

    def shards(self) -> list[Shard]:
        values, scales = blockwise(self._shard.region)
        return [Shard(values, self._read_values), Shard(scales, self._read_scales)]

    def _read_values(self) -> torch.Tensor:
        values, self._scales = self._quantize()
        return values

    def _read_scales(self) -> torch.Tensor:
        scales, self._scales = self._scales, None
        return self._quantize()[1] if scales is None else scales

    def _quantize(self) -> Blocks:
        region = self._shard.region
        local = list(region.shape)
        local[region.dim] = region.length
        return self._shard.blocks() or quantize(self._shard.tensor().reshape(local))


def _quantized(shard: Shard) -> list[Shard]:
    """The shard, or the values and scales that it becomes."""
    if not is_quantized(shard.region.name) or shard.region.dtype == "float8_e4m3fn":
        return [shard]
    return _BlockwiseShard(shard).shards()


def _cut_plain(mapping: Any, local: tuple[int, ...], whole: tuple[int, ...]) -> list[Cut] | None:
    """One parameter, one tensor: which dimension is split shows in the shapes."""
    if local == whole:
        return [("", 0, 0, whole[0] if whole else 1, _itself)]
    for dim in range(len(whole)):
        split = (*whole[:dim], local[dim] if dim < len(local) else 0, *whole[dim + 1 :])
        if local == split and local[dim] * mapping.tp_size == whole[dim]:
            return [("", dim, mapping.tp_rank * local[dim], local[dim], _itself)]
    return None


def _cut_expert(mapping: Any, local: tuple[int, ...], whole: tuple[int, ...], made: View) -> list[Cut] | None:
    """One row of the tensor of all experts: matrices lie there with rows for columns."""
    if local[::-1] != whole[1:]:
        return None
    number = re.search(r"\d+$", mapping.megatron_param)
    assert number is not None, mapping.megatron_param
    return [("", 0, int(number[0]), 1, made)]


def _cut_gated(mapping: Any, local: tuple[int, ...], whole: dict[str, tuple[int, ...]]) -> list[Cut] | None:
    """Rows of the gate, then as many of the up-projection."""
    rows = local[0] // 2
    parts = whole["gate"][0] // max(rows, 1)
    if whole["gate"] != whole["up"] or local != (2 * rows, *whole["gate"][1:]) or parts != mapping.tp_size:
        return None
    start = mapping.tp_rank * rows
    return [
        ("gate", 0, start, rows, lambda p: p[:rows]),
        ("up", 0, start, rows, lambda p: p[rows:]),
    ]


def _cut_qkv(task: Any, whole: dict[str, tuple[int, ...]]) -> list[Cut] | None:
    """For each group of key-value heads: its query heads, its key head, its value head."""
    config, mapping, local = task.megatron_module.config, task.mapping, tuple(task.param_weight.shape)
    if getattr(config, "attention_output_gate", False):
        return None
    size = config.kv_channels or config.hidden_size // config.num_attention_heads
    queries = config.num_attention_heads // config.num_query_groups * size
    groups, left = divmod(config.num_query_groups, mapping.tp_size)
    if left or local != (groups * (queries + 2 * size), *whole["q"][1:]):
        return None
    if whole["k"] != whole["v"] or whole["k"][0] != config.num_query_groups * size:
        return None
    first = mapping.tp_rank * groups

    def cut(begin: int, end: int) -> View:
        return lambda p: p.view(groups, queries + 2 * size, *p.shape[1:])[:, begin:end]

    return [
        ("q", 0, first * queries, groups * queries, cut(0, queries)),
        ("k", 0, first * size, groups * size, cut(queries, queries + size)),
        ("v", 0, first * size, groups * size, cut(queries + size, queries + 2 * size)),
    ]


def _itself(parameter: torch.Tensor) -> torch.Tensor:
    return parameter


def _whole(name: str, tensor: torch.Tensor) -> Region:
    return Region.whole(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
