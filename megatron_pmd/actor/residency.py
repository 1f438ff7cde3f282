"""What of the actor is in device memory, and when: the engines live on the same devices.

On a CPU there is one memory: leaving it means handing freed pages back to the system, where the engines find
them. The CUDA half ran on one H100 (docs/gpu.md). Whatever leaves has one pinned copy on the host, made
the first time.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import torch

from megatron_pmd.device import SharedDevice


def actor_bytes() -> int:
    """What this rank holds: of its device, and of the host where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.memory_reserved()
    return psutil.Process().memory_info().rss


def return_freed_memory() -> None:
    """Hand back what the allocator keeps although nothing uses it."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    else:
        # glibc keeps what a step freed: 2.7 GB for a model of 135 million parameters
        ctypes.CDLL(None).malloc_trim(0)


class OptimizerStates:
    """The optimizer's tensors: fp32 parameters and moments, on the device or on the host.

    megatron-core's own offload_to_cpu (optimizer/optimizer.py) makes new pageable copies each time. It also
    moves parameters that are views of the model's, as those of an fp32 model: a second copy of what leaves
    with the model's buffers; and with moments in bf16 Transformer Engine's Adam would then step beside the
    model, as megatron-core leaves it to that to write them back (_copy_main_params_to_model_params).
    """

    def __init__(self, chunks: list[Any], optimizer: Any) -> None:
        self._chunks, self._optimizer = chunks, optimizer
        self._host: dict[tuple[int, str], torch.Tensor] = {}

    def leave(self, device: torch.device) -> None:
        """From the device to the host; what is there already stays."""
        for key, tensor, put in self._tensors():
            if tensor.device.type == device.type:
                if key not in self._host:
                    self._host[key] = torch.empty_like(tensor, device="cpu", pin_memory=device.type == "cuda")
                put(self._host[key].copy_(tensor, non_blocking=True))
        if device.type == "cuda":
            torch.cuda.synchronize()

    def come_back(self, device: torch.device) -> None:
        """To the device what has left it."""
        for key, tensor, put in self._tensors():
            host = self._host.get(key)
            if host is not None and tensor.data_ptr() == host.data_ptr():
                put(tensor.to(device, copy=True, non_blocking=True))

    def _tensors(self) -> Iterator[tuple[tuple[int, str], torch.Tensor, Callable[[torch.Tensor], None]]]:
        """A key for each tensor, the tensor, and how to put another in its place."""
        models = {buffer.param_data.untyped_storage().data_ptr() for buffer in _buffers(self._chunks)}
        for part in self._optimizer.chained_optimizers:
            # the optimizer of which a share is on the host consists of others, which hold the fp32 parameters
            for inner in getattr(part.optimizer, "sub_optimizers", [part.optimizer]):
                found = [
                    ((id(p), ""), p.data, functools.partial(setattr, p, "data"))
                    for group in inner.param_groups
                    for p in group["params"]
                ]
                found += [
                    ((id(p), name), value, functools.partial(state.__setitem__, name))
                    for p, state in inner.state.items()
                    for name, value in state.items()
                    if torch.is_tensor(value) and value.dim() and value is not p
                ]
                yield from (entry for entry in found if entry[1].untyped_storage().data_ptr() not in models)


class FrozenWeights:
    """The weights beside adapters: no step changes them, and megatron-core's buffers do not hold them.

    So the host's copy is made once.
    """

    def __init__(self, chunks: list[Any]) -> None:
        self._frozen = [p for chunk in chunks for p in chunk.parameters() if not p.requires_grad]
        self._host: dict[int, torch.Tensor] = {}

    def leave(self, device: torch.device) -> None:
        """From the device to the host; what is there already stays."""
        for parameter in self._frozen:
            if id(parameter) not in self._host:
                pinned = torch.empty_like(parameter.data, device="cpu", pin_memory=device.type == "cuda")
                self._host[id(parameter)] = pinned.copy_(parameter.data)
            parameter.data = self._host[id(parameter)]

    def come_back(self, device: torch.device) -> None:
        """To the device what has left it."""
        for parameter in self._frozen:
            host = self._host.get(id(parameter))
            if host is not None and parameter.data_ptr() == host.data_ptr():
                parameter.data = host.to(device, copy=True, non_blocking=True)


class Residency:
    """An actor's parts on its device, and the account that the engines keep, too."""

    def __init__(self, chunks: list[Any], optimizer: Any, account: SharedDevice, *, shared: bool) -> None:
        """shared: engines take turns there; else nothing ever leaves."""
        self._chunks, self._account, self._shared = chunks, account, shared
        self._states, self._frozen = OptimizerStates(chunks, optimizer), FrozenWeights(chunks)
        account.held |= {"parameters", "optimizer"}

    def wake(self) -> None:
        """Everything back on the device, after the engines have released it."""
        self._account.take("parameters", "optimizer")
        if torch.cuda.is_available():
            for buffer in _buffers(self._chunks):
                buffer.reload_from_cpu(move_params=True, move_grads=True)
            self._frozen.come_back(torch.device("cuda"))
            self._states.come_back(torch.device("cuda"))

    def wake_parameters(self) -> None:
        """Parameters back on the device, without their gradients."""
        self._account.take("parameters")
        if torch.cuda.is_available():
            for buffer in _buffers(self._chunks):
                buffer.reload_from_cpu(move_params=True, move_grads=False)
            self._frozen.come_back(torch.device("cuda"))

    def release_optimizer(self) -> None:
        """After the last optimizer step of an iteration: its states leave before the weights are exported."""
        if not self._shared:
            return
        if torch.cuda.is_available():
            self._states.leave(torch.device("cuda"))
        return_freed_memory()
        self._account.leave("optimizer")

    def release_parameters(self) -> None:
        """After the export: parameters and gradient buffers leave, and the device belongs to the engines."""
        if not self._shared:
            return
        if torch.cuda.is_available():
            drop_quantized_copies(self._chunks)
            drop_position_tables(self._chunks)
            for buffer in _buffers(self._chunks):
                buffer.offload_to_cpu(move_params=True, move_grads=True)
            self._frozen.leave(torch.device("cuda"))
            return_freed_memory()
        self._account.leave("parameters")


def drop_quantized_copies(chunks: list[Any]) -> None:
    """Let go of what Transformer Engine made of the weights in FP8; the next forward pass makes it anew.

    Of bf16 parameters its modules keep an FP8 copy by row and one by column, 2 bytes a parameter, outside
    megatron-core's buffers. Of FP8 parameters the copy by column lies there, too; an MXFP8 one cannot be made
    from that by row, and stays.
    """
    for chunk in chunks:
        for module in chunk.modules():
            copies = getattr(module, "_fp8_workspaces", None)
            if copies:
                copies.clear()
        for parameter in chunk.parameters():
            if hasattr(parameter, "_create_columnwise") or hasattr(parameter, "_create_transpose"):
                parameter.update_usage(rowwise_usage=True, columnwise_usage=False)


def drop_position_tables(chunks: list[Any]) -> None:
    """Let go of the rotary tables of up to 32 lengths of rows, which the next forward pass makes anew.

    megatron-core has an lru_cache before each rotary embedding's forward (rotary_pos_embedding.py): at 32,768
    tokens and heads of 128 a table is 17 MB, and all of them 0.5 GB that engines lack.
    """
    for forward in {type(module).forward for chunk in chunks for module in chunk.modules()}:
        if hasattr(forward, "cache_clear"):
            forward.cache_clear()


def _buffers(chunks: list[Any]) -> list[Any]:
    return [buffer for chunk in chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
