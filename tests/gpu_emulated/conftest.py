"""The CUDA half of the actor on the emulated device (tests/emulated_cuda): `make gpu-emulated`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.actor.reference import Reference, write_with_references
from tests.actor.tiny_models import FAMILIES
from tests.emulated_cuda.run import device_of_this_worker

if "EMULATED_CUDA_STATE" not in os.environ:
    raise pytest.UsageError("tests/gpu_emulated runs on the emulated device: make gpu-emulated")
device_of_this_worker()

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

    The references are computed on the CPU, by transformers in float64. GPU_EMULATED_MODELS names a folder
    that keeps them for the next run.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    root = Path(os.environ.get("GPU_EMULATED_MODELS", root))
    for_fp8 = {name: (family, FP8_WIDTHS | changes) for name, (family, changes) in FP8_FAMILIES.items()}
    return write_with_references(root, {family: (family, {}) for family in FAMILIES} | for_fp8)


@pytest.fixture(scope="session")
def reference(models: Path) -> Callable[[str], Reference]:
    return lambda name: torch.load(models / name / "reference.pt", weights_only=False)


def asked_for(request: pytest.FixtureRequest, parameter: str, cases: dict[str, Any]) -> dict[str, Any]:
    """Those cases that a test of this run has as its parameter: to run one test launches no others."""
    asked = {
        item.callspec.params.get(parameter) for item in request.session.items if hasattr(item, "callspec")
    }
    return {name: case for name, case in cases.items() if name in asked}
