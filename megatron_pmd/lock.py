"""A lock on a folder that lasts as long as the process that took it: what is started twice harms nothing."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from megatron_pmd.errors import LaunchError
from megatron_pmd.waiting import waiting_for

POLL_SECONDS = 0.2
HELD = (errno.EACCES, errno.EAGAIN)


@contextmanager
def locked(path: Path, what: str, *, way_out: str, patience_seconds: float = 0.0) -> Iterator[None]:
    """Hold the lock of this file within the block; the kernel gives it back however the process ends.

    what: the subject of the message, e.g. `runs/x is being trained`; way_out: what its reader can do.
    patience_seconds: for a holder that is about to end. Raises LaunchError with the holder's host, process,
    and the time since when it holds it. A file system without locks is told of, and trusted.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Of a record, not of the file (flock): a process forked from this one must not hold it on. It is also the
    # one that all nodes see over NFS. Closing any descriptor of the file gives it back: none else opens it.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not _taken(descriptor, path):

            def words() -> str:
                return f"the end of {_holder(descriptor)}: {what} by it ({path})"

            with waiting_for(words, patience_seconds):
                if not _is_given_back(descriptor, path, patience_seconds):
                    raise LaunchError(f"{what} already, by {_holder(descriptor)} ({path}); {way_out}")
        record = {"host": socket.gethostname(), "pid": os.getpid(), "since": _now()}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(record).encode() + b"\n", 0)
        yield
    finally:
        os.close(descriptor)


def _is_given_back(descriptor: int, path: Path, patience_seconds: float) -> bool:
    """Whether its holder ends in time, and the lock is ours."""
    begun = time.monotonic()
    while time.monotonic() - begun < patience_seconds:
        if _taken(descriptor, path):
            return True
        time.sleep(POLL_SECONDS)
    return False


def _taken(descriptor: int, path: Path) -> bool:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD:
            return False
        print(
            f"{path} cannot be locked ({error.strerror}): nothing keeps a second start from this folder",
            file=sys.stderr,
        )
    return True


def _holder(descriptor: int) -> str:
    try:
        record = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {record['pid']} on {record['host']} since {record['since']}"
    except (ValueError, KeyError, TypeError):  # it has just taken the lock
        return "another process"


def _now() -> str:
    return datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
