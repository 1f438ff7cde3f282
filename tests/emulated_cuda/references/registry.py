"""Which function of PyTorch stands for which kernel, and the error for a kernel that has none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Function = Callable[..., Any]

TRANSFORMER_ENGINE: dict[str, Function] = {}
"""Name in transformer_engine_torch -> what stands for it. It is called with the binding's own arguments."""
TRITON: dict[str, Function] = {}
"""Name of a Triton kernel -> what stands for it. It is called with the grid, and the kernel's arguments."""
KEPT: set[str] = set()
"""Functions of transformer_engine_torch that answer a question without a device: they stay."""


class NoReferenceError(NotImplementedError):
    """A kernel was called that the emulated device has nothing for."""


def reference(name: str) -> Callable[[Function], Function]:
    """The decorated function stands for `transformer_engine_torch.NAME`."""
    return _into(TRANSFORMER_ENGINE, name)


def triton_reference(name: str) -> Callable[[Function], Function]:
    """The decorated function stands for the Triton kernel NAME; its first argument is the grid."""
    return _into(TRITON, name)


def kept(*names: str) -> None:
    """`transformer_engine_torch.NAME` stays as it is, for each of the names."""
    KEPT.update(names)


def _into(table: dict[str, Function], name: str) -> Callable[[Function], Function]:
    def register(function: Function) -> Function:
        if name in table:
            raise ValueError(f"{name} has a reference already: {table[name].__module__}")
        table[name] = function
        return function

    return register


def unanswered(name: str) -> Function:
    """What stands for a kernel without a reference: an error that says its name, never a silent zero."""

    def refuse(*arguments: Any, **named: Any) -> Any:
        raise NoReferenceError(
            f"{name} was called, and the emulated device has no reference for it; write one in "
            "emulated_cuda/references/"
        )

    refuse.__name__ = refuse.__qualname__ = name.rpartition(".")[2]
    return refuse
