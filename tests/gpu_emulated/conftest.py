"""The CUDA half of the actor on the emulated device (tests/emulated_cuda): `make gpu-emulated`."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.actor.reference import Reference, compute
from tests.actor.tiny_models import FAMILIES, write_model

if "EMULATED_CUDA_STATE" not in os.environ:
    raise pytest.UsageError("tests/gpu_emulated runs on the emulated device: make gpu-emulated")

FP8_FAMILIES = {
    "dense for fp8": ("qwen3", {}),
    "experts for fp8": ("qwen3moe", dict(moe_intermediate_size=128)),
    "latent for fp8": (
        "moonlight",
        dict(
            moe_intermediate_size=128, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=64,
            v_head_dim=64, head_dim=64,
        ),
    ),
}  # fmt: skip
"""By name, the family and what differs from its tiny model: FP8 takes multiples of 16, its blocks of 128."""
FP8_WIDTHS = dict(hidden_size=128, intermediate_size=256, initializer_range=0.03)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tiny models with reference.pt each; xdist's workers share one.

    The references are computed on the CPU, by transformers in float64.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder = root / "models"
    with (root / "models.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            partial = root / "models.partial"
            for family in FAMILIES:
                write_model(partial / family, family)
            for name, (family, changes) in FP8_FAMILIES.items():
                write_model(partial / name, family, **(FP8_WIDTHS | changes))
            for model in sorted(partial.iterdir()):
                torch.save(compute(model), model / "reference.pt")
            partial.rename(folder)
    return folder


@pytest.fixture(scope="session")
def reference(models: Path) -> Callable[[str], Reference]:
    return lambda name: torch.load(models / name / "reference.pt", weights_only=False)
