"""Runs one server so that it cannot outlive this program: `python supervisor.py PARENT_PID COMMAND...`.

SGLang's own children die with their parent only once each has asked the kernel for it, after several seconds
of imports: a trainer killed in those seconds left a scheduler and a detokenizer running for ever. The
supervisor is a small process between the trainer and the server. It starts the server in a process group of
its own, with a folder of its own for temporary files. When the trainer dies, or asks it to stop (SIGTERM), it
kills the whole group and removes that folder and what SGLang keeps in shared memory (SGLang itself removes
neither). It exits with the server's exit status.

Standard library only, and started by path: it must be running before anything slow is imported.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

PR_SET_PDEATHSIG = 1
PARENT_DIED = signal.SIGUSR2
PREFIX = "megatron-pmd-engine-"
LONGEST_BASE = 50
NEW_SECONDS = 60.0
FIRST_LOOK_SECONDS = 2.0
"""At what the server has made in shared memory; each further look comes after twice the time."""
SGLANG_FILES = ("sglang_", "sgl_shm_", "sem.mp-")


def main(parent: int, command: list[str]) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    server: subprocess.Popen[bytes] | None = None
    shared: set[Path] = set()
    stopped = False

    def kill_group(signum: int, frame: FrameType | None) -> None:
        nonlocal stopped
        # The kernel's signal follows the *thread* that started us: if only that one ended, the parent is
        # unchanged.
        if signum == PARENT_DIED and os.getppid() == parent:
            return
        stopped = True
        if server is not None:
            _kill(server.pid, shared)

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

    with _temporary_folder() as folder:
        # this user's alone: SGLang's processes talk over sockets there, and unpickle what they receive
        environment = os.environ | {"TMPDIR": folder}
        # torch's default is the folder for temporary files: it is to outlive the server
        inductor = f"{os.path.dirname(folder)}/torchinductor-{os.getuid()}"
        environment.setdefault("TORCHINDUCTOR_CACHE_DIR", inductor)
        server = subprocess.Popen(command, process_group=0, preexec_fn=prepare, env=environment)
        if stopped:  # the signal came while the server was being started
            _kill(server.pid, shared)
        pause, status = FIRST_LOOK_SECONDS, None
        while status is None:
            try:
                status = server.wait(pause)
            except subprocess.TimeoutExpired:  # what a process has made that is killed cannot be seen later
                shared |= _shared_memory(server.pid)
                pause = min(2 * pause, NEW_SECONDS)
        _kill(server.pid, shared)  # children that survived a crashed server
    return status if status >= 0 else 128 - status


@contextlib.contextmanager
def _temporary_folder() -> Iterator[str]:
    """A folder that is gone at the end; also those that supervisors left which were killed themselves.

    A living supervisor holds a lock on its folder.
    """
    base = tempfile.gettempdir()
    if len(base) > LONGEST_BASE:  # a socket's path has at most 107 characters
        base = "/tmp"
    for left in Path(base).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # in use, or another user's, or gone
            if time.time() - left.stat().st_mtime > NEW_SECONDS:  # else it may not be locked yet
                with _locked(left):
                    shutil.rmtree(left)
    folder = tempfile.mkdtemp(prefix=PREFIX, dir=base)
    with _locked(Path(folder)):
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _kill(group: int, seen: set[Path]) -> None:
    leftovers = seen | _shared_memory(group)
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
