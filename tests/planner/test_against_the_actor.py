"""The planner's bytes are those that a real megatron-core actor of the tiny recipe holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_pmd.config import override
from megatron_pmd.launch.cluster import load_cluster
from megatron_pmd.planner.planning import make_plan
from recipes import recipe
from recipes.tiny_moe_cpu import make_model

pytestmark = pytest.mark.slow
PROJECT = Path(__file__).parents[2]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_gradients_and_optimizer_are_as_planned(precision: str, tmp_path: Path) -> None:
    """The two ranks share the dense parameters' optimizer state unevenly, by padding; its sum is exact."""
    folder = tmp_path / "tiny-moe"
    make_model(folder)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    done = subprocess.run(
        [*command, "tests.planner.measured", str(folder), str(tmp_path), precision],
        cwd=PROJECT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    config = override(recipe("tiny_moe_cpu"), [f"model.path={folder}", f"model.precision={precision}"])
    (stage,) = make_plan(config, load_cluster("lab").machines).stages
    for rank in ranks:
        assert rank["weights"] == stage.weight_bytes
        assert rank["gradients"] == stage.gradient_bytes
    assert sum(rank["optimizer"] for rank in ranks) == 2 * stage.optimizer_bytes
