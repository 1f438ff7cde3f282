"""Partial rollouts against a stub engine: nothing is generated twice, nothing is lost."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import defaultdict
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
import pytest

from megatron_pmd.batch import RolloutBatch, Sample, Segment
from megatron_pmd.config import PartialRollouts
from megatron_pmd.data.problems import Key, Problem
from megatron_pmd.errors import CheckpointError, RolloutError
from megatron_pmd.rewards.pool import Verdict
from megatron_pmd.rollout.carried_over_file import FILE, read_carried_over, write_carried_over
from megatron_pmd.rollout.groups import Group, RolloutGroups
from megatron_pmd.rollout.metrics import account_values
from tests.rollout.test_sampler import Grading, Numbers, problem, rollout_for, sampler_for
from tools.bench.stub_engine import StubEngine, serving


def of_key(key: Key) -> Problem:
    return replace(problem(key[1]), source=key[0])


class Drawn(NamedTuple):
    rollout: RolloutGroups
    samples: list[Sample]
    metrics: dict[str, float]
    """As they were then: the next iteration goes on with the rollout's unfinished responses."""


def rollouts(
    engine: StubEngine, iterations: int, partial: PartialRollouts, *, wanted: int = 4, **changes: Any
) -> list[Drawn]:
    """Consecutive iterations of `wanted` groups of 4, under weight versions 0, 1, …"""
    drawn: list[Drawn] = []
    carried: list[Group] = []
    numbers = itertools.count()
    with serving(engine) as url:
        for t in range(iterations):
            engine.weight_version = str(t)
            new = max(0, wanted + partial.extra_groups - len(carried))
            rollout = rollout_for(
                0, problems=[problem(next(numbers)) for _ in range(new)], iteration=t, weight_version=t,
                wanted=wanted, groups_per_step=2, partial=partial, carried_over=carried,
            )  # fmt: skip
            sampler_for(url, **changes).run(rollout)
            carried = rollout.left_over
            drawn.append(Drawn(rollout, rollout.samples(Numbers()), account_values(rollout)))
    return drawn


def assert_whole(engine: StubEngine, samples: list[Sample]) -> None:
    """Each response is, token by token, the one the engine gives when nobody interrupts it."""
    for s in samples:
        assert s.response_tokens.tolist() == [engine.token(s.seed, i) for i in range(engine.length(s.seed))]
        assert s.engine_log_probs.tolist() == pytest.approx([-token / 1000 for token in s.response_tokens])
        assert sum(segment.tokens for segment in s.segments) == len(s.response_tokens)
        versions = [segment.weight_version for segment in s.segments]
        assert versions == sorted(set(versions)) and versions[-1] == s.weight_version
        assert s.finish_reason == "stop"


def slow() -> StubEngine:
    """Responses of 3 to 400 tokens, half a second the longest: groups of 4 end far apart."""
    return StubEngine(median_tokens=40, sigma=1.0, tokens_per_second=800)


def test_a_rollout_ends_with_enough_groups_and_the_rest_is_continued_not_repeated():
    engine = slow()
    drawn = rollouts(engine, 4, PartialRollouts(extra_groups=3))
    for rollout, samples, _ in drawn:
        assert_whole(engine, samples)
        assert sorted((s.group, s.number) for s in samples) == list(itertools.product(range(4), range(4)))
        assert len(rollout.left_over) == 3
    assert all(metrics["partial/stopped_enough_groups"] > 0 for *_, metrics in drawn)
    everything = [s for _, samples, _ in drawn for s in samples]
    assert any(len(s.segments) > 1 for s in everything)
    assert len({s.seed for s in everything}) == len(everything)
    # every token the engine made is in a rollout or waits for the next one
    trained = sum(len(s.response_tokens) for s in everything)
    assert trained + drawn[-1].metrics["partial/left_over_tokens"] == engine.decoded_tokens


def test_at_the_deadline_whole_optimizer_steps_are_taken_and_the_longest_goes_on_later():
    engine = StubEngine(median_tokens=40, sigma=0.0, tokens_per_second=1000)
    lengths = {0: 40, 1: 40, 2: 40, 3: 6000}
    engine.length = lambda seed: lengths.setdefault(seed, 40)  # type: ignore[method-assign]
    rollout = rollout_for(4, wanted=4, groups_per_step=2, partial=PartialRollouts(deadline_seconds=1.0))
    for number, member in enumerate(rollout.groups[1].members):
        member.seed = number
    with serving(engine) as url:
        sampler_for(url, max_response_tokens=8000).run(rollout)
    assert [group.place for group in rollout.chosen] == [0, 2]  # three are complete, a step takes two
    assert [group.place for group in rollout.left_over] == [1, 3]
    long = rollout.groups[1].members[3]
    assert long.stopped == "deadline" and long.length < 6000
    assert account_values(rollout)["partial/stopped_deadline"] == 1
    assert account_values(rollout)["partial/left_over_finished_responses"] == 7


def test_an_interrupted_rollout_goes_on_from_a_checkpoint_as_if_nothing_had_been(tmp_path: Path):
    """Without any setting of partial rollouts: nothing is generated twice, and no prompt is drawn anew."""
    engine = StubEngine(median_tokens=60, sigma=1.0, tokens_per_second=60)
    rollout = rollout_for(4, wanted=4)
    with serving(engine) as url:
        sampler_for(url, interrupted=lambda: rollout.finished > 2).run(rollout)
        assert 0 < rollout.finished < 16 and not rollout.may_end
        stopped = {member.stopped for group in rollout.groups for member in group.members}
        assert stopped == {None, "interrupted"}
        write_carried_over(tmp_path, rollout.groups)
        carried = read_carried_over(tmp_path, of_key)
        resumed = rollout_for(0, wanted=4, carried_over=carried)
        sampler_for(url).run(resumed)
    samples = resumed.samples(Numbers())
    assert_whole(engine, samples)
    assert len(samples) == 16
    assert sum(len(s.response_tokens) for s in samples) == engine.decoded_tokens
    assert resumed.begin(problem(9)).key == "0-4"


class SlowGrading(Grading):
    """Of problem 1 it grades only what it is asked again."""

    def __init__(self) -> None:
        super().__init__(lambda *_: 1.0)
        self.asked: dict[tuple[int, str], list[Future[Verdict]]] = defaultdict(list)

    def submit(self, response: str, problem: Problem, truncated: bool) -> Future[Verdict]:
        asked = self.asked[problem.index, response]
        slow = problem.index == 1 and not asked
        asked.append(Future() if slow else super().submit(response, problem, truncated))
        return asked[-1]


@pytest.mark.parametrize("reason", ["interrupted", "deadline"])
def test_a_rollout_that_ends_waits_for_no_grading_and_the_next_one_asks_again(reason: str, tmp_path: Path):
    engine, grader = StubEngine(keep_requests=True), SlowGrading()
    deadline = PartialRollouts(deadline_seconds=1.0) if reason == "deadline" else None
    rollout = rollout_for(2, partial=deadline)
    with serving(engine) as url:
        sampler = replace(sampler_for(url), grader=grader)
        ended = replace(sampler, interrupted=lambda: deadline is None and len(grader.asked) == 8)
        asyncio.run(asyncio.wait_for(ended.draw(rollout), 20))
        ungraded = rollout.groups[1].members
        assert [(m.stopped, m.finish_reason, m.finished) for m in ungraded] == [(reason, "stop", False)] * 4
        assert rollout.chosen == rollout.groups[:1]
        write_carried_over(tmp_path, rollout.left_over)
        resumed = rollout_for(0, carried_over=read_carried_over(tmp_path, of_key), partial=deadline)
        sampler.run(resumed)  # checks its accounts, as the one before did
    assert len(engine.requests) == 8 and resumed.accounts.sampled_tokens == 0
    assert_whole(engine, resumed.samples(Numbers()))
    assert resumed.finished == 4
    for (index, _), verdicts in grader.asked.items():
        # the one that nobody waits for is given up, so that no worker grades it
        assert [verdict.cancelled() for verdict in verdicts] == ([True, False] if index == 1 else [False])


def test_a_deadline_waits_for_one_optimizer_step():
    engine = StubEngine(median_tokens=200, sigma=0.0, tokens_per_second=1000)
    drawn = rollouts(engine, 1, PartialRollouts(deadline_seconds=0.01))[0]
    # all four groups end at one time, and the rollout with the first two or with all
    assert len(drawn.samples) in (8, 16)


def test_a_response_over_its_budget_waits_for_the_next_iteration():
    engine = StubEngine(median_tokens=40, sigma=0.7)
    drawn = rollouts(engine, 6, PartialRollouts(max_new_tokens=100, extra_groups=1))
    for _, samples, _ in drawn:
        assert_whole(engine, samples)
        assert all(segment.tokens <= 100 for s in samples for segment in s.segments)
    assert any(len(s.segments) > 1 for _, samples, _ in drawn for s in samples)
    assert sum(metrics["partial/stopped_token_budget"] for *_, metrics in drawn) > 0


def test_a_budget_that_no_response_meets_does_not_stop_training():
    engine = StubEngine(median_tokens=60, sigma=0.0)
    drawn = rollouts(engine, 1, PartialRollouts(max_new_tokens=10))[0]
    assert len(drawn.samples) >= 8
    assert_whole(engine, drawn.samples)


def test_a_response_too_old_is_sampled_anew_under_the_current_weights():
    old = rollout_for(2).groups[0]
    old.members[0].turns = unfinished(5, version=3)
    old.members[1].turns = unfinished(5, version=4)
    before = [member.seed for member in old.members]
    rollout = rollout_for(
        0, problems=[], iteration=5, weight_version=5, wanted=1,
        partial=PartialRollouts(deadline_seconds=9, max_staleness=1), carried_over=[old],
    )  # fmt: skip
    assert [member.length for member in rollout.groups[0].members] == [0, 5, 0, 0]
    assert rollout.accounts.dropped == {"stale": 1} and rollout.accounts.dropped_tokens == {"stale": 5}
    after = [member.seed for member in rollout.groups[0].members]
    assert after[1:] == before[1:] and after[0] not in before


def unfinished(tokens: int, version: int) -> list[Any]:
    from megatron_pmd.rollout.trajectory import Turn

    turn = Turn()
    turn.extend(np.full(tokens, 7, np.int32), np.full(tokens, -0.5, np.float32), version)
    return [turn]


def test_earlier_segments_can_be_left_out_of_the_loss():
    engine = slow()
    last = rollouts(engine, 3, PartialRollouts(extra_groups=3, count_earlier_segments=False))[2]
    assert any(s.segments[0].weight_version < 2 for s in last.samples)
    batch = RolloutBatch.pack(last.samples, 1.0, weight_version=2)
    assert (batch.tokens.counted == (batch.tokens.policies == 2)).all()
    assert not batch.tokens.counted.all()
    batch.refuse_undeclared_versions(max_staleness=4)


def test_a_complete_group_that_waited_is_sampled_anew_where_nothing_of_it_would_count():
    """It would take the place of another in an optimizer step, and teach nothing."""
    waited, unfinished_one = rollout_for(2).groups
    for member in waited.members:
        member.turns, member.reward = unfinished(5, version=4), 1.0
    unfinished_one.members[0].turns = unfinished(5, version=4)
    rollout = rollout_for(
        0, problems=[], iteration=5, weight_version=5, wanted=2,
        partial=PartialRollouts(deadline_seconds=9, count_earlier_segments=False),
        carried_over=[waited, unfinished_one],
    )  # fmt: skip
    lengths = [[member.length for member in group.members] for group in rollout.groups]
    assert lengths == [[0, 0, 0, 0], [5, 0, 0, 0]]
    assert rollout.accounts.dropped_tokens == {"stale": 20}
    assert not rollout.groups[0].complete


def plain(groups: list[Group]) -> list[Any]:
    """All that is in them, in lists."""
    return orjson.loads(orjson.dumps(groups, option=orjson.OPT_SERIALIZE_NUMPY))


def test_carried_over_responses_survive_a_checkpoint(tmp_path):
    """Written, read and continued: the same responses as without the interruption."""
    engine = slow()
    partial = PartialRollouts(extra_groups=3)
    first = rollouts(engine, 1, partial)[0].rollout
    for group in first.left_over[1:]:  # of two sources
        group.problem = replace(group.problem, source="sums")
        for member in group.members:
            member.problem = group.problem
            if member.finished:
                member.teacher_log_probs = -member.log_probs
    write_carried_over(tmp_path, first.left_over)
    read = read_carried_over(tmp_path, of_key)
    assert {group.problem.source for group in read} == {"", "sums"}
    members = [member for group in read for member in group.members]
    assert any(m.teacher_log_probs is not None and m.teacher_log_probs.dtype == np.float32 for m in members)
    assert plain(read) == plain(first.left_over)
    engine.weight_version = "1"
    rollout = rollout_for(
        0,
        problems=[problem(90)] * 4,
        iteration=1,
        weight_version=1,
        wanted=4,
        partial=partial,
        carried_over=read,
    )
    with serving(engine) as url:
        sampler_for(url).run(rollout)
    assert_whole(engine, rollout.samples(Numbers()))


def test_a_broken_file_of_carried_over_responses_is_named(tmp_path):
    assert read_carried_over(tmp_path, of_key) == []
    (tmp_path / FILE).write_bytes(b"PAR1 no more")
    with pytest.raises(CheckpointError, match=FILE):
        read_carried_over(tmp_path, of_key)


def test_a_response_lost_or_counted_twice_is_an_error():
    engine = StubEngine()
    with serving(engine) as url:
        rollout = rollout_for(3)
        sampler_for(url).run(rollout)
    rollout.check()
    twice = replace(rollout.groups[0], members=[*rollout.groups[0].members, rollout.groups[0].members[0]])
    for groups in ([*rollout.groups[1:], twice], rollout.groups[1:]):
        rollout.groups = list(groups)
        with pytest.raises(RolloutError, match=r"lost or counted twice: 0 carried \+ 12 started, but"):
            rollout.check()


def test_a_token_lost_is_an_error():
    with serving(StubEngine()) as url:
        rollout = rollout_for(1)
        sampler_for(url).run(rollout)
    group: Group = rollout.groups[0]
    last = group.members[2].turns[-1]
    last.tokens = last.tokens[:-1]
    with pytest.raises(RolloutError, match="lost or counted twice"):
        rollout.check()


def test_the_version_of_every_segment_is_in_the_sample():
    engine = slow()
    drawn = rollouts(engine, 3, PartialRollouts(extra_groups=3))
    continued = next(s for s in drawn[2].samples if len(s.segments) > 1)
    assert all(isinstance(segment, Segment) and segment.counted for segment in continued.segments)
    assert {segment.weight_version for segment in continued.segments} <= {0, 1, 2}


@pytest.mark.parametrize(("tokens", "finish"), [(1, "stop"), (100, "length")])
def test_a_response_that_is_aborted_on_its_last_token_is_finished(tokens: int, finish: str):
    """The engine calls both aborted: the token that it still makes is the stop token, or fills the limit."""
    engine = StubEngine(tokens_per_second=1)
    engine.length = lambda seed: tokens  # type: ignore[method-assign]
    rollout = rollout_for(1, wanted=1)
    with serving(engine) as url:
        began = time.monotonic()
        interrupted = lambda: time.monotonic() > began + 0.3  # noqa: E731
        sampler_for(url, max_response_tokens=1, interrupted=interrupted).run(rollout)
    assert rollout.may_end
    [samples] = [rollout.samples(Numbers())]
    assert [(len(s.response_tokens), s.finish_reason) for s in samples] == [(1, finish)] * 4
