"""Runs a piece of Python in a process of its own, with limits on time, memory, output and files.

It keeps a model's mistakes from hurting the run: an endless loop, a huge list, a deleted file. It is no wall
against an attacker, who gets around what is forbidden inside the interpreter: where the model's code may be
hostile, run the job in a container without network and secrets.
"""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

GRACE_SECONDS = 5.0
"""For starting the process, on a busy machine; beyond the code's own time."""


@dataclass(frozen=True)
class Limits:
    seconds: float = 5.0
    memory_bytes: int = 1 << 28
    """Address space of the process; the interpreter itself takes some 30 MB."""
    output_bytes: int = 4096


async def run_python(code: str, limits: Limits = Limits()) -> str:
    """What the code prints, and the value of its last line; an exception, or the limit it hit, in one line.

    Runs in asyncio's threads: as many at one time as those are (the cores and four, at most 32).
    """
    return await asyncio.to_thread(_run, code, limits)


def _run(code: str, limits: Limits) -> str:
    numbers = [str(n) for n in (limits.seconds, limits.memory_bytes, limits.output_bytes)]
    command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("limited.py")), *numbers]
    # a file, not a pipe: the kernel's limit on a file's size is then the limit on the output
    with tempfile.TemporaryFile() as output:
        try:
            done = subprocess.run(
                command, input=code.encode(), stdout=output, stderr=subprocess.DEVNULL, env={}, cwd="/",
                timeout=limits.seconds + GRACE_SECONDS,
            )  # fmt: skip
            status = done.returncode
        except subprocess.TimeoutExpired:
            status = -signal.SIGALRM
        output.seek(0)
        text = output.read().decode(errors="replace")
    if status in (-signal.SIGALRM, -signal.SIGXCPU, -signal.SIGKILL):
        return f"{text}TimeoutError: no result within {limits.seconds:g} s"
    if len(text.encode()) >= limits.output_bytes:
        return f"{text}[output cut at {limits.output_bytes} bytes]"
    if status != 0:
        return f"{text}the interpreter ended with status {status}"
    return text
