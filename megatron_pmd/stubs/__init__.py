"""What SGLang needs where there is no CUDA: import-only packages and a plugin, in one folder, `packages`.

The folder is not a package: it is put on the PYTHONPATH of the engine, and on sys.path of the trainer before
it imports megatron-bridge (which imports triton). Each package's docstring says why it is there.
"""

from __future__ import annotations

from pathlib import Path

from megatron_pmd.errors import ConfigError


def stub_path() -> Path:
    """The folder to add to the import path; raises ConfigError on a machine with CUDA."""
    import torch

    if torch.cuda.is_available():
        raise ConfigError(
            "the CPU stand-ins for triton, torchvision and sgl_kernel were asked for on a machine with CUDA, "
            "where they would hide the real kernels; to run on its CPU, set CUDA_VISIBLE_DEVICES=''"
        )
    return Path(__file__).parent / "packages"
