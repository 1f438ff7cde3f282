"""Where the ranks of a node share bulk data, and how a run's files there are named and found again."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from megatron_pmd.errors import LaunchError

SHARED_MEMORY = Path("/dev/shm")
PREFIX = "megatron-pmd-"


def shared_memory_key(folder: Path) -> str:
    """Names a run's buckets: always the same for one run folder, so that a killed run's can be found."""
    return hashlib.blake2b(str(folder.resolve()).encode(), digest_size=8).hexdigest()


def nameless_file(nbytes: int, folders: Sequence[Path]) -> tuple[IO[bytes], Path]:
    """A file of so many bytes in the first of the folders that has room for them, and which one that is.

    No folder lists it: its memory goes back when the last process that has it open or mapped ends, however
    that ends. Other processes of this user open it by path_to() while this one has it open.

    Raises LaunchError if no folder has room.
    """
    refusals = []
    for folder in folders:
        with contextlib.ExitStack() as cleanup:
            try:
                file = cleanup.enter_context(tempfile.TemporaryFile(dir=folder))
                # Reserves the pages: after a mere truncate, a full folder would be a SIGBUS at a later write.
                os.posix_fallocate(file.fileno(), 0, nbytes)
            except OSError as error:
                refusals.append(f"{folder} ({error.strerror})")
                continue
            cleanup.pop_all()
            return file, folder
    raise LaunchError(
        f"no room for {nbytes:,} bytes that the ranks of this node share, in {' or in '.join(refusals)}; "
        f"enlarge {folders[0]}, or let TMPDIR name a folder with room"
    )


def own_memory(name: str, count: int) -> tuple[str, ...]:
    """So many empty files of this process, in memory and gone with it: where others of this user open them.

    name: shown in /proc/PID/fd.
    """
    return tuple(str(path_to(memory_file(name))) for _ in range(count))


def memory_file(name: str) -> int:
    """The descriptor of a new file in memory, of this user alone; path_to() says where others open it."""
    descriptor = os.memfd_create(name)
    os.fchmod(descriptor, 0o600)
    return descriptor


def path_to(descriptor: int) -> Path:
    """Where other processes of this user on this node open a file that this process has open."""
    return Path(f"/proc/{os.getpid()}/fd/{descriptor}")
