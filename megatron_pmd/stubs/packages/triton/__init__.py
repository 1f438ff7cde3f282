"""Import-only stand-in for Triton.

SGLang and megatron-bridge import it at module level and decorate kernels with it; without CUDA none of those
kernels is launched, and the real package (a CUDA compiler) is not installed next to a CPU build of torch.
"""

from __future__ import annotations

from typing import Any

from _import_only import attribute, stub_submodules

stub_submodules("triton")
__version__ = "3.5.0"


class Config:
    """Autotuning configurations are built at import time: the arguments are kept, nothing reads them."""

    def __init__(
        self, kwargs: dict | None = None, num_warps: int = 4, num_stages: int = 2, **extra: Any
    ) -> None:
        self.kwargs, self.num_warps, self.num_stages = kwargs or {}, num_warps, num_stages


# These two are also called outside kernels, for sizes of plain tensors: they have to be right.
def cdiv(a: int, b: int) -> int:
    return -(a // -b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length() if n > 0 else 1


def __getattr__(name: str) -> Any:
    return attribute("triton", name)


import triton.language as _language  # noqa: E402


class _Constexpr:
    """Module-level constants of kernels are wrapped in tl.constexpr(value) at import time."""

    def __init__(self, value: Any = None) -> None:
        self.value = value


_language.constexpr = _Constexpr
