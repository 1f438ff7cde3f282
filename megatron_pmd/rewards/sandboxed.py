"""Runs programs, each in a fork of itself, inside the sandbox that sandbox.py makes.

It is started once, as the first process of its namespaces, with what programs import already imported: a
fork costs a millisecond, a new Python fifteen. A program is one process that can neither start another nor
open a socket or write a file, so ending that process ends all of it.

Imports the standard library alone: the sandbox has nothing else.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import io
import json
import os
import resource
import select
import signal
import struct
import sys
import threading
import time
import types
from typing import Any, NoReturn

LENGTH = struct.Struct(">I")
"""Before every message, in bytes."""
ENDED, FAILED, LATE, FLOODED = b"E", b"F", b"L", b"O"
"""First byte of an answer: the program came to its end; it raised, or was killed; took too long; wrote too
much. What it wrote follows."""
STDIN, CALL, ASSERTS = "stdin", "call", "asserts"
"""What is done with a program: its standard output is the answer; a function of it is called, and what that
returns is the answer, in JSON; test code runs behind it, and the answer is the token that it was given."""
RESULT = 3
"""File descriptor for the answer of CALL and ASSERTS."""
THREADS = 64

PRELUDE = """
import array, bisect, cmath, collections, copy, datetime, decimal, enum, fractions, functools, heapq, io
import itertools, json, math, operator, os, random, re, statistics, string, sys, time, typing
from bisect import *
from collections import *
from dataclasses import dataclass, field
from functools import *
from heapq import *
from itertools import *
from math import ceil, floor, gcd, inf, sqrt
from typing import *
"""
"""What published problems with a function to write take for granted, LiveCodeBench's among them."""

# --- seccomp: numbers of linux/seccomp.h, linux/filter.h, linux/audit.h and asm/unistd_64.h

X86_64 = 0xC000003E
ALLOW, REFUSE, ABSENT = 0x7FFF0000, 0x00050001, 0x00050026
"""Let pass; EPERM; ENOSYS, for what the C library has another way to do."""
_LOAD, _EQUAL, _ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_NUMBER_AT, _ARCHITECTURE_AT, _ARGUMENTS_AT = 0, 4, 16
_CLONE_THREAD = 0x10000
_TERMINAL, _INHERITED, _NOT_INHERITED = 0x5401, 0x5451, 0x5450
BOUNDED_CALLS = {"clone": 56, "clone3": 435, "kill": 62, "tgkill": 234, "prlimit64": 302, "ioctl": 16}
"""Calls that it may make with some arguments."""
PLAIN_CALLS = {
    "read": 0, "write": 1, "open": 2, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7, "lseek": 8,
    "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12, "mremap": 25, "madvise": 28,
    "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "sigaltstack": 131, "pread64": 17,
    "pwrite64": 18, "readv": 19, "writev": 20, "access": 21,
    "pipe": 22, "pipe2": 293, "select": 23, "pselect6": 270, "ppoll": 271, "dup": 32, "dup2": 33,
    "dup3": 292, "fcntl": 72, "getcwd": 79, "readlink": 89, "readlinkat": 267, "openat": 257,
    "newfstatat": 262, "faccessat": 269, "faccessat2": 439, "statx": 332, "getdents64": 217,
    "sched_yield": 24, "sched_getaffinity": 204, "futex": 202, "set_robust_list": 273, "rseq": 334,
    "membarrier": 324, "exit": 60, "exit_group": 231, "restart_syscall": 219, "pause": 34, "nanosleep": 35,
    "clock_nanosleep": 230, "clock_gettime": 228, "clock_getres": 229, "gettimeofday": 96, "time": 201,
    "times": 100,
    "getpid": 39, "getppid": 110, "gettid": 186, "getuid": 102, "geteuid": 107, "getgid": 104,
    "getegid": 108, "getrlimit": 97, "getrusage": 98, "sysinfo": 99, "uname": 63, "getrandom": 318,
}  # fmt: skip
"""Calls of Linux on x86-64 that a program may make; every other one is refused."""


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("HBBI", code, if_true, if_false, value)


def _where(call: str, argument: int, test: int, *values: int) -> bytes:
    """Allow a call only where the argument passes the test with one of the values."""
    tests = b"".join(_instruction(test, value, if_false=1) + _instruction(_RETURN, ALLOW) for value in values)
    body = _instruction(_LOAD, _ARGUMENTS_AT + 8 * argument) + tests + _instruction(_RETURN, REFUSE)
    return _instruction(_EQUAL, BOUNDED_CALLS[call], if_false=len(body) // 8) + body


def syscall_filter(own_pid: int) -> bytes:
    """The filter of a program in the kernel's format: no process, socket or exec, signals to itself alone."""
    allowed = (
        _instruction(_EQUAL, call, if_false=1) + _instruction(_RETURN, ALLOW) for call in PLAIN_CALLS.values()
    )
    return b"".join(
        [
            _instruction(_LOAD, _ARCHITECTURE_AT),
            _instruction(_EQUAL, X86_64, if_true=1),
            _instruction(_RETURN, REFUSE),
            _instruction(_LOAD, _NUMBER_AT),
            *allowed,
            _where("clone", 0, _ANY_BIT, _CLONE_THREAD),
            _where("kill", 0, _EQUAL, own_pid),
            _where("tgkill", 0, _EQUAL, own_pid),
            # of another process it would set limits: PID 1's, for one
            _where("prlimit64", 0, _EQUAL, 0),
            _where("ioctl", 1, _EQUAL, _TERMINAL, _INHERITED, _NOT_INHERITED),
            _instruction(_EQUAL, BOUNDED_CALLS["clone3"], if_false=1),
            _instruction(_RETURN, ABSENT),
            _instruction(_RETURN, REFUSE),
        ]
    )


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]


_libc = ctypes.CDLL(None, use_errno=True)
_PR_SET_DUMPABLE, _PR_SET_SECCOMP, _FILTER_MODE = 4, 22, 2


def _refuse_all_but_computing() -> None:
    instructions = syscall_filter(os.getpid())
    program = _Program(len(instructions) // 8, instructions)
    if _libc.prctl(_PR_SET_SECCOMP, _FILTER_MODE, ctypes.byref(program), 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "the kernel refuses the filter of system calls")


# --- the program's process


def _limit(seconds: float, memory_bytes: int) -> None:
    for kind, limit in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CPU, int(seconds) + 1),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 64),
        # the kernel does not count root's: of his threads, memory is the limit
        (resource.RLIMIT_NPROC, THREADS),
    ):
        resource.setrlimit(kind, (limit, limit))


def _become(request: dict[str, Any], given: int, answer: int, nothing: int) -> NoReturn:
    """Be the program; ends with exit code 0 if it came to its end."""
    code = 1
    try:
        writes = request["mode"] == STDIN
        os.dup2(given, 0)
        os.dup2(answer if writes else nothing, 1)
        os.dup2(nothing, 2)
        if not writes:
            os.dup2(answer, RESULT)
        # the requests that follow, with other problems' tests, come over one of them
        os.closerange(RESULT if writes else RESULT + 1, 256)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        for descriptor, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
            stream = io.TextIOWrapper(os.fdopen(descriptor, mode + "b", closefd=False), encoding="utf-8")
            setattr(sys, name, stream)
            setattr(sys, f"__{name}__", stream)
        _limit(request["seconds"], request["memory_bytes"])
        _refuse_all_but_computing()
        _run(request)
        code = 0
    except SystemExit as leaving:
        code = 0 if leaving.code in (None, 0) else 1
    except BaseException:
        code = 1
    finally:
        with contextlib.suppress(BaseException):
            _finish()
        os._exit(code)


def _run(request: dict[str, Any]) -> None:
    mode = request["mode"]
    module = types.ModuleType("__main__" if mode == STDIN else "solution")
    sys.modules[module.__name__] = module
    names = module.__dict__
    if mode != STDIN:
        names.update(_prelude)
    # taken before the program can put others in their place
    run, write, dumps = exec, os.write, json.dumps
    tests = compile(request["tests"], "<tests>", "exec") if mode == ASSERTS else None
    run(compile(request["program"], "<response>", "exec"), names)
    if mode == CALL:
        found = names.get(request["function"])
        if found is None:
            found = getattr(names["Solution"](), request["function"])
        write(RESULT, dumps(found(*request["arguments"])).encode())
    elif tests is not None:
        run(tests, names)
        write(RESULT, request["token"].encode())


def _finish() -> None:
    """What Python does when a program ends: threads, atexit (many write their output there), buffers."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()


# --- the process that forks them


def _answer(request: dict[str, Any]) -> bytes:
    """Run one program and see it gone."""
    given = os.memfd_create("stdin")
    nothing = os.open("/dev/null", os.O_RDWR)
    reading, writing = os.pipe()
    try:
        # seekable, and nobody has to write while the program reads
        write_all(given, request.get("input", "").encode(errors="surrogatepass"))
        os.lseek(given, 0, os.SEEK_SET)
        deadline = time.monotonic() + request["seconds"]
        pid = os.fork()
        if pid == 0:
            _become(request, given, writing, nothing)
        os.close(writing)
        writing = -1
        verdict, output = _listen(reading, deadline, request["output_bytes"])
        status = None if verdict else _wait(pid, deadline)
        if status is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    finally:
        for descriptor in (given, nothing, reading, writing):
            if descriptor >= 0:
                os.close(descriptor)
    if verdict is None:
        verdict = LATE if status is None else ENDED if status == 0 else FAILED
    return verdict + output


def _listen(reading: int, deadline: float, most: int) -> tuple[bytes | None, bytes]:
    """What the program writes until it closes its output; a verdict where it goes too far."""
    output = bytearray()
    watch = select.poll()
    watch.register(reading, select.POLLIN)
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not watch.poll(left * 1000):
            return LATE, b""
        part = os.read(reading, 1 << 16)
        if not part:
            return None, bytes(output)
        output += part
        if len(output) > most:
            return FLOODED, b""


def _wait(pid: int, deadline: float) -> int | None:
    """The status with which it ended; None at the deadline. A program can close its output and go on."""
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status
        left = deadline - time.monotonic()
        if left <= 0:
            return None
        signal.sigtimedwait({signal.SIGCHLD}, left)


def _read(descriptor: int, count: int) -> bytes:
    parts = bytearray()
    while len(parts) < count:
        part = os.read(descriptor, count - len(parts))
        if not part:
            os._exit(0)  # who asked is gone
        parts += part
    return bytes(parts)


def write_all(descriptor: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


_prelude: dict[str, Any] = {}


def main() -> None:
    """Answer requests on standard input, one after the other, until it is closed."""
    # the first process of a namespace gets only signals that it has handlers for: Python has one for SIGINT
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    # a program has this process's user: it may not trace it or read its memory
    _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    exec(PRELUDE, _prelude)
    del _prelude["__builtins__"]
    gc.collect()
    gc.freeze()  # a fork's collector would else touch, and so copy, every page
    write_all(1, LENGTH.pack(0))
    while True:
        request = json.loads(_read(0, *LENGTH.unpack(_read(0, LENGTH.size))))
        answer = _answer(request)
        write_all(1, LENGTH.pack(len(answer)) + answer)


if __name__ == "__main__":
    main()
