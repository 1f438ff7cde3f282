"""What the ranks of a node are given."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure, record

from megatron_pmd import files
from megatron_pmd.config import override
from megatron_pmd.errors import ConfigError, DamagedCheckpoint
from megatron_pmd.node import ranks, worker
from megatron_pmd.node.ranks import Nodes, threads_per_rank
from megatron_pmd.node.worker import JobSpec
from megatron_pmd.outcome import RunOutcome, Status
from megatron_pmd.shared_memory import own_memory
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


def test_ranks_that_find_their_checkpoint_damaged_are_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = RunOutcome.of(DamagedCheckpoint("DAMAGED CHECKPOINT: a file has changed"))
    outcomes = [damaged, RunOutcome(Status.COMPLETE)]
    monkeypatch.setattr(ranks, "run_ranks", lambda *words, **options: outcomes.pop(0))
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):  # run_here sets them: taken back at the end
        monkeypatch.setenv(name, "lo")
    assert ranks.run_here(recipe("tiny_moe_cpu"), tmp_path).status is Status.COMPLETE
    assert outcomes == [] and "a file has changed" in capsys.readouterr().err
    assert damaged.may_start_again, "on Slurm the job is requeued"


TWO_RANKS = Nodes(1, 0, 2, "localhost:0")


def ended(*exit_codes: int) -> ChildFailedError:
    """As torch's agent tells of ranks 0, 1 …"""
    return ChildFailedError(
        "x", {rank: ProcessFailure(rank, 100 + rank, code, "") for rank, code in enumerate(exit_codes)}
    )


def test_of_several_failed_ranks_the_first_to_say_why_is_named(spec: JobSpec, tmp_path: Path) -> None:
    for rank, reason in ((1, "no such tensor"), (0, "gloo: connection closed by peer")):
        RunOutcome(Status.FAILED, reason, "RuntimeError").write(spec.outcome_file(rank))
        os.utime(spec.outcome_file(rank), (time.time() + 10 * (1 - rank),) * 2)
    outcome = ranks._of_first_failure(ended(1, 1), spec, tmp_path / "logs", TWO_RANKS)
    assert outcome.reason == f"rank 1 failed: no such tensor; logs: {tmp_path / 'logs'}"


def test_a_rank_that_was_ended_for_standing_still_is_named_though_torch_only_saw_those_that_lost_it(
    spec: JobSpec, tmp_path: Path
) -> None:
    RunOutcome(Status.FAILED, "it gave no sign of life").write(spec.outcome_file(1))
    RunOutcome(Status.FAILED, "gloo: connection closed by peer", "RuntimeError").write(spec.outcome_file(0))
    outcome = ranks._of_first_failure(ended(1), spec, tmp_path / "logs", TWO_RANKS)
    assert outcome.reason.startswith("rank 1 failed: it gave no sign of life; logs:")


def test_a_killed_rank_is_named_before_those_that_lost_it(spec: JobSpec, tmp_path: Path) -> None:
    RunOutcome(Status.FAILED, "gloo: connection closed by peer", "RuntimeError").write(spec.outcome_file(0))
    outcome = ranks._of_first_failure(ended(1, -9), spec, tmp_path / "logs", TWO_RANKS)
    assert outcome.reason.startswith("rank 1 failed: it ended with SIGKILL; logs:")


def test_a_failure_on_a_full_disk_says_so_whatever_else_it_says(spec: JobSpec, tmp_path: Path) -> None:
    """/proc is a file system without room."""
    assert files.full_disk(Path("/proc")) and not files.full_disk(tmp_path)
    spec = JobSpec(
        config={},
        folder="/proc",
        outcomes=spec.outcomes,
        heartbeats=own_memory("heartbeat", 2),
        stacks=own_memory("stacks", 2),
    )
    outcome = ranks._of_first_failure(ended(1), spec, tmp_path / "logs", TWO_RANKS)
    assert outcome.reason.startswith(
        "rank 0 failed: it ended with exit code 1; the disk of /proc is full: make room, the same command"
    )


def test_a_summary_that_has_no_room_does_not_hide_the_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*arguments: object) -> None:
        with open("/dev/full", "w") as full:
            full.write("x")

    monkeypatch.setattr(ranks, "write_summary", write)
    outcome = RunOutcome(Status.FAILED, "rank 0 failed")
    assert ranks._ended(tmp_path, Nodes(1, 0, 1, ""), outcome) is outcome


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (signal.SIGTERM, Status.INTERRUPTED),
        (signal.SIGINT, Status.INTERRUPTED),
        (signal.SIGKILL, Status.FAILED),
    ],
)
def test_a_rank_that_the_signal_of_a_cancelled_job_reached_first_has_not_failed(
    spec: JobSpec, tmp_path: Path, number: signal.Signals, status: Status
) -> None:
    outcome = ranks._of_first_failure(ended(-number), spec, tmp_path, TWO_RANKS)
    assert outcome.status is status and number.name in outcome.reason


def test_a_further_start_makes_no_further_folder_of_logs(tmp_path: Path) -> None:
    for _ in range(2):
        nodes = Nodes(1, 0, 2, "localhost:0")
        launch = ranks._launch_config(recipe("tiny_moe_cpu"), nodes, tmp_path, "spawn")
        launch.logs_specs.reify({0: {}, 1: {}})
    assert [path.name for path in tmp_path.iterdir()] == ["ranks-of-node-0"]


def started_as_rank_0(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    """As worker.run_rank expects its process to be, and without what would change the one of the tests."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", **variables}.items():
        monkeypatch.setenv(name, value)
    for name in ("die_with_parent", "setproctitle", "allow_many_files"):
        monkeypatch.setattr(worker, name, lambda *words, **options: None)
    monkeypatch.setattr(worker.signal, "signal", lambda number, handler: None)
    for name in ("enable", "register"):
        monkeypatch.setattr(worker.faulthandler, name, lambda *words, **options: None)


@pytest.mark.parametrize(
    ("failure", "world_size", "waits"),
    [
        (RuntimeError("gloo: connection closed by peer"), "2", True),
        (RuntimeError("gloo: connection closed by peer"), "1", False),
        (ConfigError("rollout.sglang.nonsense is not an option"), "2", False),
    ],
)
def test_a_rank_that_may_only_have_lost_one_of_another_node_notes_why_and_lets_that_node_end_first(
    spec: JobSpec, monkeypatch: pytest.MonkeyPatch, failure: Exception, world_size: str, waits: bool
) -> None:
    def fail(spec: JobSpec) -> None:
        raise failure

    noted_before_waits = []
    started_as_rank_0(monkeypatch, WORLD_SIZE=world_size)
    monkeypatch.setattr(worker, "main", fail)
    monkeypatch.setattr(
        worker.time, "sleep", lambda seconds: noted_before_waits.append(RunOutcome.read(spec.outcome_file(0)))
    )
    with pytest.raises(SystemExit):
        worker.run_rank(spec)
    assert noted_before_waits == ([RunOutcome.of(failure)] if waits else [])


def test_a_rank_on_a_full_disk_notes_its_reason_and_leaves_torch_no_file_to_read(
    spec: JobSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's `record` writes what a function raises to TORCHELASTIC_ERROR_FILE, beside the run's logs."""

    def fail(spec: JobSpec) -> None:
        raise ValueError("what went wrong")

    def no_room(text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    torchs = tmp_path / "error.json"
    started_as_rank_0(monkeypatch, WORLD_SIZE="1", TORCHELASTIC_ERROR_FILE=str(torchs))
    monkeypatch.setattr(worker, "main", fail)
    full = io.StringIO()
    monkeypatch.setattr(full, "write", no_room)
    monkeypatch.setattr(sys, "stderr", full)
    with pytest.raises(SystemExit) as ended:
        record(worker.run_rank)(spec)
    assert ended.value.code == 1 and not torchs.exists()
    outcome = RunOutcome.read(spec.outcome_file(0))
    assert outcome is not None and outcome.reason == "what went wrong"
