"""What grades in threads, because others do the work: a sandbox's processes, a service."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

from megatron_pmd.config import Reward
from megatron_pmd.data.problems import Problem
from megatron_pmd.errors import PmdError
from megatron_pmd.rewards.pool import Verdict


class ThreadedReward(ABC):
    """The interface of RewardPool over threads that wait. A reward of this kind says how to `judge`."""

    def __init__(self, reward: Reward, threads: int) -> None:
        """threads: how many samples are graded at one time."""
        self.reward = reward
        self.closing = threading.Event()
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix=f"reward-{reward.name}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closing.set()
        self._threads.shutdown(cancel_futures=True)
        self.close()

    def submit(self, response: str, problem: Problem, truncated: bool = False) -> Future[Verdict]:
        """Grade one sample in the background; the future holds PmdError where nothing can be graded.

        Whatever else judge() raises costs that sample, as in RewardPool.
        """
        return self._threads.submit(self._verdict, response, problem, truncated)

    def _verdict(self, response: str, problem: Problem, truncated: bool) -> Verdict:
        try:
            return self.judge(response, problem, truncated)
        except PmdError:
            raise
        except Exception as error:
            return Verdict.of_failure(error)

    def grade(self, items: list[tuple[str, Problem]]) -> list[Verdict]:
        """Grade (response, problem) pairs; the verdicts come in the same order."""
        return [future.result() for future in [self.submit(*item) for item in items]]

    @abstractmethod
    def judge(self, response: str, problem: Problem, truncated: bool) -> Verdict:
        """Grade one sample, in one of the threads."""

    @abstractmethod
    def close(self) -> None:
        """Give back what the threads used; they have ended."""
