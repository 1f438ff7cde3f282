"""How a run of a program ends, and what that costs; on the real openai client."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

import openai
import pytest
from aiohttp import web

from megatron_pmd.errors import (
    ConfigError,
    EngineError,
    EnginesLost,
    RequestRefused,
    RolloutError,
    StaleWeights,
)
from megatron_pmd.rollout.agents.model_output import OutputReader
from megatron_pmd.rollout.agents.program import AgentTask
from megatron_pmd.rollout.carried_over_file import read_carried_over, write_carried_over
from megatron_pmd.rollout.groups import RolloutGroups
from megatron_pmd.rollout.metrics import account_values
from tests.rollout.agents.talking_engine import (
    Talking,
    assistant,
    client_of,
    decode,
    draw,
    problem,
    tokenizer,
    user,
)
from tests.rollout.agents.test_conversations import ask, counted_text, numbered
from tests.rollout.test_sampler import rollout_for
from tools.bench.stub_engine import serving


def samples_of(rollout: RolloutGroups) -> list[Any]:
    return rollout.samples(tokenizer())


async def simple(task: AgentTask) -> str:
    async with client_of(task) as client:
        return await ask(client, [user("go")])


def test_a_program_that_fails_costs_its_own_response_and_is_cleaned_up() -> None:
    closed: list[str] = []

    async def program(task: AgentTask) -> str:
        closed.append("open")
        number = len(closed) - 1
        try:
            async with client_of(task) as client:
                text = await ask(client, [user("go")])
                if number == 1:
                    raise ValueError("no such tool")
                return text
        finally:
            await asyncio.sleep(0.01)
            closed[number] = "closed"

    with serving(Talking()) as url:
        rollout = draw(url, program, samples_per_prompt=3)
    samples = samples_of(rollout)
    assert [s.reward_error for s in samples] == [None, "the agent failed: ValueError: no such tool", None]
    assert [s.reward for s in samples] == [1.0, 0.0, 1.0]
    assert account_values(rollout) == {"agent/turns": 3, "agent/failed": 1}
    assert closed == ["closed"] * 3


def test_a_program_that_never_ends_is_ended_at_its_deadline_and_closes_what_it_opened() -> None:
    closed: list[bool] = []

    async def program(task: AgentTask) -> str:
        try:
            text = await simple(task)
            await asyncio.sleep(3600)
            return text
        finally:
            await asyncio.sleep(0.01)
            closed.append(True)

    with serving(Talking()) as url:
        rollout = draw(url, program, agent={"timeout_seconds": 0.5})
    (sample,) = samples_of(rollout)
    assert (sample.reward, sample.reward_error) == (0.0, "the agent had not ended after 0.5 s")
    assert closed == [True]


def test_a_program_that_fails_before_it_has_an_answer_has_its_group_replaced_and_never_ends_the_run() -> None:
    async def fragile(task: AgentTask) -> str:
        if task.problem.index == 0:
            raise ConnectionError("no sandbox")
        return await simple(task)

    with serving(Talking()) as url:
        rollout = rollout_for(
            0,
            problems=[problem(0), problem(1)],
            samples_per_prompt=2,
            wanted=2,
            next_problem=lambda: problem(2),
        )
        draw(url, fragile, rollout=rollout)
    assert [s.problem for s in samples_of(rollout)] == [1, 1, 2, 2]
    assert rollout.accounts.first_refusal == "the agent failed: ConnectionError: no sandbox"
    refused = {"rollout/refused_requests": 0, "rollout/refused_groups": 1}
    assert account_values(rollout) == refused | {"agent/turns": 4}


def test_a_program_that_fails_on_every_prompt_ends_the_rollout_and_the_engines_are_not_blamed() -> None:
    async def broken(task: AgentTask) -> str:
        raise ConnectionError("no sandbox")

    said = "^no prompt could be begun: the agent failed: ConnectionError: no sandbox$"
    with serving(Talking()) as url, pytest.raises(EngineError, match=said):
        rollout = rollout_for(0, problems=[problem(0)], wanted=1, next_problem=lambda: problem(1))
        draw(url, broken, rollout=rollout)


class Refusing(Talking):
    """Answers status 400 to prompts that say `long`, and to all questions about what it wrote."""

    refused = 0

    async def generate(self, request: web.Request) -> web.Response:
        if "long" in decode((await request.json())["input_ids"]):
            self.refused += 1
            return web.Response(status=400, text="too long")
        return await super().generate(request)

    async def parse(self, request: web.Request) -> web.Response:
        self.refused += 1
        return web.Response(status=400, text="no such parser")


def test_each_request_that_the_engines_refuse_counts_once_whether_or_not_it_ends_its_episode() -> None:
    """Two of each of the 2 responses to problem 0; one of each to problem 1 and to problem 2 in its place."""

    async def program(task: AgentTask) -> str:
        async with client_of(task) as client:
            with contextlib.suppress(openai.BadRequestError):
                await ask(client, [user("long")])
            return await ask(client, [user("long" if task.problem.index == 0 else "go")])

    engine = Refusing()
    with serving(engine) as url:
        problems = [problem(0), problem(1)]
        rollout = rollout_for(
            0, problems=problems, samples_per_prompt=2, wanted=2, next_problem=lambda: problem(2)
        )
        draw(url, program, rollout=rollout)
    assert engine.refused == 8
    refused = {"rollout/refused_requests": 8, "rollout/refused_groups": 1}
    assert account_values(rollout) == refused | {"agent/turns": 4}


@pytest.mark.parametrize("empty", [False, True], ids=["longer_than_the_run_allows", "empty_answer"])
@pytest.mark.parametrize("handled", [True, False])
def test_a_first_request_without_room_has_its_group_replaced_whatever_the_program_makes_of_it(
    handled: bool, empty: bool
) -> None:
    async def program(task: AgentTask) -> str:
        long = task.problem.index == 0 and not empty
        async with client_of(task) as client:
            try:
                return await ask(client, [user("x" * 90 if long else "go")])
            except openai.BadRequestError:
                if handled:
                    return "too long for me"
                raise

    engine = Talking(says=lambda _: [] if empty and len(engine.answers) < 2 else "yes")
    with serving(engine) as url:
        rollout = rollout_for(
            0, problems=[problem(0)], samples_per_prompt=2, wanted=1, next_problem=lambda: problem(1)
        )
        draw(url, program, rollout=rollout, agent={"max_prompt_tokens": 20}, max_response_tokens=50)
    assert [s.problem for s in samples_of(rollout)] == [1, 1]
    assert rollout.accounts.first_refusal.startswith("the conversation has")
    refused = {"rollout/refused_requests": 2, "rollout/refused_groups": 1}
    assert account_values(rollout) == refused | {"agent/turns": 2}


def test_a_refused_question_about_the_models_words_is_not_asked_again_and_ends_the_rollout() -> None:
    async def program(task: AgentTask) -> str:
        async with client_of(task) as client:
            return await ask(client, [user("go")], tools=[{"type": "function", "function": {"name": "f"}}])

    engine, reader = Refusing(), OutputReader(tokenizer(), "qwen25")
    said = "^/parse_function_call: the engine refuses a request: no such parser"
    with serving(engine) as url, pytest.raises(EngineError, match=said) as raised:
        draw(url, program, agent={"reader": reader})
    assert engine.refused == 1 and not isinstance(raised.value, RequestRefused)


def test_a_program_that_never_asks_or_returns_no_text_is_refused() -> None:
    async def silent(task: AgentTask) -> str:
        return "yes"

    async def wrong(task: AgentTask) -> Any:
        await simple(task)

    cases = [
        (silent, "the agent got no answer of the model on problem 0: it must ask"),
        (wrong, "the agent returned a NoneType on problem 0"),
    ]
    for program, said in cases:
        with serving(Talking()) as url, pytest.raises(RolloutError, match=said):
            draw(url, program)


async def swallowing(task: AgentTask) -> str:
    try:
        return await simple(task)
    except openai.APIError:
        return "whatever"


def test_a_failure_of_the_engines_is_not_the_programs_and_ends_the_rollout_whatever_it_makes_of_it() -> None:
    with serving(Talking(weight_version="6")) as url, pytest.raises(StaleWeights, match="version 6"):
        draw(url, swallowing)
    with serving(Talking(failures=9)) as url, pytest.raises(EngineError, match="failed 1 times"):
        draw(url, swallowing, retries=0)


def test_an_episode_begins_anew_after_engines_were_lost_and_every_token_is_accounted_for() -> None:
    engine = Talking(says=numbered)

    async def program(task: AgentTask) -> str:
        async with client_of(task) as client:
            text = await ask(client, [user("go")])
            engine.failures = 9 if len(engine.answers) == 1 else 0
            return await ask(client, [user("go"), assistant(text), user("on")])

    with serving(engine) as url:
        rollout = rollout_for(0, problems=[problem()], samples_per_prompt=1)
        with pytest.raises((EnginesLost, EngineError)):
            draw(url, program, rollout=rollout, retries=0)
        engine.failures = 0
        draw(url, program, rollout=rollout)
    (sample,) = samples_of(rollout)
    assert counted_text(sample) == ["word 1<|end|>", "word 2<|end|>"]
    assert rollout.accounts.dropped_tokens["begun_anew"] == len(engine.answers[0])
    assert rollout.accounts.sampled_tokens == engine.decoded_tokens


def test_a_rollout_that_has_to_end_does_not_wait_for_a_programs_tools() -> None:
    sleeping = []

    async def program(task: AgentTask) -> str:
        text = await simple(task)
        sleeping.append(1)
        await asyncio.sleep(3600)
        return text

    begun = time.monotonic()
    with serving(Talking()) as url:
        rollout = draw(url, program, samples_per_prompt=2, interrupted=lambda: len(sleeping) == 2)
    assert time.monotonic() - begun < 15
    assert rollout.finished == 0 and len(rollout.left_over) == 1


def test_what_is_left_over_keeps_its_branches_and_what_was_masked(tmp_path) -> None:
    async def program(task: AgentTask) -> str:
        async with client_of(task) as client:
            await ask(client, [user("go")])
            return await ask(client, [user("go"), assistant("edited"), user("on")])

    with serving(Talking(says=numbered)) as url:
        rollout = draw(url, program, samples_per_prompt=2)
    write_carried_over(tmp_path, rollout.groups)
    again = rollout_for(0, problems=[problem()], samples_per_prompt=2)
    again.groups = read_carried_over(tmp_path, lambda _: problem())
    before, after = samples_of(rollout), samples_of(again)
    assert len(before) == len(after) == 4
    for one, other in zip(before, after, strict=True):
        assert (one.branch, one.number, one.segments) == (other.branch, other.number, other.segments)
        assert one.tokens.tolist() == other.tokens.tolist() and one.prompt == other.prompt


def test_a_function_that_is_not_async_is_refused_by_name() -> None:
    program: Any = lambda task: "4"  # noqa: E731  # not what the type asks for
    with (
        serving(Talking()) as url,
        pytest.raises(ConfigError, match="returned a str at once: make it `async def`"),
    ):
        draw(url, program)
