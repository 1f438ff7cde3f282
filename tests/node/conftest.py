from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_pmd.node import job
from megatron_pmd.node.worker import JobSpec
from megatron_pmd.shared_memory import own_memory
from tests.node.played_slurm import SCONTROL, SINFO, Played, Start


@pytest.fixture
def played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Played:
    made = Played(tmp_path)
    (tmp_path / "bin").mkdir()
    made.program("scontrol", SCONTROL)
    made.program("sinfo", SINFO)
    made.node_states(n1="allocated", n2="allocated", n3="idle")
    made.job_state("RUNNING")
    for name, value in {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "PLAYED": str(tmp_path),
        "PMD_RUNS": str(tmp_path / "runs"),
        "PMD_NAME": "tau005",
        "SLURM_JOB_ID": "5",
        "SLURM_JOB_NODELIST": "n[1-2]",
    }.items():
        monkeypatch.setenv(name, value)
    for name in (
        "SLURM_RESTART_COUNT",
        "PMD_CHAIN_LINK",
        "PMD_MAX_ATTEMPTS",
        "PMD_MAX_CRASHES",
        "PMD_ATTEMPT",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(job, "free_port", lambda host, first: first)
    return made


@pytest.fixture
def start(played: Played, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Start:
    return Start(monkeypatch, capsys)


@pytest.fixture
def spec(tmp_path: Path) -> JobSpec:
    """Of two ranks that share this node."""
    return JobSpec(
        config={},
        folder=str(tmp_path),
        outcomes=str(tmp_path / "outcome"),
        heartbeats=own_memory("heartbeat", 2),
        stacks=own_memory("stacks", 2),
    )
