"""Triton kernels as they are written, run by Triton's interpreter on the CPU: what their references are compared with."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import triton


def interpreted(package: str, file: str) -> ModuleType:
    """A module with Triton kernels, `file` in `package`'s folder, loaded apart from the one that programs use."""
    found = importlib.util.find_spec(package)
    assert found is not None and found.submodule_search_locations
    path = Path(found.submodule_search_locations[0], file)
    spec = importlib.util.spec_from_file_location(f"interpreted_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        spec.loader.exec_module(module)
    return module


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **meta: Any) -> None:
    """The kernel over a grid; one whose block sizes are tuned gets those in `meta`."""
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        while not hasattr(kernel, "grid") and hasattr(kernel, "fn") and type(kernel).__name__ == "Autotuner":
            kernel = kernel.fn
        kernel[grid](*arguments, **meta)
