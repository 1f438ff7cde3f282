"""Puts the references into torch, Transformer Engine and Triton when a process imports them."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import pkgutil
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any


class After(importlib.abc.MetaPathFinder):
    """Finds modules as Python would, and calls what has to follow the import of some of them."""

    def __init__(self, actions: dict[str, Callable[[ModuleType], None]]) -> None:
        self._actions = actions
        self._looking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if self._looking or fullname not in self._actions:
            return None
        self._looking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._looking = False
        if spec is None or spec.loader is None:
            return spec
        loader: Any = spec.loader
        execute, action = loader.exec_module, self._actions.pop(fullname)

        def exec_module(module: ModuleType) -> None:
            execute(module)
            action(module)

        loader.exec_module = exec_module
        return spec


def install() -> None:
    sys.meta_path.insert(
        0,
        After(
            {
                "torch": _torch,
                "transformer_engine.common": _transformer_engine,
                "triton.runtime.jit": _triton,
            }
        ),
    )


def _torch(module: ModuleType) -> None:
    from . import aten

    aten.install()


def _transformer_engine(common: Any) -> None:
    load = common.load_framework_extension

    def load_framework_extension(framework: str) -> None:
        load(framework)
        replace_bindings(sys.modules["transformer_engine_torch"])

    common.load_framework_extension = load_framework_extension


def import_references() -> None:
    """All files of references/, which fill the tables of registry.py."""
    from . import references

    for found in pkgutil.iter_modules(references.__path__):
        importlib.import_module(f"{references.__name__}.{found.name}")


def replace_bindings(bindings: Any) -> None:
    """Each function of transformer_engine_torch becomes its reference, or an error by name."""
    from .references import registry

    import_references()
    for name in dir(bindings):
        if name.startswith("_") or isinstance(getattr(bindings, name), type):
            continue
        if callable(getattr(bindings, name)) and name not in registry.KEPT:
            function = registry.TRANSFORMER_ENGINE.get(name)
            setattr(bindings, name, function or registry.unanswered(f"transformer_engine_torch.{name}"))
    if unknown := registry.TRANSFORMER_ENGINE.keys() - set(dir(bindings)):
        raise ImportError(f"references for what transformer_engine_torch has not: {sorted(unknown)}")


def _triton(jit: Any) -> None:
    from .references import registry

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        name = kernel.fn.__name__
        function = registry.TRITON.get(name) or registry.unanswered(f"the Triton kernel {name}")
        return function(grid, *arguments, **named)

    jit.JITFunction.run = run
