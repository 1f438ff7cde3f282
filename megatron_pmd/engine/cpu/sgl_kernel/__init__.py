"""Import-only stand-in for sgl-kernel, whose CPU build is not on the package index.

SGLang's CPU path asks for the operator torch.ops.sgl_kernel.convert_weight_packed and, not finding it,
computes with plain torch. The names it imports from here belong to paths that are not taken; one that is
called says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def __getattr__(name: str) -> Callable[..., Any]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"sgl_kernel.{name} needs the real sgl-kernel, and that needs CUDA")

    missing.__name__ = name
    return missing
