"""Import-only stand-in for torchvision.

The package index's wheel is a CUDA build that cannot be imported next to a CPU build of torch; SGLang and
transformers need the package, and one enum of it, when their image processors are imported. No image is
processed.
"""

from __future__ import annotations

import enum
from typing import Any

from _import_only import attribute, stub_submodules

stub_submodules("torchvision")
__version__ = "0.28.0"


def __getattr__(name: str) -> Any:
    return attribute("torchvision", name)


class _InterpolationMode(enum.Enum):
    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


import torchvision.transforms as _transforms  # noqa: E402

_transforms.InterpolationMode = _InterpolationMode
