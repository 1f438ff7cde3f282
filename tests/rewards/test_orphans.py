"""No worker outlives the process that started it."""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from megatron_pmd.processes import die_with_parent

ROOT = Path(__file__).parents[2]

GRADING = """
import os, sys, time
from megatron_pmd.config import Reward
from megatron_pmd.data.problems import Problem
from megatron_pmd.rewards.pool import RewardPool

def score(response, problem):
    if response:
        while True: pass
    time.sleep(0.5)  # so that each worker takes one
    return os.getpid()

if __name__ == "__main__":
    problem = Problem(0, (), "")
    with RewardPool(Reward(name="grading:score", workers=2, timeout_seconds=600)) as pool:
        time.sleep(1.5)
        print(*{int(v.reward) for v in pool.grade([("", problem)] * 2)}, flush=True)
        pool.grade([("loop", problem)])  # the other worker stays idle
"""

STARTING = """
import os, subprocess, sys, time
from functools import partial
from megatron_pmd.processes import die_with_parent
child = subprocess.Popen(["sleep", "600"], preexec_fn=partial(die_with_parent, parent=os.getpid()))
print(child.pid, flush=True)
time.sleep(600)
"""


def alive(pid: int) -> bool:
    """Neither gone nor a zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until_gone(pids: list[int], seconds: float = 10) -> list[int]:
    end = time.monotonic() + seconds
    while (left := [pid for pid in pids if alive(pid)]) and time.monotonic() < end:
        time.sleep(0.05)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return left


@pytest.mark.parametrize(("program", "children"), [(GRADING, 2), (STARTING, 1)], ids=["reward pool", "Popen"])
def test_children_vanish_when_their_parent_is_killed(program, children, tmp_path):
    (tmp_path / "grading.py").write_text(program)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    with subprocess.Popen(
        [sys.executable, str(tmp_path / "grading.py")], stdout=subprocess.PIPE, text=True, env=environment
    ) as parent:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        time.sleep(0.3)  # the pool's next sample has begun to loop
        everyone_was_there = len(pids) == children and all(map(alive, pids))
        parent.kill()
    assert wait_until_gone(pids) == []
    assert everyone_was_there


def test_a_child_whose_parent_is_already_gone_ends_at_once():
    child = subprocess.Popen(["sleep", "600"], preexec_fn=partial(die_with_parent, parent=1))
    assert child.wait(10) == -signal.SIGKILL


def test_a_signal_number_that_does_not_exist_is_refused():
    with pytest.raises(OSError, match="PR_SET_PDEATHSIG, 1000"):
        die_with_parent(1000)
