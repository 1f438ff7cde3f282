"""A process that has imported what actor ranks import, once, and forks them: `WarmProcess`.

A fresh interpreter spends 7 s of a core on importing torch, megatron-core, Megatron-Bridge and transformers,
each rank anew, and torchrun 2 s. A rank forked from here is such an interpreter just after its imports: this
process starts no thread, joins no group, touches no GPU but an emulated one and draws no random number, which
it checks before every fork. A rank calls a function and ends as any interpreter does.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import connection
from pathlib import Path

from megatron_pmd.processes import die_with_parent

REPOSITORY = Path(__file__).parents[2]
GRACE_SECONDS = 30.0
"""Between SIGTERM and SIGKILL, as torchrun has it."""
PORTS = range(20_000, 30_000)
"""For rank 0's store: below those that the kernel gives to outgoing connections."""
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    # without it, asking whether there is a GPU makes CUDA unusable in a forked process
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    # else pyarrow's allocator starts a thread when it is imported
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}
MODULES = (
    "tests.actor.actor_programs",
    "tests.actor.checkpoint_programs",
    "tests.actor.lora_programs",
    "tests.actor.muon_programs",
    "tests.actor.router_loss_programs",
    "tests.convert.conversion_programs",
    "tests.planner.measured_save",
    "tests.training.share_programs",
    "tests.weight_sync.fault_programs",
    "tests.weight_sync.node_programs",
    "tests.weight_sync.push_programs",
    "tests.weight_sync.two_engine_programs",
)
"""With all that they import."""


@dataclass(frozen=True)
class Job:
    """A call of a function on each of some ranks."""

    function: str
    """module:name."""
    arguments: tuple[str, ...]
    folder: str
    """Where the ranks run."""
    stdout: str
    stderr: str
    """Files that the ranks append to."""
    ranks: int = 1
    environment: dict[str, str] = field(default_factory=dict)
    deadline_seconds: float = 600.0


class WarmProcess:
    """Started by the first job; dies with this process, and every rank with it."""

    def __init__(self, module: str, within: Sequence[str] = ()) -> None:
        """module: a program that imports what ranks need and then serves: it is given serve's descriptor.

        within: words of a command that becomes the one behind them, as `env` does.
        """
        self._module, self._within = module, within
        self._process: subprocess.Popen[bytes] | None = None
        self._jobs: connection.Connection | None = None

    def run(self, job: Job) -> int:
        """0, or how the rank that failed first ended: its exit code, or minus the number of its signal.

        The other ranks are ended then; at the deadline all are, and the result is -15.
        """
        if self._process is None or self._process.poll() is not None:
            self._start()
        assert self._jobs is not None
        self._jobs.send(job)
        try:
            return self._jobs.recv()
        except EOFError:
            raise AssertionError(
                f"the warm process ended before {job.function} did; see its stderr"
            ) from None

    def _start(self) -> None:
        ours, theirs = connection.Pipe()
        self._process = subprocess.Popen(
            [*self._within, sys.executable, "-W", "ignore", "-m", self._module, str(theirs.fileno())],
            cwd=REPOSITORY, env=os.environ | ENVIRONMENT, stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()], preexec_fn=partial(die_with_parent, parent=os.getpid()),
        )  # fmt: skip
        theirs.close()
        self._jobs = ours
        atexit.register(self.stop)

    def stop(self) -> None:
        """A later job starts another."""
        if self._process is None or self._jobs is None:
            return
        self._jobs.close()
        self._process.wait(GRACE_SECONDS)
        self._process = None


WARM = WarmProcess("tests.actor.warm")


def _import_all() -> None:
    from megatron_pmd.actor.cpu import bridge_import, standins

    standins.install()
    for module in MODULES:
        importlib.import_module(module)
    bridge_import.import_bridge()


def _check_untouched(numbers: tuple[object, ...], *, emulated: bool) -> None:
    import torch

    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"imports have started {len(threads) - 1} threads: a fork would lose them"
    assert not torch.distributed.is_initialized() and (emulated or not torch.cuda.is_initialized())
    assert _random_states() == numbers, "random numbers were drawn: every rank would go on from them"


def _random_states() -> tuple[object, ...]:
    import numpy
    import torch

    drawn = numpy.random.get_state(legacy=False)["state"]
    return random.getstate(), drawn["key"].tobytes(), drawn["pos"], torch.get_rng_state().numpy().tobytes()


def serve(descriptor: int, *, emulated: bool = False) -> None:
    """Fork ranks for one job after the other, until the other end of the pipe is closed.

    emulated: the device is tests/emulated_cuda's, which a forked process has its own part of.
    """
    jobs = connection.Connection(descriptor)
    gc.freeze()  # a collection in a rank would otherwise copy every page it looks at
    numbers = _random_states()
    while True:
        try:
            job = jobs.recv()
        except EOFError:
            os._exit(0)
        _check_untouched(numbers, emulated=emulated)
        jobs.send(_run(job, jobs))


def _run(job: Job, jobs: connection.Connection) -> int:
    port = str(_free_port())
    waiting = {}
    for rank in range(job.ranks):
        pid = _fork(partial(_be_rank, job, rank, port, jobs))
        waiting[os.pidfd_open(pid)] = pid
    first = 0
    limit = time.monotonic() + job.deadline_seconds
    while waiting and not first:
        ended = connection.wait(list(waiting), timeout=max(0.0, limit - time.monotonic()))
        first = next((code for code in _reap(waiting, ended) if code), 0 if ended else -signal.SIGTERM)
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in waiting.values():
            os.kill(pid, number)
        limit = time.monotonic() + GRACE_SECONDS
        while waiting and time.monotonic() < limit:
            _reap(waiting, connection.wait(list(waiting), timeout=1.0))
    return first


def _reap(waiting: dict[int, int], ended: Sequence[object]) -> list[int]:
    """Take those that have ended out of `waiting`, by file descriptor; how each ended."""
    codes = []
    for descriptor in ended:
        assert isinstance(descriptor, int)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(waiting.pop(descriptor), 0)[1]))
        os.close(descriptor)
    return codes


def _fork(rank: Callable[[], None]) -> int:
    """A child's process id. The child does what a rank does, and ends as any interpreter does."""
    parent = os.getpid()
    if pid := os.fork():
        return pid
    die_with_parent(parent=parent)
    rank()
    sys.exit()


def _be_rank(job: Job, rank: int, port: str, jobs: connection.Connection) -> None:
    import numpy
    import torch

    jobs.close()
    for descriptor, path in ((1, job.stdout), (2, job.stderr)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, descriptor)
        os.close(file)
    os.environ.update(
        job.environment, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job.ranks),
        LOCAL_WORLD_SIZE=str(job.ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
        TORCHELASTIC_RUN_ID="none",
    )  # fmt: skip
    os.chdir(job.folder)
    # an interpreter's own generators start anywhere; Python seeds its own after a fork
    torch.seed()
    numpy.random.seed()
    module, name = job.function.split(":")
    getattr(importlib.import_module(module), name)(*job.arguments)


def _free_port() -> int:
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError(f"no free port in {PORTS}")


if __name__ == "__main__":
    _import_all()
    serve(int(sys.argv[1]))
