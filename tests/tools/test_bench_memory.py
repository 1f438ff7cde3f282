"""What tools/bench/memory.py takes for the memory of a run's ranks, of processes that only hold some."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tools.bench.memory import Looker, table

MEGABYTES = 1 << 20
LAUNCHER = """\
import mmap, os, sys, time
from setproctitle import setproctitle
from megatron_pmd.heartbeat import Heartbeat
from megatron_pmd.node.worker import PROCESS_TITLE
from megatron_pmd.shared_memory import own_memory
from pathlib import Path

held = bytearray(os.urandom(1)) * (90 << 20)
beats = own_memory("heartbeat", 2)

def child(title, megabytes):
    ready, told = os.pipe()
    if os.fork() == 0:
        setproctitle(title)
        own = bytearray(b"1") * (megabytes << 20)
        if title.endswith("0"):
            beat = Heartbeat(Path(beats[0]))
            beat.enter("update", 3, patience_seconds=1.0)
            os.write(told, b"1")
            sys.stdin.readline()
            beat.enter("save", 4, patience_seconds=1.0)
            del own
            print("saving", flush=True)
        else:
            os.write(told, b"1")
        time.sleep(60)
        os._exit(0)
    os.read(ready, 1)

child(f"{PROCESS_TITLE} 0", 60)
child(f"{PROCESS_TITLE} 1", 30)
child("an engine", 200)
print("there", flush=True)
time.sleep(60)
"""


@pytest.fixture
def launcher():
    """Two ranks of 60 and 30 MiB beside the 90 that they share with their launcher, and another child."""
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "there\n"
        yield process
    finally:
        import psutil

        for one in [*psutil.Process(process.pid).children(), process]:
            one.kill()
        process.wait()


def test_a_peak_is_what_all_ranks_hold_in_the_phase_that_their_heartbeat_names(launcher):
    """Of what four processes share each counts a quarter; the rest is the interpreter's."""
    looker = Looker(launcher.pid)
    looker.look()
    launcher.stdin.write("\n")
    launcher.stdin.flush()
    assert launcher.stdout.readline() == "saving\n"
    looker.look()
    assert {phase: {*own} for phase, own in looker.peaks.items()} == {"update": {3}, "save": {4}}
    update, save = looker.peaks["update"][3], looker.peaks["save"][4]
    expected = (60 + 30 + 2 * 90 / 4) * MEGABYTES
    assert expected < update < expected + 60 * MEGABYTES
    assert update - save == pytest.approx(60 * MEGABYTES, rel=0.05)


def test_a_phase_that_one_side_did_not_show_is_not_compared():
    def side(recipe: str, phases: dict[str, dict[int, float]]):
        return dict(recipe=recipe, gigabytes=phases, rewards=[0.1, 0.8], processor_seconds=8.0, seconds=5.0)

    whole = side("whole", {"update": {0: 3.0, 1: 4.0}, "export": {2: 1.0}})
    adapters = side("adapters", {"update": {0: 1.0, 1: 0.5}}) | {"rewards": [0.1, 0.4]}
    ratios = {row["what"]: row["ratio"] for row in table([whole, adapters]) if "ratio" in row}
    assert ratios == {
        "all ranks, the most of the run, adapters": 0.25,
        "in update, adapters": 0.25,
        "held-out reward at the end, adapters": 0.5,
        "processors, adapters": 1.0,
        "clock, adapters": 1.0,
    }
