"""Grading in separate processes: a reward may raise, hang or kill its process, at the cost of one sample."""

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
from megatron_pmd.processes import die_with_parent
from megatron_pmd.rewards.graders import Grader, grader

START_SECONDS = 180.0
"""For the first worker to import the reward's libraries; slow on a busy network file system."""
ATTEMPTS = 3
"""How often a sample is given to a new pool after the pool it was in broke."""
_HEARTBEAT_SECONDS = 0.5


@dataclass(frozen=True)
class Verdict:
    """The outcome of grading one sample."""

    reward: float
    error: str | None = None
    """Why the reward is 0 although the grader gave no verdict."""


@dataclass(eq=False)
class _Job:
    function: Callable[..., Verdict]
    arguments: tuple[Any, ...]
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
        self._closed = False
        self._door = threading.Lock()
        # Workers die with the thread that started them (prctl): this one lives as long as the pool.
        self._keeper = threading.Thread(target=self._keep, name="reward-pool", daemon=True)

    def __enter__(self) -> Self:
        """Start the workers; PmdError if the first cannot load the reward or does not come up."""
        self._keeper.start()
        name = self._reward.name
        try:
            failure = self._add(_readiness).result(START_SECONDS).error
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

    def submit(self, response: str, problem: Problem) -> Future[Verdict]:
        """Grade one sample in the background; from asyncio, `await asyncio.wrap_future(pool.submit(...))`.

        The future never holds an exception of the reward's. RuntimeError if the pool is not open.
        """
        return self._add(_judge, response, problem)

    def grade(self, items: list[tuple[str, Problem]]) -> list[Verdict]:
        """Grade (response, problem) pairs; the verdicts come in the same order."""
        return [future.result() for future in [self.submit(*item) for item in items]]

    def _add(self, function: Callable[..., Verdict], *arguments: Any) -> Future[Verdict]:
        with self._door:
            if self._closed or not self._keeper.is_alive():
                raise RuntimeError("the reward pool is not open: use it inside its `with` block")
            job = _Job(function, arguments)
            self._incoming.put(job)
        return job.verdict

    def _keep(self) -> None:
        """Serve until the pool is closed or cannot go on; then let nobody wait for a verdict."""
        failure: PmdError | None = None
        try:
            self._serve()
        except Exception as error:
            failure = PmdError(
                f"reward {self._reward.name}: its workers cannot run: {type(error).__name__}: {error}"
            )
        with self._door:  # no job can come in behind the last one cleared away
            self._closed = True
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
                    _stop(pool)
                    pool = self._start()
                    jobs += list(self._unsettled)
                for job in jobs:
                    self._schedule(pool, job)
        finally:
            _stop(pool)

    def _start(self) -> pebble.ProcessPool:
        pool = pebble.ProcessPool(
            max_workers=self._reward.workers,
            initializer=_prepare,
            initargs=(self._reward, os.getpid()),
            context=multiprocessing.get_context("spawn"),
        )
        pool.active  # noqa: B018 - reading it starts the workers, in this thread
        return pool

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
            task = pool.schedule(job.function, args=job.arguments, timeout=self._reward.timeout_seconds)
        except RuntimeError:
            return  # the pool broke this moment: the next heartbeat finds the job unsettled
        task.add_done_callback(partial(self._settle, job))

    def _settle(self, job: _Job, task: Future[Verdict]) -> None:
        """Turn the outcome of a task into a verdict; runs in one of pebble's threads."""
        if task.cancelled():
            return
        match task.exception():
            case None:
                verdict = task.result()
            case BrokenProcessPool():
                return  # not this sample's doing: the keeper gives it to a new pool
            case TimeoutError():
                verdict = Verdict(0.0, f"no verdict within {self._reward.timeout_seconds:g} s")
            case pebble.ProcessExpired() as error:
                verdict = Verdict(0.0, f"the reward ended its worker process (exit code {error.exitcode})")
            case error:
                verdict = Verdict(0.0, f"{type(error).__name__}: {error}")
        self._unsettled.discard(job)
        job.settle(verdict)


def _stop(pool: pebble.ProcessPool) -> None:
    pool.stop()
    pool.join()


# In a worker process
_grade: Grader | None = None
_failure: str | None = None


def _prepare(reward: Reward, parent: int) -> None:
    """Load the reward before any sample's clock runs."""
    global _grade, _failure
    die_with_parent(parent=parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # pebble's handler needs the interpreter: a reward that hangs in C code would stall all workers for 3 s
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        _grade = grader(reward)
    except BaseException as error:  # raised from here it would break the pool, its text only in the log
        _failure = f"{type(error).__name__}: {error}"


def _readiness() -> Verdict:
    return Verdict(0.0, _failure)


def _judge(response: str, problem: Problem) -> Verdict:
    if _grade is None:
        return Verdict(0.0, f"the worker could not load the reward: {_failure}")
    try:
        value = _grade(response, problem)
        if not hasattr(value, "__float__"):  # a string has none, though float() takes it
            return Verdict(0.0, f"the reward returned a {type(value).__name__} ({value!r:.80}), not a number")
        reward = float(value)
    except BaseException as error:  # SystemExit too
        return Verdict(0.0, f"{type(error).__name__}: {error}"[:1000])
    if not math.isfinite(reward):
        return Verdict(0.0, f"the reward returned {reward}")
    return Verdict(reward)
