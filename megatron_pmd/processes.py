"""Processes: children that cannot outlive their parent, limits, memory, and quiet libraries. Linux only."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import threading
from collections.abc import Callable, Iterator

SAVE = signal.SIGUSR1
"""What Slurm sends a run that it wants to end; the ranks then write a checkpoint (training/shutdown.py)."""

_PR_SET_PDEATHSIG = 1
# Loaded here, not in the function: between fork and exec (preexec_fn) the loader's lock may be held for good.
_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent(signal_number: int = signal.SIGKILL, parent: int | None = None) -> None:
    """Have the kernel send this process signal_number when its parent ends, even by SIGKILL.

    "Parent" is the *thread* that started this process: start it from one that lives as long as it should.
    With `parent`, the parent's process id, one that is already gone is noticed too. Usable as a preexec_fn:
    `Popen(..., preexec_fn=functools.partial(die_with_parent, parent=os.getpid()))`. Raises OSError if the
    kernel refuses the signal number.
    """
    if _libc.prctl(_PR_SET_PDEATHSIG, int(signal_number), 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl(PR_SET_PDEATHSIG, {signal_number}): {os.strerror(code)}")
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signal_number)


def become_helper(title: str, parent: int) -> None:
    """First of all in a process that another one, whose number is given, starts to work for it.

    It ends with its parent, and `ps` shows it under the title. Imports little: a spawned process that
    only holds bytes is not to import torch for it.
    """
    from setproctitle import setproctitle  # which a login node has not

    die_with_parent(parent=parent)
    setproctitle(title)


def hold_back(signal_number: int) -> None:
    """Keep a signal for sigwait in this process, and harmless in all that it starts.

    Slurm sends it to the direct children of its step alone, or to every process of the step: a shell, a
    compiler or a server may get it at any moment, also in the seconds before it could install a handler. A
    child inherits both that it is blocked and that it is ignored. One that comes waits for sigwait: the
    kernel drops an ignored signal only where it is not blocked. To be called before there are other threads,
    which would take it.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal_number})
    # shells unblock all signals; set again it would drop one that waits
    if signal.getsignal(signal_number) is not signal.SIG_IGN:
        signal.signal(signal_number, signal.SIG_IGN)


@contextlib.contextmanager
def beside(work: Callable[[threading.Event], None], name: str) -> Iterator[None]:
    """Run the work in a thread of this name beside the block, whose end sets the event that it is given."""
    ended = threading.Event()
    thread = threading.Thread(target=work, args=(ended,), name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def allow_many_files() -> None:
    """Raise this process's limit of open files, and that of processes it starts, as far as it may.

    A rollout's requests are thousands of connections, in the driver and again in the router; the usual limit
    is 1,024.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


SPARE_FILES = 64
"""Files that stay free for what else a process opens while its connections are open."""


def connections_possible() -> int:
    """How many connections this process can open beside its open files, and a relay like the router, too.

    The router has this process's limit, and two connections for each of ours.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    there = len(os.listdir("/proc/self/fd"))
    return max(1, (limit - there - SPARE_FILES) // 2)


def data_bytes() -> int:
    """What this process has asked the kernel for to write into: heap and private mappings, touched or not."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmData"))


def limit_further_memory(further_bytes: int) -> None:
    """Have the kernel refuse this process more than so much beside what it has: MemoryError in Python."""
    # RLIMIT_AS would also count what is only reserved, as CUDA does by the terabyte
    limit = data_bytes() + further_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def quiet() -> None:
    """Keep the libraries' own remarks out of the run's screen; warnings of ours are errors or printed."""
    import logging
    import warnings

    warnings.filterwarnings("ignore")
    # megatron/training/training.py, which the bridge imports, else has all libraries tell what they do
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("megatron").setLevel(logging.ERROR)
    # it gives itself a level and a handler, and prints a traceback for every optional import that fails
    logging.getLogger("megatron.bridge.utils.import_utils").disabled = True
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def tree_bytes(pid: int) -> int:
    """Resident memory of a process and its descendants, in bytes; what they share counts more than once."""
    import psutil

    total = 0
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def cores_of_rank() -> int:
    """This rank's share of the cores that its node's ranks may use, as torchrun counts them; at least one."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
