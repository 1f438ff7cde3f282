"""The process that the ranks of launch.py are forked from: they import for 15 s of a core each otherwise."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

from tests.actor import warm
from tests.gpu_emulated.settings import config

MODULES = ("programs", "number_programs", "memory_programs", "sync_programs")
RANKS = 4
"""At most: torch counts the devices once."""


def main(descriptor: int) -> None:
    from megatron_pmd.actor.environment import prepare_imports

    os.environ["EMULATED_CUDA_DEVICES"] = str(RANKS)
    # Of what a configuration sets, Transformer Engine reads one variable while it is imported: which scales
    # blocks have. It says nothing to other recipes.
    prepare_imports(config(Path(), "dense for fp8", "blockwise"))
    import torch

    for module in MODULES:
        importlib.import_module(f"tests.gpu_emulated.{module}")
    importlib.import_module("megatron.bridge")
    # Transformer Engine asks for the device's properties. After that CUDA is of no use in a forked process;
    # the emulated one is.
    cuda: Any = torch.cuda
    cuda._is_in_bad_fork = lambda: False
    warm.serve(descriptor, emulated=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
