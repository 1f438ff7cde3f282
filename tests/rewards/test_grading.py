"""Which of a run's graders gets a response."""

from __future__ import annotations

import pytest

from megatron_pmd.config import RemoteReward as Service
from megatron_pmd.config import Reward
from megatron_pmd.data.problems import Problem
from megatron_pmd.errors import ConfigError, DataError
from megatron_pmd.rewards.grading import RewardsBySource, grading
from megatron_pmd.rewards.pool import RewardPool, Verdict
from megatron_pmd.rewards.remote import RemoteReward
from megatron_pmd.rewards.threaded import ThreadedReward

WHOLE, LAST = Reward(name="exact", workers=1), Reward(name="exact", answer="last_line", workers=1)


def problem(reward: Reward | None) -> Problem:
    return Problem(0, (), "34", reward=reward)


def test_each_response_is_graded_by_its_own_sources_reward():
    """The same words under both: right as a last line, wrong as a whole. None is the run's own reward."""
    response = "I think:\n34"
    with grading(WHOLE, [LAST, WHOLE, LAST]) as rewards:
        found = rewards.grade([(response, problem(reward)) for reward in (WHOLE, LAST, None, LAST)])
        assert rewards.submit("34", problem(None)).result().reward == 1.0
    assert [(v.reward, v.error) for v in found] == [(0.0, None), (1.0, None), (0.0, None), (1.0, None)]


def test_equal_rewards_share_their_workers_and_one_that_no_source_has_gets_none():
    service = Reward(name="remote", remote=Service(url="http://127.0.0.1:9/"))
    assert isinstance(grading(WHOLE), RewardPool)
    assert isinstance(grading(WHOLE, [WHOLE, WHOLE]), RewardPool)
    only = grading(WHOLE, [service])
    with only:
        assert isinstance(only, RemoteReward)
    assert isinstance(grading(WHOLE, [WHOLE, LAST]), RewardsBySource)


def test_a_reward_that_cannot_be_loaded_is_named_before_any_worker_starts():
    with pytest.raises(ConfigError, match="no_such_module"):
        grading(WHOLE, [WHOLE, Reward(name="no_such_module:score")])


class Parsing(ThreadedReward):
    """A reward of a user's."""

    def judge(self, response: str, problem: Problem, truncated: bool) -> Verdict:
        if response == "no column":
            raise DataError("the file has no such column")
        return Verdict(float(response))

    def close(self) -> None: ...


def test_what_a_grader_in_threads_raises_costs_its_sample_and_only_our_own_errors_end_the_run():
    with Parsing(WHOLE, threads=2) as rewards:
        found = rewards.grade([("many", problem(None)), ("0.5", problem(None))])
        with pytest.raises(DataError, match="no such column"):
            rewards.submit("no column", problem(None)).result()
    assert found == [Verdict(0.0, "ValueError: could not convert string to float: 'many'"), Verdict(0.5)]
