"""optimizer.offload: megatron-core's own optimizer, resumed; and what the actor does with its parts."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_pmd.actor.optimizer import reset_state
from megatron_pmd.actor.optimizer_state import own_step_counts
from tests.actor.warm import REPOSITORY


@pytest.mark.slow
def test_a_run_with_the_optimizer_on_the_host_resumes_with_the_next_step_bit_for_bit(models, tmp_path):
    """Without CUDA a process plays both memories: see host_optimizer_trial.py."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.actor.host_optimizer_trial"]
    done = subprocess.run(
        [*command, models / "qwen3", tmp_path],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = torch.load(tmp_path / "result.pt", weights_only=False)
    assert result["optimizer"] == "HybridDeviceOptimizer" and result["kinds"] == {"AdamW"}
    (step, weights), (resumed_step, resumed_weights) = result["third"], result["third_resumed"]
    assert step == resumed_step
    assert all(torch.equal(weights[name], resumed_weights[name]) for name in weights)
    # a shard of a moment would else keep the moment of the whole parameter in memory
    assert result["largest storage"] == 1


def test_forgetting_the_moments_leaves_the_fp32_parameters_that_some_optimizers_keep_beside_them():
    state: dict[str, Any] = {name: torch.ones(3) for name in ("exp_avg", "exp_avg_sq", "master_param")}
    inner = SimpleNamespace(state={"w": state | {"step": torch.tensor(5.0)}}, param_groups=[{"step": 5}])
    reset_state(SimpleNamespace(chained_optimizers=[SimpleNamespace(optimizer=inner)]))
    found = {name: float(value.sum()) for name, value in inner.state["w"].items()}
    assert found == {"exp_avg": 0, "exp_avg_sq": 0, "master_param": 3, "step": 0}
    assert inner.param_groups == [{"step": 0}]


def halves(**own: int) -> Any:
    """An optimizer of two parts: the host's torch counts steps per parameter, the device's per group."""
    host = SimpleNamespace(param_groups=[{"lr": 1.0}])
    device = SimpleNamespace(param_groups=[{"lr": 1.0, "step": 5}])
    whole = SimpleNamespace(state={}, param_groups=[{"lr": 1.0, **own}], sub_optimizers=[host, device])
    return SimpleNamespace(chained_optimizers=[SimpleNamespace(optimizer=whole)])


def test_forgetting_the_moments_sets_back_the_count_of_the_part_that_is_on_the_device():
    optimizer = halves()
    reset_state(optimizer)
    host, device = optimizer.chained_optimizers[0].optimizer.sub_optimizers
    assert host.param_groups == [{"lr": 1.0}] and device.param_groups == [{"lr": 1.0, "step": 0}]


def test_after_loading_only_the_parts_count_steps():
    optimizer = halves(step=5)
    own_step_counts(optimizer)
    whole = optimizer.chained_optimizers[0].optimizer
    assert whole.param_groups == [{"lr": 1.0}] and whole.sub_optimizers[1].param_groups[0]["step"] == 5
