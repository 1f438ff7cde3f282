"""Grading in other processes: a reward may raise, hang, fill its memory or die, at the cost of one sample."""

from __future__ import annotations

import math
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, Self

import pebble

from megatron_pmd.config import Reward
from megatron_pmd.data.problems import Problem
from megatron_pmd.errors import ConfigError, PmdError
from megatron_pmd.processes import become_helper, data_bytes, limit_further_memory
from megatron_pmd.rewards.graders import Grader, grader
from megatron_pmd.waiting import waiting_for

START_SECONDS = 180.0
"""For the first worker to import the reward's libraries; slow on a busy network file system."""
ATTEMPTS = 3
"""How often a sample is given to a new pool after the pool it was in broke."""
_HEARTBEAT_SECONDS = 0.5
_FULL = 75
"""Exit code of a worker whose memory earlier samples have half filled: its job goes to a new one."""


@dataclass(frozen=True)
class Verdict:
    """The outcome of grading one sample."""

    reward: float
    error: str | None = None
    """Why there is no verdict of the grader: the response is worth reward.failed."""

    @classmethod
    def of_failure(cls, error: BaseException) -> Verdict:
        """For a grader that raised it."""
        return cls(0.0, f"{type(error).__name__}: {error}"[:1000])


@dataclass(eq=False)
class _Job:
    function: Callable[..., Verdict]
    arguments: tuple[Any, ...]
    seconds: float | None
    verdict: Future[Verdict] = field(default_factory=Future)
    attempts: int = 0

    def settle(self, verdict: Verdict) -> None:
        with suppress(InvalidStateError):  # its caller cancelled it
            self.verdict.set_result(verdict)

    def end(self, failure: PmdError | None) -> None:
        """Without a verdict: the pool was closed (None), or failed."""
        if failure is None:
            self.verdict.cancel()
        else:
            with suppress(InvalidStateError):
                self.verdict.set_exception(failure)


class RewardPool:
    """Worker processes that grade: `with RewardPool(config.reward) as pool: verdicts = pool.grade(items)`.

    Construction raises ConfigError if the reward cannot be loaded. Workers end with the pool, and with this
    process however it ends; they are spawned, so whatever the program's main module imports they import too.
    """

    def __init__(self, reward: Reward) -> None:
        grader(reward)
        self._reward = reward
        self._incoming: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._unsettled: set[_Job] = set()
        self._pool: pebble.ProcessPool | None = None
        self._closed = False
        self._failure: PmdError | None = None
        self._door = threading.Lock()
        # Workers die with the thread that started them (prctl): this one lives as long as the pool.
        self._keeper = threading.Thread(target=self._keep, name="reward-pool", daemon=True)

    def __enter__(self) -> Self:
        """Start the workers; PmdError if the first cannot load the reward or does not come up."""
        name = self._reward.name
        first = _Job(_readiness, (), seconds=None)
        self._incoming.put(first)
        self._keeper.start()
        try:
            with waiting_for(f"the first worker of reward {name}", START_SECONDS):
                failure = first.verdict.result(START_SECONDS).error
        except TimeoutError:
            self.close()
            raise PmdError(f"reward {name}: no worker process was ready after {START_SECONDS:g} s") from None
        except BaseException:
            self.close()
            raise
        if failure:
            self.close()
            raise ConfigError(f"reward {name}: it loads in the main process but not in a worker: {failure}")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the workers; what is not graded yet is cancelled. Harmless when repeated."""
        with self._door:
            self._closed = True
        self._incoming.put(None)
        if self._keeper.ident is not None:
            self._keeper.join()

    def submit(self, response: str, problem: Problem, truncated: bool = False) -> Future[Verdict]:
        """Grade one sample in the background; from asyncio, `await asyncio.wrap_future(pool.submit(...))`.

        truncated: the response was cut, at its token budget or in a repetition.

        The future never holds an exception of the reward's. RuntimeError if the pool is not open; PmdError,
        here or from the future, if no worker can be started any more.
        """
        with self._door:
            if self._failure:
                raise self._failure
            if self._closed or not self._keeper.is_alive():
                raise RuntimeError("the reward pool is not open: use it inside its `with` block")
            job = _Job(_judge, (response, problem, truncated), self._reward.timeout_seconds)
            self._incoming.put(job)
        return job.verdict

    def grade(self, items: list[tuple[str, Problem]]) -> list[Verdict]:
        """Grade (response, problem) pairs; the verdicts come in the same order."""
        return [future.result() for future in [self.submit(*item) for item in items]]

    def _keep(self) -> None:
        """Serve until the pool is closed or cannot go on; then let nobody wait for a verdict."""
        failure = None
        try:
            self._serve()
        except Exception as error:
            failure = PmdError(
                f"reward {self._reward.name}: its workers cannot run: {type(error).__name__}: {error}"
            )
        with self._door:  # no job can come in behind the last one cleared away
            self._closed, self._failure = True, failure
        while not self._incoming.empty():
            if job := self._incoming.get():
                self._unsettled.add(job)
        for job in list(self._unsettled):
            job.end(failure)

    def _serve(self) -> None:
        """Give the jobs to a pebble pool, and replace it when it breaks.

        pebble survives a worker that dies while grading, but the death of an idle one (by the out-of-memory
        killer, say) breaks its pool for good, and its queue is then never answered: hence the heartbeat.
        """
        pool = self._start()
        try:
            while not self._closed:
                try:
                    job = self._incoming.get(timeout=_HEARTBEAT_SECONDS)
                except queue.Empty:
                    job = None
                jobs = [job] if job else []
                if (jobs or self._unsettled) and not pool.active:
                    self._stop(pool)
                    pool = self._start()
                    jobs += list(self._unsettled)
                for job in jobs:
                    self._schedule(pool, job)
        finally:
            self._stop(pool)

    def _start(self) -> pebble.ProcessPool:
        pool = pebble.ProcessPool(
            max_workers=self._reward.workers,
            initializer=_prepare,
            initargs=(self._reward, os.getpid()),
            context=multiprocessing.get_context("spawn"),
        )
        self._pool = pool
        pool.active  # noqa: B018 - reading it starts the workers, in this thread
        return pool

    def _stop(self, pool: pebble.ProcessPool) -> None:
        self._pool = None  # before: a task that pebble is just sending fails then, and that is no verdict
        pool.stop()
        pool.join()

    def _schedule(self, pool: pebble.ProcessPool, job: _Job) -> None:
        if job.verdict.done():
            self._unsettled.discard(job)
            return
        if job.attempts == ATTEMPTS:
            self._unsettled.discard(job)
            job.settle(
                Verdict(0.0, f"the reward's workers died {ATTEMPTS} times while this sample was with them")
            )
            return
        job.attempts += 1
        self._unsettled.add(job)
        try:
            task = pool.schedule(job.function, args=job.arguments, timeout=job.seconds)
        except RuntimeError:
            return  # the pool broke this moment: the next heartbeat finds the job unsettled
        task.add_done_callback(partial(self._settle, pool, job))

    def _settle(self, pool: pebble.ProcessPool, job: _Job, task: Future[Verdict]) -> None:
        """Turn the outcome of a task into a verdict; runs in one of pebble's threads."""
        if task.cancelled() or pool is not self._pool:
            return
        match task.exception():
            case None:
                verdict = task.result()
            case BrokenProcessPool():
                return  # not this sample's doing: the keeper gives it to a new pool
            case pebble.ProcessExpired(exitcode=int(code)) if code == _FULL:
                job.attempts -= 1  # no pool broke, and the next worker may be as full
                self._incoming.put(job)
                return
            case TimeoutError():
                verdict = Verdict(0.0, f"no verdict within {job.seconds:g} s")
            case pebble.ProcessExpired() as error:
                verdict = Verdict(0.0, f"the reward ended its worker process (exit code {error.exitcode})")
            case error:
                verdict = Verdict.of_failure(error)
        self._unsettled.discard(job)
        job.settle(verdict)


# In a worker process
_grade: Grader | None = None
_failure: str | None = None
_memory_gigabytes = math.inf
_half_full = math.inf


def _prepare(reward: Reward, parent: int) -> None:
    """Load the reward before any sample's clock runs."""
    global _grade, _failure, _memory_gigabytes, _half_full
    become_helper("megatron-pmd reward worker", parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # pebble's handler needs the interpreter: a reward that hangs in C code would stall all workers for 3 s
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        _grade = grader(reward)
    except BaseException as error:  # raised from here it would break the pool, its text only in the log
        _failure = f"{type(error).__name__}: {error}"
    _memory_gigabytes = reward.memory_gigabytes
    _half_full = data_bytes() + reward.memory_gigabytes * 1e9 / 2
    limit_further_memory(int(reward.memory_gigabytes * 1e9))


def _readiness() -> Verdict:
    return Verdict(0.0, _failure)


def _judge(response: str, problem: Problem, truncated: bool) -> Verdict:
    if _grade is None:
        return Verdict(0.0, f"the worker could not load the reward: {_failure}")
    if data_bytes() > _half_full:
        os._exit(_FULL)
    try:
        value = _grade(response, problem, truncated)
        if not hasattr(value, "__float__"):  # a string has none, though float() takes it
            return Verdict(0.0, f"the reward returned a {type(value).__name__} ({value!r:.80}), not a number")
        reward = float(value)
    except MemoryError:
        return Verdict(0.0, f"it needs more than reward.memory_gigabytes={_memory_gigabytes:g}")
    except BaseException as error:  # SystemExit too
        return Verdict.of_failure(error)
    if not math.isfinite(reward):
        return Verdict(0.0, f"the reward returned {reward}")
    return Verdict(reward)
