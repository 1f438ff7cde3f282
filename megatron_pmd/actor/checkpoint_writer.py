"""The processes that write a checkpoint beside training: a forked writer, and a server of its results."""

from __future__ import annotations

import functools
import multiprocessing
import os
import pickle
from collections.abc import Callable
from multiprocessing.managers import SyncManager
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async

from megatron_pmd.processes import become_helper, die_with_parent

WRITER, RESULTS = "megatron-pmd checkpoint writer", "megatron-pmd checkpoint results"
"""What `ps` calls the two."""
DONE = b"done"


class HelperEnded(Exception):
    """One of these processes was killed: the disk is not at fault."""


def serve_results() -> None:
    """Give megatron-core's writers a results queue: the server of its own outlives a killed rank for ever.

    Answers dist_checkpointing/strategies/filesystem_async.py, _get_write_results_queue: nothing ends the
    manager it starts but this process's orderly exit. Tested by killing a run, in tests/end_to_end.
    """
    if filesystem_async._results_queue is None:
        # without a name in the file system: a folder for it would outlive a killed rank
        address = f"\0megatron-pmd-checkpoint-results-{os.getpid()}"
        manager = SyncManager(address, ctx=multiprocessing.get_context("spawn"))
        manager.start(become_helper, (RESULTS, os.getpid()))
        filesystem_async._results_queue = _PickledResults(manager.Queue())


class _PickledResults:
    """A queue of the server above that hands on bytes: to hold writers' results it would import torch.

    That takes 3 s of a core and 400 MB beside each rank. megatron-core asks for these two methods.
    """

    def __init__(self, queue: Any) -> None:
        self._queue = queue

    def put(self, results: Any) -> None:
        self._asked(self._queue.put, pickle.dumps(results))

    def get_nowait(self) -> Any:
        return pickle.loads(self._asked(self._queue.get_nowait))

    @staticmethod
    def _asked(call: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except (EOFError, OSError) as error:
            raise HelperEnded(
                f"the process `{RESULTS}` of rank {_rank()} has ended: was it killed? ({error!r})"
            ) from error


def _rank() -> str:
    return os.environ.get("RANK", "0")


class Writer:
    """The process that writes this rank's files, seen from the rank: how it ended.

    megatron-core waits for it, but takes one that was killed for one that is done.
    """

    def __init__(self) -> None:
        self._told, self._tells = os.pipe()
        self._last_words = b""
        self._ended = False

    def process(self, write: Callable[..., None]) -> Callable[..., None]:
        """What megatron-core's process is to run in place of `write`."""
        return functools.partial(_write, os.getpid(), self._tells, write)

    def has_started(self) -> None:
        """The process is forked: from here on it alone can tell something."""
        os.close(self._tells)

    def is_done(self, *, wait: bool) -> bool:
        """Whether it has ended; wait: until it has. Raises HelperEnded if that was before it was done."""
        os.set_blocking(self._told, wait)
        try:
            while not self._ended:
                self._listen()
        except BlockingIOError:
            return False
        if self._last_words != DONE:
            killed = f"the process `{WRITER}` of rank {_rank()} ended before it was done: was it killed?"
            raise HelperEnded(self._last_words.decode() or killed)
        return True

    def _listen(self) -> None:
        words = os.read(self._told, 1024)
        self._last_words += words
        if not words:
            self._ended = True

    def __del__(self) -> None:
        os.close(self._told)


def _write(parent: int, tells: int, write: Callable[..., None], *arguments: Any) -> None:
    """Run megatron-core's writer, a forked process, so that it yields to training and ends with its rank.

    A writer that outlived a killed rank would write into the folder that the next run deletes.
    """
    become_helper(WRITER, parent)
    os.register_at_fork(after_in_child=functools.partial(die_with_parent, parent=os.getpid()))
    os.nice(10)
    torch.set_num_threads(1)  # OpenMP's threads are not in a forked process: it would wait for them for ever
    try:
        write(*arguments)
    except HelperEnded as ended:
        os.write(tells, str(ended).encode())
        raise
    os.write(tells, DONE)
