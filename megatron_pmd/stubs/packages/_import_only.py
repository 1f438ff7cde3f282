"""Import-only packages: every attribute and every submodule exists, and none computes anything.

A name that starts with a capital is an empty class (it may be a base class or an annotation); any other name
is a submodule, and calling one is a decorator that returns its function unchanged (`@triton.jit`).
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any


class StubModule(types.ModuleType):
    def __init__(self, name: str, loader: importlib.abc.Loader | None = None) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__file__ = __file__  # inspect.getsourcefile and torch's tracing ask for one
        self.__spec__ = importlib.machinery.ModuleSpec(name, loader, is_package=True)

    def __getattr__(self, name: str) -> Any:
        value = attribute(self.__name__, name)
        setattr(self, name, value)
        return value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and callable(args[0]) and not kwargs:  # @triton.jit
            return args[0]
        return _unchanged  # @triton.jit(do_not_specialize=...)


def _unchanged(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def attribute(package: str, name: str) -> Any:
    """The stand-in for package.name; AttributeError for dunder names, which the import system probes."""
    if name.startswith("__") and name.endswith("__"):
        raise AttributeError(name)
    if name[:1].isupper():
        return type(name, (), {"__module__": package})
    full = f"{package}.{name}"
    return sys.modules.setdefault(full, StubModule(full))


class _Submodules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, package: str) -> None:
        self.prefix = package + "."

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.startswith(self.prefix):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return StubModule(spec.name, self)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def stub_submodules(package: str) -> None:
    """From now on `import package.anything.at.all` succeeds."""
    sys.meta_path.insert(0, _Submodules(package))
