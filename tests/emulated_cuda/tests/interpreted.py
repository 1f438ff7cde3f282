"""Triton kernels run by Triton's interpreter on the CPU: what their references are compared with.

The interpreter takes effect when Triton is imported, so that the kernels run in a process of their own.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.emulated_cuda.references.registry import TRITON


@dataclass(frozen=True)
class Call:
    """A launch of a kernel: its block sizes are in `meta`, also where the library tunes them."""

    kernel: str
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    meta: dict[str, Any] = field(default_factory=dict)


def by_reference(calls: list[Call]) -> None:
    for call in calls:
        TRITON[call.kernel](call.grid, *call.arguments, **call.meta)


def by_kernel(file: str, calls: list[Call], folder: Path) -> list[Call]:
    """The calls as the kernels of `file`, a path in site-packages, left their arguments.

    These stay as they are.
    """
    given = folder / "calls.pt"
    torch.save([(c.kernel, c.grid, c.arguments, c.meta) for c in calls], given)
    apart = {k: v for k, v in os.environ.items() if k not in ("LD_PRELOAD", "EMULATED_CUDA_HOOKS")}
    subprocess.run(
        [sys.executable, "-m", __name__, file, given], env=apart | {"TRITON_INTERPRET": "1"}, check=True
    )
    return [Call(*call) for call in torch.load(given, weights_only=False)]


def assert_same_arguments(calls: list[Call], others: list[Call]) -> None:
    for call, other in zip(calls, others, strict=True):
        for number, (ours, theirs) in enumerate(zip(call.arguments, other.arguments, strict=True)):
            if isinstance(ours, torch.Tensor):
                told = f"{call.kernel}, argument {number}: "
                torch.testing.assert_close(ours, theirs, msg=told.__add__)


def main(file: str, given: str) -> None:
    package, _, rest = file.partition("/")
    found = importlib.util.find_spec(package)
    assert found is not None and found.submodule_search_locations
    path = Path(next(iter(found.submodule_search_locations)), rest)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    calls = torch.load(given, weights_only=False)
    for name, grid, arguments, meta in calls:
        kernel = getattr(module, name)
        # one whose block sizes are tuned stands before the kernel itself
        kernel = kernel.fn if type(kernel).__name__ == "Autotuner" else kernel
        kernel[grid](*arguments, **meta)
    torch.save(calls, given)


if __name__ == "__main__":
    main(*sys.argv[1:])
