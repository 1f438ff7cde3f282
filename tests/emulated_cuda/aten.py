"""ATen's operators on the emulated device: the CPU's kernel runs on tensors that alias the device's memory.

Each operator that torch has a CUDA kernel for gets one in its place, at the same point of the dispatcher:
below autograd, for C++ callers too, in every thread. What allocates, or only looks at memory in another way,
stays torch's own, with its caching allocator.
"""

from __future__ import annotations

from typing import Any

import torch

KEPT = {
    "_local_scalar_dense", "_efficientzerotensor", "_pin_memory", "_reshape_alias", "alias", "as_strided",
    "as_strided_", "empty", "empty_strided", "is_pinned", "is_set_to", "record_stream", "resize_", "set_",
    "unfold", "view", "view_as_complex", "view_as_real",
}  # fmt: skip
"""Allocation and views, by their name without overload: their CUDA kernels launch nothing."""
RANDOM_NUMBERS_AN_OPERATION = 4
"""Philox offsets that a call advances a generator by: any number will do that is not 0."""


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """A CPU tensor of the same memory, shape and strides, without a gradient."""
    if tensor.numel() == 0:
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype)
    storage = tensor.untyped_storage()
    memory = torch._C._construct_storage_from_data_pointer(
        storage.data_ptr(), torch.device("cpu"), storage.nbytes()
    )
    aliased = torch.empty(0, dtype=tensor.dtype).set_(
        memory, tensor.storage_offset(), tensor.size(), tensor.stride()
    )
    if tensor.is_conj():
        aliased = torch._conj(aliased)
    return torch._neg_view(aliased) if tensor.is_neg() else aliased


def on_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy in the device's memory with the same strides."""
    copy = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=device)
    if tensor.numel():
        on_host(copy).copy_(tensor)
    return copy


def _host_generator(generator: torch.Generator | None, device: torch.device) -> torch.Generator:
    """A CPU generator that a CUDA generator's state decides; the state moves on, as with a kernel."""
    if generator is None:
        generator = torch.cuda.default_generators[device.index or 0]
    host = torch.Generator()
    host.manual_seed((generator.initial_seed() * 1_000_003 + generator.get_offset()) % 2**63)
    generator.set_offset(generator.get_offset() + RANDOM_NUMBERS_AN_OPERATION)
    return host


class Emulated:
    """One operator's kernel for the emulated device."""

    def __init__(self, operator: Any) -> None:
        self._operator = operator
        schema = operator._schema
        names = [argument.name for argument in schema.arguments]
        self._names = names
        self._tensors = {a.name for a in schema.arguments if isinstance(a.type, torch._C.TensorType)}
        self._draws = "generator" in names
        written = {
            _mark(argument): argument.name
            for argument in schema.arguments
            if argument.alias_info is not None and argument.alias_info.is_write
        }
        self._results = [
            written.get(_mark(result)) if result.alias_info else None for result in schema.returns
        ]
        """Of each result, the argument that it is, if it is one."""

    def __call__(self, *positional: Any, **named: Any) -> Any:
        named = dict(zip(self._names, positional, strict=False)) | named
        found: list[torch.device] = []
        host = {name: _to_host(value, found) for name, value in named.items()}
        if isinstance(wanted := named.get("device"), torch.device) and wanted.type == "cuda":
            host["device"] = torch.device("cpu")
            found.append(wanted)
        if host.get("pin_memory"):
            host["pin_memory"] = False
        device = found[0] if found else torch.device("cuda", torch.cuda.current_device())
        if self._draws:
            host["generator"] = _host_generator(named.get("generator"), device)
        operator = self._operator
        if any(type(host.get(name)) in (bool, int, float, complex) for name in self._tensors):
            # torch gives a number that it wrapped in a tensor back as a number, which some overloads refuse;
            # the packet finds the overload that takes it, by the same rules of promotion
            operator = operator.overloadpacket
        with torch.no_grad():
            outcome = operator(**host)
        return self._returned(outcome, named, device)

    def _returned(self, outcome: Any, named: dict[str, Any], device: torch.device) -> Any:
        if not self._results:
            return None
        outcomes = outcome if isinstance(outcome, tuple) else (outcome,)
        results = []
        for alias, value in zip(self._results, outcomes, strict=True):
            if alias is not None:
                if isinstance(value, torch.Tensor) and value.size() != named[alias].size():
                    # an `out` that the CPU's kernel has made larger
                    named[alias].resize_(value.size())
                    on_host(named[alias]).copy_(value)
                results.append(named[alias])
            else:
                results.append(_to_device(value, device))
        return results[0] if len(self._results) == 1 else tuple(results)


def _mark(argument: Any) -> str:
    """What a schema calls an alias: the `a` of `Tensor(a!)`; a list's elements have none."""
    return next(iter(argument.alias_info.before_set), "")


def _to_host(value: Any, devices: list[torch.device]) -> Any:
    """The argument as the CPU's kernel takes it; adds the devices of its tensors to the list."""
    if isinstance(value, torch.Tensor):
        if not value.is_cuda:
            return value
        devices.append(value.device)
        return on_host(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_to_host(each, devices) for each in value)
    return value


def _to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return on_device(value, device) if value.device.type == "cpu" else value
    if isinstance(value, (list, tuple)):
        return type(value)(_to_device(each, device) for each in value)
    return value


def copy_(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """`copy_` where either side is on the device."""
    with torch.no_grad():
        to = on_host(target) if target.is_cuda else target
        to.copy_(on_host(source) if source.is_cuda else source)
    return target


_LIBRARIES: list[torch.library.Library] = []
"""An override lives as long as its library."""


def operators() -> list[Any]:
    """Every overload of ATen that has a CUDA kernel which computes."""
    found = []
    for name in torch._C._dispatch_get_registrations_for_dispatch_key("CUDA"):
        namespace, _, rest = name.partition("::")
        plain, _, overload = rest.partition(".")
        if namespace != "aten" or plain in KEPT:
            continue
        packet = getattr(torch.ops.aten, plain, None)
        operator = getattr(packet, overload or "default", None)
        if operator is not None:
            found.append(operator)
    return found


def install() -> None:
    """Give the device its kernels in this process."""
    import warnings

    library = torch.library.Library("aten", "IMPL")
    _LIBRARIES.append(library)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # `copy_` has one kernel for all devices, which then launches CUDA's
        library.impl(torch.ops.aten.copy_.default, copy_, "CUDA")
        for operator in operators():
            library.impl(operator, Emulated(operator), "CUDA", allow_override=True)
