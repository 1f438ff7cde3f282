"""What the pre-flight holds against a node, and that it names it."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

from megatron_pmd.config import override
from megatron_pmd.errors import ConfigError, LaunchError
from megatron_pmd.launch.cluster import Preflight
from megatron_pmd.node import preflight
from megatron_pmd.node.allocation import Allocation
from megatron_pmd.node.preflight import (
    Report,
    check_nodes,
    core_problems,
    disk_problems,
    exchange,
    gpu_problems,
    judge,
    plan_problems,
    refuse,
)
from megatron_pmd.node.worker import JobSpec
from megatron_pmd.outcome import RunOutcome, Status
from megatron_pmd.shared_memory import own_memory
from recipes import recipe

SOFTWARE = {"python": "3.11.7", "packages": {"torch": "2.13.0", "sglang": "0.5.21"}, "commit": "abc"}
HEALTHY = "\n".join(f"{i}, 580.65.06, 0, 4, 81559" for i in range(8))


def allocation(folder: Path, rank: int = 0, nodes: int = 2) -> Allocation:
    return Allocation(f"n{rank + 1}", rank, nodes, 1, 1, folder, "n1", 20000)


def report(host: str, **values: object) -> Report:
    return Report(host, software=SOFTWARE, **values)  # type: ignore[arg-type]


def test_nodes_alike_pass() -> None:
    assert judge([report("n1"), report("n2")], 5.0) == {}


def test_another_version_or_commit_than_most_nodes_have_is_named() -> None:
    odd = Report(
        "n2", software=SOFTWARE | {"packages": {"torch": "2.12.0", "sglang": "0.5.21"}, "commit": "def"}
    )
    assert judge([report("n1"), odd, report("n3")], 5.0) == {
        "n2": ["commit is def, elsewhere abc", "torch is 2.12.0, elsewhere 2.13.0"]
    }


def test_a_clock_that_is_off_is_named() -> None:
    reports = [report("n1", clock_offset_seconds=0.1), report("n2", clock_offset_seconds=0.0)]
    reports.append(report("n3", clock_offset_seconds=-42.0))
    assert judge(reports, 5.0) == {"n3": ["its clock is -42.0 s off the others'"]}


def test_the_failing_nodes_are_listed_for_the_batch_script(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match=r"(?s)1 node\(s\) cannot take part.*node n2: 7 GPUs answer"):
        refuse({"n2": ["7 GPUs answer, 8 wanted"]}, allocation(tmp_path))
    assert (tmp_path / "bad_nodes").read_text() == "n2\n"


def test_no_node_is_left_out_for_what_all_of_them_have(tmp_path: Path) -> None:
    too_old = ["GPU 0: driver 570.1, 580 or newer wanted"]
    with pytest.raises(
        LaunchError, match=r"(?s)2 node\(s\) cannot take part.*node n1: GPU 0.*node n2: GPU 0"
    ):
        refuse({"n1": too_old, "n2": too_old}, allocation(tmp_path))
    assert not (tmp_path / "bad_nodes").exists()
    with pytest.raises(LaunchError):
        refuse({"n1": too_old}, allocation(tmp_path, nodes=1))
    assert (tmp_path / "bad_nodes").read_text() == "n1\n", "the only node may be the one that is not well"


def test_reports_pass_through_the_shared_folder(tmp_path: Path) -> None:
    both: dict[int, list[Report]] = {}

    def meet(rank: int) -> None:
        own = report(f"n{rank + 1}", problems=[f"of {rank}"])
        both[rank] = exchange(own, tmp_path / "meeting", allocation(tmp_path, rank), 20.0)

    threads = [threading.Thread(target=meet, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [r.problems for r in both[0]] == [r.problems for r in both[1]] == [["of 0"], ["of 1"]]


def test_a_node_that_does_not_report_is_named_at_the_deadline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PMD_NODES", "n1 n2")
    with pytest.raises(LaunchError, match=r"node n2: no report in .* is the folder mounted there\?"):
        exchange(report("n1"), tmp_path / "meeting", allocation(tmp_path), 0.3)


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (HEALTHY.rpartition("\n")[0], "7 GPUs answer, 8 wanted"),
        ("", "0 GPUs answer, 8 wanted"),
        (HEALTHY.replace("3, 580.65.06", "3, 525.1"), "GPU 3: driver 525.1, 580 or newer wanted"),
        (HEALTHY.replace("5, 580.65.06, 0", "5, 580.65.06, 2"), "GPU 5: 2 uncorrected memory errors"),
        (
            HEALTHY.replace("0, 580.65.06, 0, 4,", "0, 580.65.06, 0, 60000,"),
            "GPU 0: 60000 of 81559 MiB in use",
        ),
    ],
)
def test_a_gpu_that_is_not_well_is_named(answer: str, problem: str) -> None:
    assert problem in " ".join(gpu_problems(answer, 8, "580"))


def test_healthy_gpus_pass_also_where_error_counts_are_not_kept() -> None:
    assert gpu_problems(HEALTHY, 8, Preflight().driver) == []
    assert gpu_problems(HEALTHY.replace(", 0, 4", ", [N/A], 4"), 8, None) == []


def test_a_node_that_is_slow_with_the_first_is_named_and_a_slow_network_is_not() -> None:
    from megatron_pmd.node.bandwidth import slow_nodes

    assert slow_nodes({"n2": 180.0, "n3": 21.0, "n4": 175.0}) == ["n3"]
    assert slow_nodes({"n2": 20.0, "n3": 21.0, "n4": 19.0}) == []
    assert slow_nodes({}) == []


def test_a_node_without_the_memory_or_the_room_that_the_plan_needs_is_told_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = recipe("qwen2_5_7b_dapo_8xh100")
    monkeypatch.setenv("PMD_GPU", "h100")
    healthy = SimpleNamespace(available=2e12), SimpleNamespace(free=2e12)
    monkeypatch.setattr(preflight.psutil, "virtual_memory", lambda: healthy[0])
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda folder: healthy[1])
    of_eight = Allocation("n1", 0, 1, 8, 1, tmp_path, "n1", 20000)
    assert plan_problems(config, of_eight, tmp_path) == ([], [])
    healthy[0].available, healthy[1].free = 1e9, 250e9
    [memory], [room] = plan_problems(config, of_eight, tmp_path)
    assert "1.0 GB of host memory free, the plan needs" in memory
    assert "250.0 GB free, checkpoints of 106.6 GB, of which 2 are kept and 0 there, need 319.9 GB" in room
    for number in (10, 20):
        (tmp_path / "checkpoints" / f"iteration-{number}").mkdir(parents=True)
    assert plan_problems(config, of_eight, tmp_path) == ([memory], []), "one more has room"
    beside_engines = dataclasses.replace(of_eight, ranks_per_node=4)
    shared = [
        "layout.engine_nodes=0",
        "sync.transport=ipc",
        "layout.data=6",
        "rollout.ranks_per_engine=4",
    ]
    overlapped = override(recipe("qwen3_30b_a3b_overlap_48xh100"), shared)
    [memory], _ = plan_problems(overlapped, beside_engines, tmp_path)
    assert "the plan needs 301.1 GB" in memory, "of 4 ranks; the node's other GPUs are the engines'"


def test_a_full_or_missing_disk_is_named(tmp_path: Path) -> None:
    limits = Preflight(free_disk_gigabytes=10**6)
    assert "1000000 wanted" in disk_problems(limits, [tmp_path])[0]
    assert "No such file" in disk_problems(limits, [tmp_path / "scratch"])[0]
    assert disk_problems(Preflight(free_disk_gigabytes=0), [tmp_path]) == []


@pytest.fixture
def gpu_node(tmp_path: Path) -> Iterator[Path]:
    """This machine, without a GPU, as a node of a job that asked for GPUs; the folder of the run's state."""
    variables = {
        "PMD_GPU": "h100", "PMD_RUNS": str(tmp_path), "PMD_STATE": str(tmp_path), "SLURMD_NODENAME": "n7",
        "PMD_PREFLIGHT": '{"free_disk_gigabytes": 0}', "PMD_INTERFACES": "lo", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    # takes back what the pre-flight sets, too: jobs that later tests start would talk over `lo`
    with mock.patch.dict(os.environ, variables):
        yield tmp_path


def test_a_node_whose_gpus_answer_but_whose_cuda_does_not_start_is_named_and_left_out(
    gpu_node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch itself says so, of a machine without a GPU."""
    monkeypatch.setattr(preflight, "_nvidia_smi", lambda: HEALTHY)
    node = Allocation("n7", 0, 1, 2, 1, gpu_node, "127.0.0.1", 20000)
    with pytest.raises(LaunchError, match=r"node n7: CUDA does not start: \w*Error: .*(CUDA|NVIDIA)"):
        check_nodes(recipe("tiny_moe_cpu"), gpu_node, node)
    assert (gpu_node / "bad_nodes").read_text() == "n7\n"


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        (
            "PMD_PREFLIGHT",
            '{"free_disk": 0}',
            r"PMD_PREFLIGHT: free_disk is not a setting \(did you mean free_d",
        ),
        ("PMD_GPU", "H100", r"PMD_GPU=H100 is none of h100, "),
    ],
)
def test_a_wrong_word_in_the_script_s_variables_is_named(
    gpu_node: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, problem: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=problem):
        check_nodes(
            recipe("tiny_moe_cpu"), gpu_node, Allocation("n7", 0, 1, 2, 1, gpu_node, "127.0.0.1", 20000)
        )
    assert not (gpu_node / "bad_nodes").exists()


def test_a_shared_folder_that_is_full_is_no_node_s_fault(
    gpu_node: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PMD_PREFLIGHT", json.dumps({"free_disk_gigabytes": 10**6}))
    monkeypatch.setenv("PMD_GPU", "cpu")
    node = Allocation("n7", 0, 1, 2, 1, gpu_node, "127.0.0.1", 20000)
    with pytest.raises(LaunchError, match=r"pre-flight: .* GB free, 1000000 wanted"):
        check_nodes(recipe("tiny_moe_cpu"), gpu_node, node)
    assert not (gpu_node / "bad_nodes").exists()


def test_a_rank_without_cuda_on_a_gpu_node_is_not_taken_for_one_on_a_cpu(gpu_node: Path) -> None:
    config = recipe("tiny_moe_cpu").model_dump(mode="json")
    spec = JobSpec(
        config=config,
        folder=str(gpu_node),
        outcomes=str(gpu_node / "outcome"),
        heartbeats=own_memory("heartbeat", 2),
        stacks=own_memory("stacks", 2),
    )
    done = subprocess.run(
        [sys.executable, "-c", f"from megatron_pmd.node.worker import JobSpec, run_rank; run_rank({spec!r})"],
        env=os.environ | {"LOCAL_RANK": "1", "RANK": "1", "WORLD_SIZE": "2"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    outcome = RunOutcome.read(spec.outcome_file(1))
    assert outcome is not None and outcome.status is Status.FAILED and outcome.error == "LaunchError"
    assert outcome.reason.startswith("node n7: CUDA does not start, although PMD_GPU=h100: ")
    assert (gpu_node / "bad_nodes").read_text() == "n7\n"


def test_a_step_that_slurm_has_bound_to_few_of_its_cores_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As task/affinity does to a step of one task that is not told how many cores it has."""
    monkeypatch.setenv("SLURM_JOB_CPUS_PER_NODE", "96(x3),64")
    monkeypatch.setattr(os, "cpu_count", lambda: 192)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 96})
    assert core_problems() == [
        "2 of the job's 64 cores may be used: srun has bound its step; use --cpu-bind=none"
    ]
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(60)))
    assert core_problems() == []
    monkeypatch.undo()
    assert core_problems() == [], "this machine's own cores, outside a job"
