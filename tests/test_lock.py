"""Two processes of the operating system, and one lock."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from megatron_pmd.errors import LaunchError
from megatron_pmd.lock import locked

HOLDER = """
import sys, time
from pathlib import Path
from megatron_pmd.lock import locked
with locked(Path(sys.argv[1]), "x", way_out=""):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process, which holds the lock of runs/x/lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "runs/x/lock")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_process_is_told_who_holds_the_lock_and_since_when(
    holder: subprocess.Popen[str], tmp_path: Path
) -> None:
    path = tmp_path / "runs/x/lock"
    with pytest.raises(LaunchError) as refused, locked(path, "runs/x is being trained", way_out="end it"):
        raise AssertionError("two hold it")
    text = str(refused.value)
    assert text.startswith(f"runs/x is being trained already, by process {holder.pid} on ")
    assert f"on {socket.gethostname()} since " in text and text.endswith(f"({path}); end it")
    since = datetime.fromisoformat(text.partition("since ")[2].partition(" (")[0])
    assert abs((datetime.now().astimezone() - since).total_seconds()) < 60


def test_who_waits_for_a_lock_says_for_what(
    holder: subprocess.Popen[str],
    tmp_path: Path,
    impatient: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, what = tmp_path / "runs/x/lock", "runs/x is being trained"
    with pytest.raises(LaunchError), locked(path, what, way_out="", patience_seconds=0.7):
        raise AssertionError("two hold it")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"waiting for the end of process {holder.pid} on ")
    assert line.endswith(f": runs/x is being trained by it ({path}), 0 s so far, at most 1 s")


def test_the_lock_of_a_killed_process_is_free_at_once(holder: subprocess.Popen[str], tmp_path: Path) -> None:
    holder.kill()
    with locked(tmp_path / "runs/x/lock", "runs/x is being trained", way_out="", patience_seconds=20):
        assert f'"pid": {os.getpid()}' in (tmp_path / "runs/x/lock").read_text()


def test_a_process_forked_from_the_holder_does_not_hold_the_lock_on(tmp_path: Path) -> None:
    """A rank that outlives the process that started it must not keep the next start out."""
    forks = HOLDER.replace(
        "time.sleep(600)", "import os; pid = os.fork(); pid or time.sleep(600); print(pid)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", forks, str(tmp_path / "lock")], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    child = int(holder.stdout.readline())
    try:
        assert holder.wait(60) == 0
        with locked(tmp_path / "lock", "x", way_out=""):
            os.kill(child, 0)
    finally:
        os.kill(child, signal.SIGKILL)
        holder.communicate()
