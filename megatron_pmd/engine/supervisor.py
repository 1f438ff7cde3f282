"""Runs one server so that it cannot outlive this program: `python supervisor.py PARENT_PID COMMAND...`.

SGLang's own children die with their parent only once each has asked the kernel for it, after several seconds
of imports: a trainer killed in those seconds left a scheduler and a detokenizer running for ever. The
supervisor is a small process between the trainer and the server. It starts the server in a process group of
its own. When the trainer dies, or asks it to stop (SIGTERM), it kills the whole group and removes what SGLang
keeps in shared memory (SGLang itself never does). It exits with the server's exit status.

Standard library only, and started by path: it must be running before anything slow is imported.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

PR_SET_PDEATHSIG = 1
PARENT_DIED = signal.SIGUSR2
SGLANG_FILES = ("sglang_", "sgl_shm_", "sem.mp-")


def main(parent: int, command: list[str]) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    server: subprocess.Popen[bytes] | None = None
    stopped = False

    def kill_group(signum: int, frame: FrameType | None) -> None:
        nonlocal stopped
        # The kernel's signal follows the *thread* that started us: if only that one ended, the parent is
        # unchanged.
        if signum == PARENT_DIED and os.getppid() == parent:
            return
        stopped = True
        if server is not None:
            _kill(server.pid)

    signal.signal(PARENT_DIED, kill_group)
    signal.signal(signal.SIGTERM, kill_group)
    # Slurm may send the signal to save to every process of a job. The server inherits that it is ignored.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    # Ctrl-C in the terminal is the trainer's to answer: it stops the supervisor when it is done.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    libc.prctl(PR_SET_PDEATHSIG, int(PARENT_DIED))
    if os.getppid() != parent:  # it died before the line above
        return 1

    def prepare() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        # Should the supervisor itself be killed, the server's main process goes with it.
        libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))

    server = subprocess.Popen(command, process_group=0, preexec_fn=prepare)
    if stopped:  # the signal came while the server was being started
        _kill(server.pid)
    status = server.wait()
    _kill(server.pid)  # children that survived a crashed server
    return status if status >= 0 else 128 - status


def _kill(group: int) -> None:
    leftovers = _shared_memory(group)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    for path in leftovers:
        path.unlink(missing_ok=True)


def _shared_memory(group: int) -> set[Path]:
    """Files under /dev/shm that SGLang or multiprocessing made in this group: a kill leaves them behind."""
    found: set[Path] = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(process.name)) == group:
                mapped = re.findall(r" (/dev/shm/\S+)$", (process / "maps").read_text(), re.MULTILINE)
                found.update(Path(path) for path in mapped if Path(path).name.startswith(SGLANG_FILES))
        except OSError:  # it ended while we looked
            continue
    return found


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
