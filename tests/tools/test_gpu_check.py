"""The tool for a first contact with a GPU, as far as a machine without one goes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_pmd.errors import ModelError
from megatron_pmd.weight_sync.bucket import SharedBucket
from tests.weight_sync.filling import fill
from tools import gpu_check

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU run the tool itself"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu_check")
    gpu_check.make_model(folder, "small", "cpu")
    return folder


def test_a_check_that_needs_no_gpu_runs_and_says_what_it_measured(folder):
    result = gpu_check.run_check("log-probs against transformers", folder)
    assert result["status"] == "ran"
    assert 0 < result["figures"]["mean difference"] < 0.02


def test_the_gradient_of_a_step_is_transformers_but_for_bf16(folder):
    result = gpu_check.run_check("gradient against transformers", folder)
    assert result["status"] == "ran"
    assert result["figures"].keys() == gpu_check.COMPARED.keys()
    assert 0 < max(result["figures"].values()) < 0.05


def test_the_step_after_a_checkpoint_is_the_same_after_loading_it(folder):
    result = gpu_check.run_check("checkpoint and resume with bf16", folder)
    assert result["status"] == "ran"
    assert result["figures"]["loss difference"] == result["figures"]["gradient norm difference"] == 0
    assert result["figures"]["GB"] > 1e-4


def test_another_process_loads_a_bucket_and_refuses_a_changed_one(tmp_path):
    bucket = SharedBucket("gpu-check-test", 4096, folder=tmp_path)
    description = fill(bucket, {"w": torch.ones(10)})
    assert 0 < gpu_check.read_elsewhere(description) < 60
    bucket.data[0] ^= 1
    with pytest.raises(ModelError, match=r"tensor w .* has not the checksum"):
        gpu_check.read_elsewhere(description)
    bucket.close()


def test_what_this_machine_cannot_do_is_skipped_with_the_reason(folder):
    result = gpu_check.run_check("step in fp8, blockwise", folder)
    assert result == {
        "status": "skipped",
        "why": "actor.fp8.recipe=blockwise: needs CUDA, and this machine has none; leave it at its default",
    }


def test_steps_are_related_to_the_bf16_step_and_those_of_adapters_to_their_own():
    over_fp8 = f"{gpu_check.ADAPTERS}, over fp8 tensorwise"
    results: dict[str, dict[str, Any]] = {
        "step in bf16": {"figures": {"loss": 2.0, "gradient norm": 4.0, "seconds": 3.0}},
        "step in fp8, delayed": {"figures": {"loss": 2.1, "gradient norm": 3.0, "seconds": 1.5}},
        "step in fp8, mxfp8": {"status": "skipped", "why": "no Blackwell"},
        gpu_check.ADAPTERS: {"figures": {"loss": 2.0, "gradient norm": 0.5, "seconds": 1.0}},
        over_fp8: {"figures": {"loss": 1.0, "gradient norm": 0.4, "seconds": 0.5}},
    }
    gpu_check.relative_to_bf16(results)
    figures = results["step in fp8, delayed"]["figures"]
    assert figures["loss error"] == pytest.approx(0.05)
    assert figures["gradient norm error"] == 0.25 and figures["speed-up"] == 2.0
    assert "figures" not in results["step in fp8, mxfp8"]
    adapters = results[gpu_check.ADAPTERS]["figures"]
    assert adapters["loss error"] == 0 and adapters["speed-up"] == 3 and "gradient norm error" not in adapters
    figures = results[over_fp8]["figures"]
    assert figures["loss error"] == 0.5 and figures["speed-up"] == 2
    assert figures["gradient norm error"] == pytest.approx(0.2)
