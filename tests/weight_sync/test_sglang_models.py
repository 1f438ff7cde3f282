"""What the loader has to make good in SGLang's own models; in a program of its own, sglang_programs.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_pmd.weight_sync.readers import readers_of

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the stand-ins for CUDA are for machines without it"
)


@pytest.fixture(scope="module")
def seen() -> Any:
    project = Path(__file__).parents[2]
    path = os.pathsep.join(map(str, [project / "megatron_pmd" / "engine" / "cpu", project]))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.weight_sync.sglang_programs"],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path, "SGLANG_USE_CPU_ENGINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_full_verification_of_an_fp8_model_asks_for_no_scales_of_the_cache(seen):
    assert seen["fp8 verified"] is None


def test_an_update_gives_the_cache_the_scales_that_a_release_lost(seen):
    """SGLang looks at what it finds when an update ends, and dies of an assertion at the first of these."""
    assert seen["scales"] == [[None, 1.0, 1.0]] * 3


def test_the_plan_sends_an_expert_to_the_ranks_where_sglang_takes_it(seen):
    for shape, served in seen["served"].items():
        experts, ranks, expert_parallel = json.loads(shape.replace("(", "[").replace(")", "]"))
        engine = tuple(range(ranks))
        readers = readers_of(
            [0] * ranks, [engine] + [()] * (ranks - 1), on_device=True, expert_parallel=expert_parallel
        )
        for rank in engine:
            kind = readers.kinds.index(readers.shares[rank])
            sent = [number for number in range(experts) if kind in readers.kinds_of(number, experts)]
            assert sent == served[rank]


def test_a_tensor_that_qwen3_moe_drops_without_a_word_is_an_error_by_name(seen):
    assert seen["known"] == [None] and seen["loaded"] == [2.0] * 4
    [error] = seen["unknown"]
    assert "no place for 1 of its tensors" in error and "model.nrom.weight" in error
