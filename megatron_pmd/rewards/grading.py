"""What grades a run's responses: one pool or service, or one for each different reward of its sources."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

from megatron_pmd.config import REWARDS, Reward
from megatron_pmd.data.problems import Problem
from megatron_pmd.rewards.pool import RewardPool, Verdict
from megatron_pmd.rewards.threaded import ThreadedReward


def grading(
    reward: Reward, of_sources: Sequence[Reward] = ()
) -> RewardPool | ThreadedReward | RewardsBySource:
    """What grades by these settings: `with grading(config.reward) as rewards`.

    of_sources: each source's, where there are several; those that are equal share their workers.
    """
    different: list[Reward] = []
    for settings in of_sources or (reward,):
        if settings not in different:
            different.append(settings)
    return RewardsBySource(reward, different) if len(different) > 1 else _grading_by(different[0])


def _grading_by(reward: Reward) -> RewardPool | ThreadedReward:
    """A function is called in worker processes; a class is what grades."""
    named = REWARDS.load(reward.name, what="reward.name")
    made_by: Any = named if inspect.isclass(named) else RewardPool
    return made_by(reward)


class RewardsBySource:
    """Gives each response to the workers of its problem's reward, with the interface of RewardPool."""

    def __init__(self, reward: Reward, different: Sequence[Reward]) -> None:
        """reward: of problems that name none. different: all that a problem can have."""
        self._reward = reward
        self._graders = [(settings, _grading_by(settings)) for settings in different]
        self._opened = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as opening:  # ends those before one that fails
            for _, grader in self._graders:
                opening.enter_context(grader)
            self._opened = opening.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.close()

    def submit(self, response: str, problem: Problem, truncated: bool = False) -> Future[Verdict]:
        """Grade one sample in the background, as RewardPool.submit."""
        wanted = problem.reward or self._reward
        grader = next(grader for settings, grader in self._graders if settings == wanted)
        return grader.submit(response, problem, truncated)

    def grade(self, items: list[tuple[str, Problem]]) -> list[Verdict]:
        """Grade (response, problem) pairs; the verdicts come in the same order."""
        return [future.result() for future in [self.submit(*item) for item in items]]
