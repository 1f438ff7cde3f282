"""What the ranks of a node are given."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_pmd.config import override
from megatron_pmd.node.ranks import Nodes, _launch_config, _of_first_failure, threads_per_rank
from megatron_pmd.node.worker import JobSpec
from megatron_pmd.outcome import Status
from recipes import recipe


def test_ranks_that_step_their_optimizer_on_the_host_share_the_cores_of_the_node(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch's AdamW is as fast as it has threads; else one is enough on a GPU."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(100)))
    config, nodes = recipe("qwen2_5_7b_dapo_8xh100"), Nodes(1, 0, 8, "localhost:0")
    assert threads_per_rank(config, nodes) == 1
    assert threads_per_rank(override(config, ["optimizer.offload=0.5"]), nodes) == 12
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
    assert threads_per_rank(override(config, ["optimizer.offload=0.5"]), nodes) == 1


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (signal.SIGTERM, Status.INTERRUPTED),
        (signal.SIGINT, Status.INTERRUPTED),
        (signal.SIGKILL, Status.FAILED),
    ],
)
def test_a_rank_that_the_signal_of_a_cancelled_job_reached_first_has_not_failed(
    tmp_path: Path, number: signal.Signals, status: Status
) -> None:
    failure = SimpleNamespace(local_rank=0, exitcode=-number, signal_name=lambda: number.name)
    failed = SimpleNamespace(get_first_failure=lambda: (3, failure))
    outcome = _of_first_failure(failed, JobSpec({}, "", str(tmp_path / "outcome")), tmp_path)
    assert outcome.status is status and number.name in outcome.reason


def test_a_further_start_makes_no_further_folder_of_logs(tmp_path: Path) -> None:
    for _ in range(2):
        specs = _launch_config(recipe("tiny_moe_cpu"), Nodes(1, 0, 2, "localhost:0"), tmp_path).logs_specs
        specs.reify({0: {}, 1: {}})
    assert [path.name for path in tmp_path.iterdir()] == ["ranks-of-node-0"]
