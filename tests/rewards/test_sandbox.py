"""Programs that mean harm, in a real sandbox: each is contained, and nothing of it is left."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from megatron_pmd.errors import ConfigError, MissingPackage
from megatron_pmd.rewards import sandbox as sandbox_module
from megatron_pmd.rewards.sandbox import Outcome, Sandbox, SandboxDied, first_sandbox
from megatron_pmd.rewards.sandboxed import BOUNDED_CALLS, PLAIN_CALLS

pytestmark = pytest.mark.skipif(
    shutil.which("bwrap") is None and not os.environ.get("CI"),
    reason="needs bubblewrap (.ci/run installs it)",
)
HEADER = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(memory_bytes=200_000_000) as made:
        yield made


def run(sandbox: Sandbox, program: str, put_in: str = "", seconds: float = 30.0) -> Outcome:
    request = {"mode": "stdin", "program": program, "input": put_in}
    return sandbox.run(request, seconds, output_bytes=100_000)


def processes(sandbox: Sandbox) -> list[psutil.Process]:
    """bubblewrap's own, and what runs inside."""
    own = psutil.Process(sandbox._process.pid)
    return [own, *own.children(recursive=True)]


HOSTILE = {
    "fork bomb": "import os\nwhile True: os.fork()",
    "another program": "import os; os.execv('/bin/true', ['true'])",
    "a child by subprocess": f"import subprocess; subprocess.run([{sys.executable!r}, '-V'], check=True)",
    "10 GB": "x = bytearray(10**10)",
    "10 GB in small pieces": "x = []\nwhile True: x.append(bytearray(10**6))",
    "10 GB of shared memory": "import mmap; mmap.mmap(-1, 10**10)",
    "memory in a file": "import os; os.memfd_create('x')",
    "threads without end": "import threading, time\nthreading.stack_size(1 << 20)\n"
    "while True: threading.Thread(target=time.sleep, args=(60,)).start()",
    "infinite loop": "while True: pass",
    "infinite loop that closes its output": "import os; os.close(1)\nwhile True: pass",
    "a sleep that ignores every signal": "import signal, time\n"
    "for s in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}: signal.signal(s, signal.SIG_IGN)\n"
    "time.sleep(60)",
    "infinite output": "while True: print('x' * 1000)",
    "a crash of Python": "import ctypes; ctypes.string_at(0)",
    "a source that the compiler cannot take": "(" * 100_000,
    "the list of processes": "import os; os.listdir('/proc')",
    "memory of its parent": "open('/proc/1/mem', 'rb')",
    "users of the host": "open('/etc/passwd').read()",
    "a file of the host": f"open({__file__!r}).read()",
    "a symlink to the host": "import os; os.symlink('/etc', '/link')",
    "a new file": "open('/tmp_file', 'w')",
    "a change of the library": "import os; open(os.__file__, 'a')",
    "an address of the network": "import socket; socket.create_connection(('127.0.0.1', 80), 1)",
    "a socket of the host": "import socket; socket.socket(socket.AF_UNIX)",
    "killing its parent": "import os; os.kill(os.getppid(), 9)",
    "interrupting its parent": "import os, signal; os.kill(1, signal.SIGINT)",
    "killing everything": "import os; os.kill(-1, 9)",
    "a limit on its parent": "import resource; resource.prlimit(1, resource.RLIMIT_CPU, (0, 0))",
    "namespaces of its own": "import os; os.unshare(os.CLONE_NEWUSER)",
    "a trace of its parent": "import ctypes; assert ctypes.CDLL(None).ptrace(16, 1, 0, 0) == 0",
    "its own end, as success": "import os; os._exit(1)",
}  # fmt: skip


@pytest.mark.parametrize("program", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_program_does_not_come_to_its_end_and_leaves_nothing(sandbox: Sandbox, program: str):
    began = time.monotonic()
    assert not run(sandbox, program, seconds=0.7).ended
    assert time.monotonic() - began < 10
    assert [p.name() for p in processes(sandbox)] == ["bwrap", Path(sys.executable).resolve().name]
    assert run(sandbox, "print(int(input()) + 1)", "41\n") == Outcome(True, b"42\n")


def test_a_program_sees_python_and_libraries_and_nothing_else(sandbox: Sandbox):
    look = "import os; print(*os.listdir('/'), *os.listdir('/dev'), *os.environ.values(), os.getuid())"
    seen = run(sandbox, look).output.decode().split()
    roots = {Path(sys.base_prefix).parts[1], "lib", "lib64", "usr", "etc", "dev", "sandboxed.py"}
    assert set(seen) <= roots | {"null", "/", "C.UTF-8", "65534"}
    assert run(sandbox, "import os; print(os.listdir('/etc'))").output in (b"['ld.so.cache']\n", b"[]\n")


def test_what_programs_do_that_mean_no_harm_is_possible(sandbox: Sandbox):
    in_a_thread = (
        "import sys, threading, atexit\nsys.setrecursionlimit(10**6)\n"
        "def depth(n): return n and 1 + depth(n - 1)\n"
        "def main(): sys.stdout.write(f'{depth(9999)} {sum(map(int, sys.stdin.buffer.read().split()))}\\n')\n"
        "atexit.register(lambda: print('bye'))\n"
        "if __name__ == '__main__': threading.Thread(target=main).start()\n"
    )
    assert run(sandbox, in_a_thread, "1 2\n3 é"[:5]) == Outcome(True, b"9999 6\nbye\n")
    assert run(sandbox, "import sys; print(input()[::-1]); sys.exit()", "né").output == "én\n".encode()
    assert not run(sandbox, "import sys; sys.exit(3)").ended
    assert not run(sandbox, "print('lone surrogate \\udc80')").ended


def test_what_one_program_changes_the_next_does_not_see(sandbox: Sandbox):
    run(sandbox, "import builtins, random; builtins.print = None; random.seed(1)")
    numbers = {run(sandbox, "import random; print(random.random())").output for _ in range(2)}
    assert len(numbers) == 2


def test_the_sandbox_ends_with_its_owner_and_a_dead_one_says_so():
    with Sandbox(memory_bytes=200_000_000) as mine:
        running = processes(mine)
        os.kill(running[1].pid, signal.SIGKILL)
        with pytest.raises(SandboxDied):
            run(mine, "print(1)")
    psutil.wait_procs(running, timeout=5)
    assert not any(p.is_running() for p in running)


@pytest.mark.skipif(not HEADER.exists(), reason="needs linux-libc-dev")
def test_the_numbers_of_the_calls_are_those_of_the_kernels_header():
    defined = dict(re.findall(r"#define __NR_(\w+) (\d+)", HEADER.read_text()))
    named = PLAIN_CALLS | BOUNDED_CALLS
    assert {name: int(defined[name]) for name in named} == named


def test_a_node_without_bubblewrap_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(MissingPackage, match=r"bwrap is not on .*: install the package bubblewrap \(apt-get"):
        Sandbox(memory_bytes=1)


def test_a_node_that_allows_no_namespaces_is_named_with_what_bubblewrap_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    refusing = tmp_path / "bwrap"
    refusing.write_text("#!/bin/sh\necho 'bwrap: No permissions to create a new namespace' >&2; exit 1\n")
    refusing.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    refused = pytest.raises(
        ConfigError, match=r"no sandbox can be made on .*No permissions to create.*docs/code\.md"
    )
    with refused, first_sandbox():
        Sandbox(memory_bytes=1)
    with pytest.raises(SandboxDied, match="No permissions to create"):
        Sandbox(memory_bytes=1)


def test_another_processor_is_refused_by_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sandbox_module.platform, "machine", lambda: "aarch64")
    with pytest.raises(ConfigError, match=r"x86_64 alone, and .* is aarch64: grade on another machine"):
        Sandbox(memory_bytes=1)
