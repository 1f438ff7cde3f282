"""What a model consists of: each Megatron parameter, its Hugging Face tensors, its place in a checkpoint.

Nothing here holds weights. The model is built on the meta device in one process, so a parameter has its
whole shape; megatron-core says where it lies in a checkpoint of any layout, Megatron-Bridge how it is made of
Hugging Face tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_pmd.actor.cpu.modules import block_spec
from megatron_pmd.actor.model import load_bridge, open_bridge, provider_of_family
from megatron_pmd.actor.settings import CPU_FIELDS
from megatron_pmd.errors import ModelError
from megatron_pmd.hugging_face import shards_of


@dataclass(frozen=True)
class Piece:
    """A box of a checkpoint's tensor: its key, where it begins, its size, the size of the whole tensor.

    All layers (and all experts) of a kind may share one tensor; the box then is one row of the leading axes.
    """

    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    whole: tuple[int, ...]


class Parameter:
    """One parameter of the model: `pieces` stacked along its first axis, or Hugging Face's `tensor_names`."""

    def __init__(
        self, name: str, shape: torch.Size, pieces: list[Piece], mapping: Any, module: Any, bridge: Any
    ) -> None:
        """bridge: Megatron-Bridge's of the family, which the mapping is of."""
        self.name, self.shape, self.pieces = name, shape, pieces
        self._mapping, self._module, self._bridge = mapping, module, bridge

    @property
    def tensor_names(self) -> list[str]:
        names = self._mapping.hf_param
        return list(names.values()) if isinstance(names, dict) else [names]

    @property
    def elements(self) -> int:
        return self.shape.numel()

    def merge(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """The parameter made of its Hugging Face tensors.

        Raises ModelError when their shapes do not make up the parameter's, or their dtypes differ.
        """
        of = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        if len({tensor.dtype for tensor in tensors.values()}) > 1:
            raise ModelError(f"{of}: they make one parameter but differ in dtype; name the dtype to write")
        try:
            merged = self._made_of(
                self._bridge.maybe_modify_loaded_hf_weight(self._mapping.hf_param, tensors)
            )
        except (RuntimeError, AssertionError, ValueError) as error:
            raise ModelError(f"{of} cannot make {self.name} {list(self.shape)}: {error}") from None
        if merged.shape != self.shape:
            raise ModelError(
                f"{of} make {self.name} {list(merged.shape)}; config.json asks for {list(self.shape)}"
            )
        return merged

    def _made_of(self, weights: Any) -> torch.Tensor:
        """weights: a tensor, or several by their role."""
        return self._mapping.hf_to_megatron(weights, self._module)

    def boxes(self, weight: torch.Tensor) -> Iterator[tuple[Piece, torch.Tensor]]:
        """Each piece, and the part of the parameter's weight that it is, in the piece's shape."""
        start = 0
        for piece in self.pieces:
            rows = piece.sizes[len(piece.sizes) - weight.dim()]
            yield piece, weight.narrow(0, start, rows).view(piece.sizes)
            start += rows

    def named(self, weight: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """The weight by the name that the module has for it."""
        yield self.name, weight

    def split(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """The Hugging Face tensors of the parameter, by name."""
        tensors = self._mapping.megatron_to_hf(weight, self._module)
        if sorted(tensors) != sorted(self.tensor_names):
            raise ModelError(f"{self.name} became {sorted(tensors)}, not {sorted(self.tensor_names)}")
        return tensors


class StackedParameters(Parameter):
    """The same parameter of all experts of a layer, one below the other: one tensor of Hugging Face's."""

    def __init__(self, experts: list[Parameter]) -> None:
        first = experts[0]
        shape = torch.Size((len(experts) * first.shape[0], *first.shape[1:]))
        pieces = [piece for expert in experts for piece in expert.pieces]
        super().__init__(first.name, shape, pieces, first._mapping, first._module, first._bridge)
        self._experts = experts

    def _made_of(self, weights: Any) -> torch.Tensor:
        return torch.cat([expert._made_of(weights) for expert in self._experts])

    def named(self, weight: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        for expert, own in zip(self._experts, weight.chunk(len(self._experts)), strict=True):
            yield expert.name, own

    def split(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        parts = weight.chunk(len(self._experts))
        split = [expert.split(own) for expert, own in zip(self._experts, parts, strict=True)]
        return {name: torch.stack([own[name] for own in split]) for name in self.tensor_names}


@dataclass(frozen=True)
class Model:
    """All parameters, in the order of the layers, and whether the output layer is the embedding."""

    parameters: list[Parameter]
    tied: bool

    def by_tensor(self) -> dict[str, Parameter]:
        """The parameter each Hugging Face tensor belongs to."""
        return {name: parameter for parameter in self.parameters for name in parameter.tensor_names}


def model_of(path: Path, keys: Collection[str] | None = None) -> Model:
    """The parameters of the model that a folder's config.json describes; no weights are read.

    keys: those of the checkpoint to be read. Some savers write every layer under keys of its own where
    megatron-core would stack them; the form that these keys have is chosen.
    """
    from megatron.core.utils import get_model_config

    bridge = open_bridge(path)
    module = build_whole(bridge, dtype=torch.float32, on_meta=True)
    config = get_model_config(module)
    family = bridge._model_bridge
    family.hf_pretrained = bridge.hf_pretrained  # as when it loads a model
    if not shards_of(path)[0]:
        # Some mappings look which tensors the folder has, and what is kept with a checkpoint has none: they
        # are to take those that transformers writes
        family.hf_pretrained = SimpleNamespace(config=bridge.hf_pretrained.config)
    registry = family.mapping_registry()
    modules = dict(module.named_modules())
    parameters = []
    placed = list(_places(module, keys))
    _without_memory(module)
    for name, pieces in placed:
        mapping = registry.megatron_to_hf_lookup(name)
        if mapping is None:
            raise ModelError(f"{path}: Megatron-Bridge has no mapping for the parameter {name}")
        owner = modules[name.rpartition(".")[0]]
        if not hasattr(owner, "config"):
            owner.config = config  # mappings read head counts from it; torch's own modules have none
        shape = getattr(owner, name.rpartition(".")[2]).shape
        parameters.append(Parameter(name, shape, pieces, mapping, owner, family))
    return Model(_stacked(parameters), tied=bool(module.share_embeddings_and_output_weights))


def _stacked(parameters: list[Parameter]) -> list[Parameter]:
    """The parameters with those that become one tensor as one."""
    by_tensors: dict[tuple[str, ...], list[Parameter]] = {}
    for parameter in parameters:
        by_tensors.setdefault(tuple(parameter.tensor_names), []).append(parameter)
    return [own[0] if len(own) == 1 else StackedParameters(own) for own in by_tensors.values()]


def _without_memory(module: torch.nn.Module) -> None:
    """Put parameters on the CPU in the place of those on the meta device, each of one number, expanded.

    Megatron-Bridge's ReplicatedMapping moves what it is given to where its module is.
    """
    for owner in module.modules():
        for name, old in list(owner.named_parameters(recurse=False)):
            new = torch.nn.Parameter(torch.zeros((), dtype=old.dtype).expand(old.shape))
            vars(new).update(vars(old))  # how it is parallel is written on the parameter
            setattr(owner, name, new)


@torch.no_grad()
def logits(
    path: Path,
    model: Model,
    prompt: Callable[[int], torch.Tensor],
    read: Callable[[Parameter], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The prompt, and its logits in fp32 [tokens, vocabulary] as megatron-core computes them in this process.

    path, model: the model's folder and parameters. prompt: token ids for a vocabulary of this size. read:
    gives a parameter's weight.
    Raises ModelError for a model whose rotary settings would not arrive.
    """
    bridge = load_bridge(path)
    module = build_whole(bridge, dtype=torch.float32).eval()
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    for parameter in model.parameters:
        for name, weight in parameter.named(read(parameter)):
            tensors[name].copy_(weight)
    tokens = prompt(int(module.vocab_size))
    bounds = torch.tensor([0, len(tokens)], dtype=torch.int32)
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds,
        max_seqlen_q=len(tokens), max_seqlen_kv=len(tokens),
    )  # fmt: skip
    output = module(tokens[None], torch.arange(len(tokens))[None], None, packed_seq_params=packed)
    return tokens, output[0].float()


def build_whole(bridge: Any, *, dtype: torch.dtype, on_meta: bool = False) -> Any:
    """The whole model in this process, on the CPU or on the meta device, its weights not set."""
    provider = provider_of_family(bridge)
    settings: dict[str, Any] = dict(
        CPU_FIELDS,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        expert_model_parallel_size=1,
        expert_tensor_parallel_size=1,
        sequence_parallel=False,
        perform_initialization=False,
        init_model_with_meta_device=on_meta,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        autocast_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        fp16=False,
        attention_softmax_in_fp32=True,
        moe_token_dispatcher_type="alltoall",
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
        mtp_num_layers=None,
        should_pad_vocab=False,
        moe_router_dtype="fp32",
        # its parameters have the names of Transformer Engine's spec, and it builds on any machine
        transformer_layer_spec=partial(block_spec, of_family=provider.transformer_layer_spec),
    )
    for name, value in settings.items():
        setattr(provider, name, value)
    provider.finalize()
    provider._pg_collection = ProcessGroupCollection.use_mpu_process_groups()
    return provider.provide(pre_process=True, post_process=True)


def _places(module: Any, keys: Collection[str] | None) -> Iterator[tuple[str, list[Piece]]]:
    """Each parameter's name, and its pieces in a checkpoint."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    forms = []
    for metadata in ({}, {"non_homogeneous_layers": True}):
        state = module.sharded_state_dict(metadata={"dp_cp_group": group, **metadata})
        places = {
            name: _pieces([entry] if isinstance(entry, ShardedTensor) else entry.build())
            for name, entry in state.items()
            if isinstance(entry, (ShardedTensor, ShardedTensorFactory))
        }
        forms.append(places)
    wanted = set(keys or ())

    def found(places: dict[str, list[Piece]]) -> int:
        return sum(piece.key in wanted for pieces in places.values() for piece in pieces)

    yield from max(forms, key=found).items()


def _pieces(tensors: list[ShardedTensor]) -> list[Piece]:
    """Their boxes; those of a gated MLP's two halves are one where they touch."""
    pieces: list[Piece] = []
    for tensor in tensors:
        offsets, axis = tuple(tensor.global_offset), tensor.prepend_axis_num
        sizes = (1,) * axis + tuple(tensor.local_shape)
        last = pieces[-1] if pieces else None
        if last and last.key == tensor.key and last.offsets[axis] + last.sizes[axis] == offsets[axis]:
            pieces.pop()
            offsets = last.offsets
            sizes = (*sizes[:axis], last.sizes[axis] + sizes[axis], *sizes[axis + 1 :])
        pieces.append(Piece(tensor.key, offsets, sizes, tuple(tensor.global_shape)))
    return pieces
