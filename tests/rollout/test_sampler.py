"""The driver against a server that answers as an engine would: groups, retries, filter, statistics."""

from __future__ import annotations

import itertools
import os
import resource
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from megatron_pmd.config import GroupFilter, PartialRollouts, Repetition
from megatron_pmd.data.problems import Problem
from megatron_pmd.errors import ConfigError, EngineError, EnginesLost, RolloutError, StaleWeights
from megatron_pmd.rewards.pool import Verdict
from megatron_pmd.rollout.episode import Episode, rollout_function
from megatron_pmd.rollout.generate_client import Endpoint
from megatron_pmd.rollout.groups import ALL_GROUPS, DrawSettings, EndRules, RolloutGroups, graders_rewards
from megatron_pmd.rollout.metrics import account_values, rollout_values
from megatron_pmd.rollout.sampler import Limits, Sampler
from megatron_pmd.rollout.trajectory import Turn, repeats
from tools.bench.stub_engine import STOP_TOKEN, StubEngine, serving


class Numbers:
    """A tokenizer: a token is a number in the text."""

    def decode(self, tokens: Any, **_: Any) -> str:
        return " ".join(map(str, tokens))

    def encode(self, text: str, **_: Any) -> list[int]:
        return [int(word) for word in text.split()]


class Grading:
    """A grader by a function of response and problem."""

    def __init__(self, score: Callable[[str, Problem], float]) -> None:
        self._score = score

    def submit(self, response: str, problem: Problem, truncated: bool) -> Future[Verdict]:
        verdict: Future[Verdict] = Future()
        verdict.set_result(Verdict(self._score(response, problem)))
        return verdict


def problem(index: int) -> Problem:
    return Problem(index=index, messages=(), answer=str(index), tokens=(1, 2))


def sampler_for(url: str, score: Callable[[str, Problem], float] = lambda *_: 1.0, **changes: Any) -> Sampler:
    endpoint = Endpoint(
        url, [url], {}, 20.0, retries=changes.pop("retries", 1), any_engine_alive=lambda: True,
    )  # fmt: skip
    limits = {name: changes.pop(name) for name in Limits.__dataclass_fields__ if name in changes}
    return Sampler(
        endpoint, Numbers(), [STOP_TOKEN], Limits(**{"max_response_tokens": 1000} | limits),
        grader=Grading(score), **changes,
    )  # fmt: skip


def rollout_for(groups: int, **changes: Any) -> RolloutGroups:
    """Of so many problems, or of `problems`, in groups of 4; changes: of any of its settings and rules."""
    settings: dict[str, Any] = dict(
        samples_per_prompt=4,
        iteration=0,
        weight_version=0,
        temperature=1.0,
        top_p=1.0,
        run_seed=0,
        scored=False,
    )
    rules: dict[str, Any] = {}
    others: dict[str, Any] = {"problems": [problem(i) for i in range(groups)]}
    for name, value in changes.items():
        of = settings if name in settings else rules if hasattr(ALL_GROUPS, name) else others
        of[name] = value
    return RolloutGroups(settings=DrawSettings(**settings), rules=EndRules(**rules), **others)


def test_every_response_is_the_engines_own_and_a_group_has_one_routing_key():
    engine = StubEngine(keep_requests=True)
    with serving(engine) as url:
        rollout = rollout_for(50)
        sampler_for(url).run(rollout)
    samples = rollout.samples(Numbers())
    assert [(s.group, s.number) for s in samples] == list(itertools.product(range(50), range(4)))
    assert len({s.seed for s in samples}) == 200
    for s in samples:
        assert s.response_tokens.tolist() == [engine.token(s.seed, i) for i in range(engine.length(s.seed))]
        assert s.engine_log_probs.tolist() == pytest.approx([-token / 1000 for token in s.response_tokens])
        assert s.response == Numbers().decode(s.response_tokens.tolist())
    assert sorted(Counter(engine.routing_keys).values()) == [4] * 50


def test_a_refused_request_is_sent_again_and_not_counted_twice():
    engine = StubEngine(failures=3)
    with serving(engine) as url:
        rollout = rollout_for(2)
        sampler_for(url).run(rollout)
        assert rollout.accounts.sampled_tokens == engine.decoded_tokens
        engine.failures = 1000
        with pytest.raises(EngineError, match="failed 1 times; last failure: HTTP 503: busy"):
            sampler_for(url, retries=0).run(rollout_for(1))


def test_what_was_drawn_before_the_engines_were_lost_is_not_drawn_again():
    engine = StubEngine(keep_requests=True)
    rollout = rollout_for(3)
    with serving(engine) as url:
        lost = Endpoint(url, [url], {}, 20.0, retries=1, any_engine_alive=lambda: False)
        engine.failures = 5
        with pytest.raises(EnginesLost):
            Sampler(lost, Numbers(), [STOP_TOKEN], Limits(1000), Grading(lambda *_: 1.0)).run(rollout)
        drawn = rollout.finished
        sampler_for(url).run(rollout)
    assert drawn > 0 and rollout.finished == 12
    assert len(engine.requests) == 12 + 5


def test_responses_of_other_weights_stop_the_rollout():
    with serving(StubEngine(weight_version="6")) as url, pytest.raises(StaleWeights, match="version 6, exp"):
        sampler_for(url).run(rollout_for(2))


# Requests that an engine will not answer


class Refusing(StubEngine):
    """Answers status 400 to prompts that end with 9, as SGLang does to one that is too long."""

    async def generate(self, request: web.Request) -> web.Response:
        if (await request.json())["input_ids"][1] == 9:
            return web.Response(status=400, text="too long")
        return await super().generate(request)


def too_long(index: int) -> Problem:
    return replace(problem(index), tokens=(1, 9))


def test_a_group_whose_prompt_is_refused_is_replaced_and_counted():
    with serving(Refusing()) as url:
        problems = [problem(0), too_long(1), problem(2)]
        rollout = rollout_for(0, problems=problems, next_problem=lambda: problem(3))
        sampler_for(url).run(rollout)
    assert [s.problem for s in rollout.samples(Numbers())[::4]] == [0, 2, 3]
    assert rollout.accounts.dropped == {"refused": 4}
    assert "too long" in rollout.accounts.first_refusal
    assert account_values(rollout) == {"rollout/refused_requests": 4, "rollout/refused_groups": 1}


def test_in_an_evaluation_a_refused_prompt_is_worth_0_and_says_why():
    with serving(Refusing()) as url:
        rollout = rollout_for(0, problems=[problem(0), too_long(1)], samples_per_prompt=1)
        sampler_for(url).run(rollout)
    first, second = rollout.samples(Numbers())
    assert (first.reward, first.reward_error) == (1.0, None)
    assert (second.reward, second.finish_reason, len(second.response_tokens)) == (0.0, "length", 0)
    assert "too long" in str(second.reward_error)


@pytest.mark.parametrize("further", [None, lambda: problem(2)], ids=["evaluation", "training"])
def test_what_was_inserted_before_a_refused_request_is_in_the_accounts(further: Any):
    async def hinted(episode: Episode) -> str:
        await episode.insert("5 6 7")
        return (await episode.generate()).text

    with serving(Refusing()) as url:
        rollout = rollout_for(0, problems=[problem(0), too_long(1)], next_problem=further)
        sampler_for(url, function=hinted).run(rollout)  # it checks its accounts
    assert rollout.accounts.dropped_tokens == {"refused": 4 * 3}


def test_engines_that_refuse_every_prompt_end_the_rollout():
    with serving(Refusing()) as url, pytest.raises(EngineError, match=r"^no prompt could be begun.*too long"):
        rollout = rollout_for(0, problems=[too_long(0), too_long(1)], next_problem=lambda: too_long(2))
        sampler_for(url).run(rollout)


def test_a_response_that_the_engine_cuts_below_the_request_ends_there():
    """SGLang at the end of its context gives two tokens fewer than asked for, and refuses to go on."""

    class Short(StubEngine):
        async def generate(self, request: web.Request) -> web.Response:
            body = await request.json()
            if len(body["input_ids"]) > 2:
                return web.Response(status=400, text="too long")
            information = {
                "weight_version": "0",
                "finish_reason": {"type": "length"},
                "output_token_logprobs": [[-1.0, token, None] for token in range(8)],
            }
            return web.json_response({"output_ids": list(range(8)), "meta_info": information})

    different = Repetition(window_tokens=8, min_repeats=2)
    with serving(Short()) as url:
        # cut below the request; and, where it is asked for a window at a time, refused the second
        for settings in ({"max_response_tokens": 10}, {"repetition": different}):
            rollout = rollout_for(1, samples_per_prompt=1)
            sampler_for(url, **settings).run(rollout)
            (sample,) = rollout.samples(Numbers())
            assert (sample.finish_reason, len(sample.response_tokens), sample.reward) == ("length", 8, 1.0)


# What is ours, and what is the rollout function's


def test_no_more_requests_are_in_flight_than_files_may_be_open():
    """The engine is in this process too: a request takes two files, as it does in the router."""
    engine = StubEngine(median_tokens=20, sigma=0.0, tokens_per_second=100)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with serving(engine) as url:
        there = len(os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (there + 150, limits[1]))
        try:
            rollout = rollout_for(50)
            sampler_for(url, retries=0).run(rollout)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert rollout.finished == 200


async def swallowing(episode: Episode) -> str:
    try:
        return (await episode.generate()).text
    except Exception:
        return "all is well"


async def translating(episode: Episode) -> str:
    try:
        return (await episode.generate()).text
    except Exception as error:
        raise ValueError("something in my function") from error


@pytest.mark.parametrize("function", [swallowing, translating])
def test_a_request_that_fails_is_not_the_functions_failure_whatever_it_makes_of_it(function):
    with (
        serving(StubEngine(failures=1000)) as url,
        pytest.raises(EngineError, match="a request failed 1 times"),
    ):
        sampler_for(url, retries=0, function=function).run(rollout_for(1))

    def no_file_left() -> bool:
        raise OSError(24, "Too many open files")

    lost = Endpoint("http://127.0.0.1:1", [], {}, 20.0, retries=0, any_engine_alive=no_file_left)
    with pytest.raises(RolloutError, match="a request for it failed, on problem 0: OSError"):
        replace(sampler_for("", function=function), endpoint=lost).run(rollout_for(1))


# Over-sampling with a filter


def parity_of_number(response: str, problem: Problem) -> float:
    """Groups of even problems disagree within, those of odd ones do not."""
    return float(len(response) % 2) if problem.index % 2 == 0 else 1.0


def test_groups_of_equal_rewards_are_replaced_until_the_rollout_is_full():
    further = itertools.count(100, 2)
    with serving(StubEngine(median_tokens=3, sigma=1.0)) as url:
        rollout = rollout_for(
            8, group_filter=GroupFilter(max_dropped=100), next_problem=lambda: problem(next(further))
        )
        sampler_for(url, lambda r, p: parity_of_number(r, p)).run(rollout)
    samples = rollout.samples(Numbers())
    assert len(samples) == 32
    by_group = [list(g) for _, g in itertools.groupby(samples, key=lambda s: s.group)]
    assert all(len({s.reward for s in group}) == 2 for group in by_group)
    dropped = account_values(rollout)["filter/dropped_groups"]
    assert dropped >= 4  # the odd problems of the first eight
    assert rollout.accounts.started == 32 + 4 * dropped
    assert rollout.accounts.dropped_tokens["group_filter"] > 0


def test_the_filter_gives_up_at_its_limit_and_says_how_many_it_let_through():
    further = itertools.count(100)
    with serving(StubEngine()) as url:
        rollout = rollout_for(
            4, group_filter=GroupFilter(max_dropped=3), next_problem=lambda: problem(next(further))
        )
        sampler_for(url).run(rollout)
    assert len(rollout.samples(Numbers())) == 16
    metrics = account_values(rollout)
    assert (metrics["filter/dropped_groups"], metrics["filter/let_through_groups"]) == (3, 4)


@pytest.mark.parametrize(
    "rewards, kept",
    [
        ([0, 0, 0, 0], False),
        ([1, 1, 1, 1], False),
        ([0, 0, 0, 1], False),
        ([0, 0, 1, 1], True),
        ([0, 1, 1, 1], True),
    ],
)
def test_the_interval_of_mean_rewards_is_open(rewards, kept):
    rule = GroupFilter(drop_equal_rewards=False, mean_reward_above=0.25, mean_reward_below=1.0, max_dropped=1)
    group = rollout_for(1).groups[0]
    for member, reward in zip(group.members, rewards, strict=True):
        member.reward = float(reward)
    assert group.has_signal(rule, graders_rewards) == kept


# How responses end


def test_stop_reasons_and_lengths_are_counted():
    with serving(StubEngine(median_tokens=20)) as url:
        rollout = rollout_for(10)
        sampler_for(url, max_response_tokens=20).run(rollout)
    samples = rollout.samples(Numbers())
    metrics = rollout_values(samples)
    cut = [s for s in samples if s.response_tokens[-1] != STOP_TOKEN]
    assert 0 < len(cut) < 40
    assert metrics["truncated_share"] == metrics["finish/length"] == len(cut) / 40
    assert metrics["finish/stop"] == 1 - len(cut) / 40
    assert metrics["response_tokens/max"] == 20
    assert metrics["response_tokens/p10"] <= metrics["response_tokens/p50"] <= metrics["response_tokens"] + 5


@pytest.mark.parametrize(
    "tokens, found",
    [
        ([7] * 12, True),
        ([1, 2, 3] * 4, True),
        ([9, 9, 9, *[4, 5] * 6], True),
        (list(range(12)), False),
        ([*[1, 2, 3] * 3, 1, 2, 4], False),
        ([1, 2, 3, 4, 5, 6] * 2, False),  # twice over is not four times
        ([7] * 11, False),
    ],
)
def test_a_response_repeats_itself_if_its_end_is_one_sequence_many_times_over(tokens, found):
    assert repeats(np.array(tokens), Repetition(window_tokens=12, min_repeats=4)) == found


def test_a_repeating_response_is_ended_early_with_a_reason_of_its_own(monkeypatch):
    engine = StubEngine(median_tokens=500, sigma=0.0)
    monkeypatch.setattr(engine, "token", lambda seed, position: 5 + position % (3 if position > 40 else 50))
    with serving(engine) as url:
        rollout = rollout_for(1)
        sampler_for(url, repetition=Repetition(window_tokens=16, min_repeats=4)).run(rollout)
    for s in rollout.samples(Numbers()):
        assert s.finish_reason == "repetition"
        assert len(s.response_tokens) == 64  # the first multiple of 16 with 16 repeating tokens before it
    assert engine.decoded_tokens == 4 * 64


def test_repetition_that_never_comes_leaves_the_response_as_it_is():
    engine = StubEngine()
    with serving(engine) as url:
        rollout = rollout_for(3)
        sampler_for(url, repetition=Repetition(window_tokens=4, min_repeats=2)).run(rollout)
    for s in rollout.samples(Numbers()):
        assert s.response_tokens.tolist() == [engine.token(s.seed, i) for i in range(engine.length(s.seed))]


# What is refused


def test_settings_that_do_nothing_are_refused():
    with pytest.raises(ConfigError, match="stops no response: set extra_groups, deadline"):
        PartialRollouts()
    with pytest.raises(ConfigError, match=r"window_tokens=3 cannot hold min_repeats=4"):
        Repetition(window_tokens=3)


def test_log_probs_that_do_not_fit_the_tokens_are_refused():
    with pytest.raises(EngineError, match="2 log-probabilities for 3 tokens"):
        Turn().extend(np.array([1, 2, 3]), np.array([-1.0, -2.0]), 0)


def test_a_function_that_cannot_be_imported_or_called_is_refused():
    with pytest.raises(ConfigError, match="'no_such_module:f': no_such_module cannot be imported"):
        rollout_function("no_such_module:f")
    with pytest.raises(ConfigError, match="is a str, not a function"):
        rollout_function("megatron_pmd.rollout.trajectory:INSERTED")


def test_a_rollout_function_that_fails_is_named_with_its_problem():
    async def broken(episode: Episode) -> str:
        await episode.generate()
        raise KeyError("temperature")

    with (
        serving(StubEngine()) as url,
        pytest.raises(RolloutError, match=r"failed, on problem \d: KeyError: 'temp"),
    ):
        sampler_for(url, function=broken).run(rollout_for(2))
