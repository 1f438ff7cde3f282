"""A sandbox for programs that nobody has read: bubblewrap's namespaces around sandboxed.py."""

from __future__ import annotations

import json
import os
import platform
import select
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megatron_pmd.errors import ConfigError, MissingPackage, PmdError
from megatron_pmd.rewards import sandboxed

START_SECONDS = 60.0
"""For bubblewrap and a Python, which take 0.1 s on an idle machine."""
GRACE_SECONDS = 15.0
"""For the sandbox to say that a program's time is over, on a machine that is busy."""
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")
NOBODY = "65534"


@dataclass(frozen=True)
class Outcome:
    """How one program ended."""

    ended: bool
    """It came to its end, in its limits."""
    output: bytes = b""
    """What it wrote, or what its function returned, in JSON."""


class SandboxDied(PmdError):
    """The processes of a sandbox are gone, or do not answer: of no program's doing that is known."""


@contextmanager
def first_sandbox() -> Iterator[None]:
    """Around the first one that a node makes: ConfigError, with what is missing there, if it cannot."""
    try:
        yield
    except SandboxDied as error:
        raise ConfigError(
            f"reward.name=code: no sandbox can be made on {socket.gethostname()}: {error}; "
            "the kernel must allow this user namespaces of his own (docs/code.md, 'What a node needs')"
        ) from None


class Sandbox:
    """Runs one program after the other; several of these run several at a time.

    A program sees Python, its standard library and the system's libraries, read-only. It has no network,
    /proc, environment or writable folder, can start no process, and has the memory and time of its limits.
    The processes end with this one, and with the thread that made it.
    """

    def __init__(self, memory_bytes: int) -> None:
        """memory_bytes: of one program, all that is mapped. SandboxDied where none can be made now."""
        self._memory_bytes = memory_bytes
        try:
            self._process = subprocess.Popen(
                command(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={},
                bufsize=0,
                start_new_session=True,  # an interrupt from the terminal is not for it
            )
        except OSError as error:
            raise SandboxDied(f"no process could be started: {error}") from None
        try:
            self._receive(START_SECONDS)
        except SandboxDied as error:
            self._process.kill()
            assert self._process.stderr is not None, "it is a pipe"
            said = self._process.stderr.read().decode(errors="replace").strip()
            self.close()
            raise SandboxDied(said[-500:] or str(error)) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End it, with whatever runs in it. Harmless when repeated."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()

    def run(self, request: dict[str, Any], seconds: float, output_bytes: int) -> Outcome:
        """Run a program: `request` has its `mode`, `program`, and what sandboxed.py wants for the mode.

        output_bytes: a program that writes more is ended. SandboxDied if no answer comes.
        """
        limits = {"seconds": seconds, "memory_bytes": self._memory_bytes, "output_bytes": output_bytes}
        # orjson refuses what tests may have: integers of 20 digits, halves of surrogate pairs
        message = json.dumps(request | limits).encode()
        assert self._process.stdin is not None, "it is a pipe"
        try:
            sandboxed.write_all(self._process.stdin.fileno(), sandboxed.LENGTH.pack(len(message)) + message)
        except OSError as error:
            raise SandboxDied(f"the sandbox is gone: {error}") from None
        answer = self._receive(seconds + GRACE_SECONDS)
        return Outcome(answer[:1] == sandboxed.ENDED, answer[1:])

    def _receive(self, seconds: float) -> bytes:
        deadline = time.monotonic() + seconds
        (length,) = sandboxed.LENGTH.unpack(self._read(sandboxed.LENGTH.size, deadline))
        return self._read(length, deadline)

    def _read(self, count: int, deadline: float) -> bytes:
        assert self._process.stdout is not None, "it is a pipe"
        descriptor = self._process.stdout.fileno()
        watch = select.poll()  # select takes no descriptor over 1,023, and a driver has thousands
        watch.register(descriptor, select.POLLIN)
        parts = bytearray()
        while len(parts) < count:
            left = deadline - time.monotonic()
            if left <= 0 or not watch.poll(left * 1000):
                raise SandboxDied("the sandbox does not answer")
            part = os.read(descriptor, count - len(parts))
            if not part:
                raise SandboxDied("the sandbox ended")
            parts += part
        return bytes(parts)


def command() -> list[str]:
    """The command line of a sandbox. MissingPackage or ConfigError where this node has what it needs not."""
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise MissingPackage(
            f"reward.name=code runs programs in a sandbox of bubblewrap, whose program bwrap is not on "
            f"{socket.gethostname()}: install the package bubblewrap (apt-get install bubblewrap)"
        )
    if platform.machine() != "x86_64":
        raise ConfigError(
            f"reward.name=code knows the system calls of x86_64 alone, and {socket.gethostname()} is "
            f"{platform.machine()}: grade on another machine (reward.name=remote)"
        )
    namespaces = ["--unshare-all", "--unshare-user", "--uid", NOBODY, "--gid", NOBODY, "--cap-drop", "ALL"]
    life = ["--die-with-parent", "--as-pid-1", "--clearenv", "--hostname", "sandbox"]
    inside = "/sandboxed.py"
    mounts = [*_mounts(), "--ro-bind", sandboxed.__file__, inside, "--dev-bind", "/dev/null", "/dev/null"]
    python = [str(Path(sys.executable).resolve()), "-I", "-S", "-X", "utf8", inside]
    return [bwrap, *namespaces, *life, *mounts, "--remount-ro", "/", "--chdir", "/", "--", *python]


def _mounts() -> Iterator[str]:
    for folder in LIBRARIES:
        if os.path.islink(folder):
            yield from ("--symlink", os.readlink(folder), folder)
        elif os.path.isdir(folder):
            yield from ("--ro-bind", folder, folder)
    # where Python is the system's, its folder is /usr, with every program of the system
    own = sys.base_prefix if sys.base_prefix != "/usr" else str(Path(sys.executable).resolve())
    yield from ("--ro-bind", own, own)
    yield from ("--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache")
