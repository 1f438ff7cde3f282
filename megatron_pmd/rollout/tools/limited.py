"""Runs the Python on its standard input within limits; started by python.py, imports nothing of this project.

    python -I -S limited.py SECONDS MEMORY_BYTES OUTPUT_BYTES

Prints what the code prints, and the value of its last line if that is an expression, as an interactive
interpreter does; an exception as one line.
"""

import ast
import bisect
import cmath
import collections
import datetime
import decimal
import fractions
import functools
import heapq
import itertools
import math
import operator
import random
import re
import resource
import signal
import statistics
import string
import sys
from typing import Any

# They cannot be imported from their files once files are out of reach.
MODULES = (
    *(bisect, cmath, collections, datetime, decimal, fractions, functools, heapq, itertools, math, operator),
    *(random, re, statistics, string),
)
OUT_OF_REACH = (
    "open",
    "os.",
    "shutil.",
    "subprocess.",
    "socket.",
    "ctypes.",
    "mmap.",
    "signal.",
    "sys.addaudit",
)


def limit(seconds: float, memory_bytes: int, output_bytes: int) -> None:
    """Have the kernel end this process, or refuse it what it asks for."""
    # wall-clock time, so that it ends also when whoever started it is gone
    signal.setitimer(signal.ITIMER_REAL, seconds)
    for name, value in (
        ("RLIMIT_CPU", math.ceil(seconds)),
        ("RLIMIT_AS", memory_bytes),
        ("RLIMIT_FSIZE", output_bytes),
        ("RLIMIT_NOFILE", 3),
        ("RLIMIT_CORE", 0),
    ):
        resource.setrlimit(getattr(resource, name), (value, value))


def refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if event.startswith(OUT_OF_REACH):
        raise PermissionError(f"not allowed here: {event}")


def run(code: str) -> None:
    """Execute the code in a namespace of its own."""
    names: dict[str, Any] = {"__name__": "__main__"}
    tree = ast.parse(code)
    last = tree.body[-1] if tree.body else None
    if isinstance(last, ast.Expr):
        tree.body.pop()
    exec(compile(tree, "<tool>", "exec"), names)
    if isinstance(last, ast.Expr):
        value = eval(compile(ast.Expression(last.value), "<tool>", "eval"), names)
        if value is not None:
            print(repr(value))


def main() -> None:
    seconds, memory_bytes, output_bytes = sys.argv[1:]
    code = sys.stdin.read()
    limit(float(seconds), int(memory_bytes), int(output_bytes))
    sys.addaudithook(refuse)
    try:
        run(code)
    except BaseException as error:  # SystemExit too: it is the code's, not ours
        print(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
