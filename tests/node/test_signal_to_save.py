"""What Slurm tells its direct child reaches the ranks: the step of slurm/train.sbatch, ranks that wait."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_pmd.launch.script import TEMPLATE
from megatron_pmd.node.ranks import LISTENING_SECONDS
from megatron_pmd.outcome import RunOutcome, Status

PROJECT = Path(__file__).parents[2]
STEP = TEMPLATE.read_text().partition("bash -c '")[2].partition("' || code=$?")[0]
"""What srun starts on a node."""

NODE = """
import sys
from megatron_pmd.node import main, worker
from tests.node.waiting_rank import wait
worker.import_what_ranks_need = lambda: None
worker.run_rank = wait
sys.exit(main.main())
"""


@pytest.fixture
def step(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """The step of a job on one node, running: the process that Slurm would start, and signal."""
    python = tmp_path / "python"  # in the place of `python -m megatron_pmd.node.main`
    (tmp_path / "node.py").write_text(NODE)
    python.write_text(f"#!/bin/sh\nexec {sys.executable} {tmp_path}/node.py\n")
    python.chmod(0o755)
    run = tmp_path / "runs" / "tiny_moe_cpu"
    (run / "launch").mkdir(parents=True)
    environment = {
        "PMD_RECIPE": "tiny_moe_cpu", "PMD_NAME": "tiny_moe_cpu", "PMD_GPU": "cpu",
        "PMD_RUNS": str(tmp_path / "runs"),
        "PMD_ROOT": str(tmp_path), "PMD_PYTHON": str(python), "PMD_SETUP": "true", "PMD_ATTEMPT": "1",
        "PMD_RANKS_PER_NODE": "2", "PMD_STATE": str(run / "launch"), "PMD_NODES": "localhost",
        "PMD_PREFLIGHT": '{"free_disk_gigabytes": 0}', "SLURM_NODEID": "0", "SLURM_NNODES": "1",
        "SLURMD_NODENAME": "n1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "PYTHONPATH": str(PROJECT),
    }  # fmt: skip

    process = subprocess.Popen(
        ["bash", "-c", STEP], env=os.environ | environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    yield process
    process.kill()
    process.communicate()


def test_the_direct_child_alone_is_told_to_save_and_all_ranks_do(
    step: subprocess.Popen[str], tmp_path: Path
) -> None:
    """Told as soon as the node is checked, while torch's agent is imported: before there are ranks."""
    run = tmp_path / "runs" / "tiny_moe_cpu"
    while not (run / "launch" / "preflight" / "1" / "0.json").exists():
        assert step.poll() is None, step.communicate()[0]
        time.sleep(0.01)
    step.send_signal(signal.SIGUSR1)
    output, _ = step.communicate(timeout=60)
    assert step.returncode == 0, output
    outcome = RunOutcome.read(run / "launch" / "outcome.json")
    assert outcome == RunOutcome(Status.SAVED, "was told to save (SIGUSR1)")
    assert (run / "saved-0").exists() and (run / "saved-1").exists()


LAUNCHER = """
import subprocess, sys
from megatron_pmd.node import ranks
from megatron_pmd.processes import SAVE, hold_back
hold_back(SAVE)
program = '''
import signal
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
signal.signal(signal.SIGUSR1, signal.SIG_DFL)
print("runs", flush=True)
input()
'''
rank = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE)
with ranks._passing_on_the_signal_to_save():
    for line in sys.stdin:
        print("alive" if rank.poll() is None else "told to save", flush=True)
"""


def test_a_launcher_that_was_stopped_for_a_while_tells_its_ranks_nothing_until_it_is_told() -> None:
    """As by Ctrl-Z and `fg`."""
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(PROJECT)},
    )  # fmt: skip
    assert launcher.stdin is not None and launcher.stdout is not None
    assert launcher.stdout.readline() == "runs\n"

    def asked() -> str:
        assert launcher.stdin is not None and launcher.stdout is not None
        launcher.stdin.write("\n")
        launcher.stdin.flush()
        return launcher.stdout.readline()

    launcher.send_signal(signal.SIGSTOP)
    time.sleep(3 * LISTENING_SECONDS)
    launcher.send_signal(signal.SIGCONT)
    time.sleep(3 * LISTENING_SECONDS)
    assert asked() == "alive\n"
    launcher.send_signal(signal.SIGUSR1)
    deadline = time.monotonic() + 30
    while asked() != "told to save\n":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    launcher.stdin.close()
    launcher.wait(30)
    launcher.stdout.close()
