"""Every check of tools/gpu_check.py runs on the emulated device, in small shapes.

But for the whole iterations: SGLang's kernels have no emulation.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.gpu_emulated.launch import launch
from tools import gpu_check

pytestmark = pytest.mark.long

FOR_BLACKWELL = "step in fp8, mxfp8"
WEIGHTS = 1_000_000
"""The small model has more; in bf16 each takes 18 bytes with its gradient and its optimizer's."""
WORKSPACES_GB = 5 * 2**25 / 1e9
"""Transformer Engine's for cuBLAS: one, and one for each of the four streams of a grouped GEMM."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Of every check: the first in a process that imports for itself, as the tool does, the rest forked."""
    folder = tmp_path_factory.mktemp("gpu_check")
    gpu_check.make_model(folder, "small", "cpu")
    first, *others = (name for name in gpu_check.CHECKS if name not in gpu_check.ITERATIONS)
    done = {first: gpu_check.run_check(first, folder)}
    done |= {name: launch("gpu_check", name=name, folder=folder)[0] for name in others}
    gpu_check.relative_to_bf16(done)
    return done


def test_every_check_runs_but_for_a_recipe_that_the_device_lacks(results):
    assert {name: result.get("why") for name, result in results.items() if result["status"] == "failed"} == {}
    assert [name for name, result in results.items() if result["status"] == "skipped"] == [FOR_BLACKWELL]
    assert "compute capability 10.0" in results[FOR_BLACKWELL]["why"]


def test_log_probs_and_gradients_are_transformers_and_packing_changes_nothing(results):
    assert results["log-probs against transformers"]["figures"]["mean difference"] < 0.02
    assert max(results["gradient against transformers"]["figures"].values()) < 0.03
    assert results["packed against alone"]["figures"]["mean difference"] < 0.02


def test_steps_in_fp8_are_near_the_step_in_bf16(results):
    for name, result in results.items():
        if name not in gpu_check.STEPS or "figures" not in result:
            continue
        figures = result["figures"]
        if name != "step in fp8, delayed":  # its scales move from pass to pass
            assert abs(figures["loss off the closed form"]) < 1e-6, name
        if name != gpu_check.STEP:
            assert figures["loss error"] < 0.05, name
        if name not in (gpu_check.STEP, gpu_check.ADAPTERS):
            assert figures["gradient norm error"] < 0.1, name


def test_nothing_stays_on_the_device_and_a_checkpoint_gives_the_same_step(results):
    for name, result in results.items():
        if name.startswith("offload"):
            assert result["figures"]["GB moved"] > 18 * WEIGHTS / 1e9, name
            assert result["figures"]["GB left"] < WORKSPACES_GB + 1e-3, name
        if name.startswith("checkpoint"):
            figures = result["figures"]
            assert figures["loss difference"] == figures["gradient norm difference"] == 0, name
    assert results["weights through a CUDA IPC handle"]["figures"]["GB left"] == 0
