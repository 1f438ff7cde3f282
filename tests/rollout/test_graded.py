"""What a grader is given of a response, and what a response is worth that could not be graded."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest

from megatron_pmd.config import Repetition, Reward
from megatron_pmd.data.problems import Problem
from megatron_pmd.rewards.pool import Verdict
from megatron_pmd.rewards.stated_answer import stated_answer
from megatron_pmd.rollout.episode import Episode
from megatron_pmd.rollout.groups import RolloutGroups
from tests.rollout.test_sampler import Numbers, problem, rollout_for, sampler_for
from tools.bench.stub_engine import StubEngine, serving

OPENS_A_THOUGHT = 999


class Thinking(Numbers):
    """Its chat template may end a prompt with a token that begins a thought."""

    def decode(self, tokens: Any, **settings: Any) -> str:
        return super().decode(tokens, **settings).replace(str(OPENS_A_THOUGHT), "<think>\n")


class Noting:
    """A grader that notes what it is given, and gives one verdict."""

    def __init__(self, verdict: Verdict | None = None) -> None:
        self.verdict, self.given = verdict or Verdict(1.0), list[tuple[str, bool]]()

    def submit(self, response: str, problem: Problem, truncated: bool) -> Future[Verdict]:
        self.given.append((response, truncated))
        verdict: Future[Verdict] = Future()
        verdict.set_result(self.verdict)
        return verdict


def drawn(grader: Noting, of: Problem, engine: StubEngine | None = None, **changes: Any) -> RolloutGroups:
    rollout = rollout_for(0, problems=[of])
    with serving(engine or StubEngine()) as url:
        replace(sampler_for(url, **changes), grader=grader, tokenizer=Thinking()).run(rollout)
    return rollout


@pytest.mark.parametrize("opened", [True, False])
def test_a_thought_that_the_chat_template_begins_is_shown_to_the_grader(opened: bool) -> None:
    of = replace(problem(0), tokens=(1, OPENS_A_THOUGHT if opened else 2))
    grader = Noting()
    rollout = drawn(grader, of, max_response_tokens=4)
    texts = [member.response for member in rollout.groups[0].members]
    assert sorted(text for text, _ in grader.given) == sorted("<think>" * opened + text for text in texts)
    cut = r"so it is \boxed{34}. Wait, "
    assert stated_answer("<think>" * opened + cut, truncated=True, text=False) == (None if opened else "34")


def test_what_a_rollout_function_has_graded_stays_its_own() -> None:
    async def answer(episode: Episode) -> str:
        await episode.generate()
        return "7"

    grader = Noting()
    drawn(grader, replace(problem(0), tokens=(1, OPENS_A_THOUGHT)), function=answer)
    assert {text for text, _ in grader.given} == {"7"}


def test_a_response_that_is_cut_in_a_repetition_is_cut_to_its_grader() -> None:
    engine, grader = StubEngine(), Noting()
    engine.length, engine.token = lambda seed: 500, lambda seed, position: 3  # type: ignore[method-assign]
    drawn(grader, problem(0), engine, repetition=Repetition(window_tokens=16, min_repeats=4))
    assert {cut for _, cut in grader.given} == {True}


@pytest.mark.parametrize(
    ("of_the_run", "own", "worth"),
    [(0.0, None, 0.0), (-1.0, None, -1.0), (-1.0, Reward(name="exact", failed=-2.0), -2.0)],
)
def test_a_response_that_could_not_be_graded_is_worth_what_its_reward_says(
    of_the_run: float, own: Reward | None, worth: float
) -> None:
    grader = Noting(Verdict(0.0, "TimeoutError: 10 s"))
    rollout = drawn(grader, replace(problem(0), reward=own), failed=of_the_run)
    found = {(member.reward, member.reward_error) for member in rollout.groups[0].members}
    assert found == {(worth, "TimeoutError: 10 s")}
