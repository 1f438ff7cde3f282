"""How a program's run ends, and what it may ask for: on the real openai client."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import re
import time
from types import SimpleNamespace
from typing import Any

import aiohttp
import openai
import pytest
from aiohttp import web

from megatron_pmd.errors import EngineError, RolloutError, StaleWeights
from megatron_pmd.rollout.agents import server as server_module
from megatron_pmd.rollout.agents.program import AgentTask
from megatron_pmd.rollout.carried_over_file import read_carried_over, write_carried_over
from megatron_pmd.rollout.generate_client import EnginesLost
from megatron_pmd.rollout.groups import RolloutGroups
from megatron_pmd.rollout.metrics import account_values
from megatron_pmd.rollout.trajectory import Turn
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


# How it ends


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
    assert account_values(rollout)["rollout/refused_groups"] == 1


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


# What it may ask for


def asked(url: str, *requests: dict[str, Any], **changes: Any) -> list[Any]:
    """The answers to these requests, or the errors, of one program."""
    found: list[Any] = []

    async def program(task: AgentTask) -> str:
        async with client_of(task) as client:
            text = await ask(client, [user("go")])
            for request in requests:
                asking = {"model": "any", "messages": [user("other")]} | request
                try:
                    found.append(await client.chat.completions.create(**asking))
                except openai.APIError as error:
                    found.append(error)
            return text

    draw(url, program, **changes)
    return found


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"n": 2}, "n=2 is not possible here: the samples would not be the trained policy's; leave it out or"),
    ({"logit_bias": {"5": 1}}, "logit_bias=.* is not possible here"),
    ({"tool_choice": "required"}, 'tool_choice="required" is not possible here'),
    ({"extra_body": {"max_token": 3}}, r"max_token is no parameter of this endpoint \(did you mean max_to"),
    ({"max_tokens": 0}, "max_tokens=0: a whole number from 1"),
    ({"messages": []}, "messages: a list with at least one message"),
    ({"messages": [{"content": "?"}]}, r"messages\[0\]: an object with a role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, r"messages\[0\].content: a text"),
    ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, r"messages\[0\].tool_calls: a list of calls"),
    ({"stop": 5}, "stop: a text or a list of texts"),
    ({"tools": [{"type": "function"}]}, "tools: .* is expected of each"),
    ({"tools": [{"type": "function", "function": {"name": "add"}}]}, "set rollout.agent.tool_parser"),
    ({"messages": [user("x" * 2000)]}, "has 2004 tokens, and there is no room for an answer"),
]


def test_a_request_that_is_wrong_is_refused_in_words_that_the_client_shows() -> None:
    with serving(Talking()) as url:
        errors = asked(url, *(request for request, _ in REFUSED))
    for error, (request, said) in zip(errors, REFUSED, strict=True):
        assert isinstance(error, openai.BadRequestError), request
        assert re.search(said, error.message), error.message


def test_more_tokens_than_there_is_room_for_are_cut_and_the_finish_reason_says_so() -> None:
    with serving(Talking(says=lambda prompt: "some STOP" if "stop" in prompt else "x" * 50)) as url:
        (long,) = asked(url, {"max_tokens": 1000}, max_response_tokens=30)
        short, stopped = asked(
            url, {"max_completion_tokens": 7}, {"messages": [user("stop")], "stop": "STOP"}
        )
    assert long.choices[0].finish_reason == "length" and long.usage.completion_tokens == 30
    assert short.choices[0].finish_reason == "length" and short.choices[0].message.content == "x" * 7
    assert stopped.choices[0].finish_reason == "stop" and stopped.choices[0].message.content == "some "


def test_a_conversation_that_outgrows_its_room_is_refused_and_its_response_is_truncated() -> None:
    class Small(Talking):
        """Has a context of 40 tokens, which is less than the run would allow."""

        async def generate(self, request: Any) -> Any:
            if len((await request.json())["input_ids"]) > 40:
                return web.Response(status=400, text="longer than the model's context length")
            return await super().generate(request)

    async def program(task: AgentTask) -> str:
        async with client_of(task) as client:
            text = await ask(client, [user("go")])
            with pytest.raises(openai.BadRequestError) as refused:
                await ask(client, [user("go"), assistant(text), user("x" * 50)])
            assert refused.value.code == "context_length_exceeded"
            return text

    for engine, room in ((Talking(), 30), (Small(), 1000)):
        with serving(engine) as url:
            rollout = draw(url, program, max_response_tokens=room)
        (sample,) = samples_of(rollout)
        assert (sample.finish_reason, sample.reward) == ("length", 1.0)
        assert sample.response_tokens.tolist() == engine.answers[0]


def test_the_runs_own_temperature_is_used_whatever_a_program_asks_for() -> None:
    engine = Talking()

    async def program(task: AgentTask) -> str:
        async with client_of(task) as client:
            return await ask(client, [user("go")], temperature=0.0, top_p=0.5, seed=3)

    with serving(engine) as url:
        rollout = draw(url, program)
    parameters = engine.requests[0]["sampling_params"]
    assert (parameters["temperature"], parameters["top_p"]) == (1.0, 1.0)
    assert parameters["sampling_seed"] == rollout.groups[0].members[0].seed


def test_only_the_episodes_own_key_opens_it_and_only_as_long_as_it_lasts() -> None:
    errors: list[Exception] = []
    ended: list[AgentTask] = []

    async def program(task: AgentTask) -> str:
        others = [dataclasses.replace(task, api_key="other"), *ended]
        ended.append(task)
        for other in others:
            try:
                await simple(other)
            except openai.APIError as error:
                errors.append(error)
        async with client_of(task) as client:
            assert [model.id async for model in client.models.list()] == ["policy"]
            with pytest.raises(openai.NotFoundError, match=r"chat/completions is what there is"):
                await client.responses.create(model="any", input="?")
        return await simple(task)

    with serving(Talking()) as url:
        rollout = rollout_for(0, problems=[problem(0)], samples_per_prompt=1)
        draw(url, program, rollout=rollout)
    assert [type(error) for error in errors] == [openai.AuthenticationError]


def test_turns_beyond_the_limit_and_requests_after_the_end_are_refused() -> None:
    errors: list[openai.APIStatusError] = []
    begun: list[AgentTask] = []
    tasks: list[Any] = []

    async def program(task: AgentTask) -> str:
        client = client_of(task)
        for _ in range(9):
            await ask(client, [user("go")])
        try:
            await ask(client, [user("go")])
        except openai.BadRequestError as error:
            errors.append(error)

        async def late() -> None:
            await asyncio.sleep(0.1)
            try:
                await ask(client, [user("go")])
            except openai.APIStatusError as error:
                errors.append(error)

        tasks.append(asyncio.create_task(late()))
        return "yes"

    async def either(task: AgentTask) -> str:
        begun.append(task)
        if len(begun) == 1:
            return await program(task)
        text = await simple(task)
        while len(errors) < 2:
            await asyncio.sleep(0.02)
        return text

    with serving(Talking()) as url:
        draw(url, either, samples_per_prompt=2)
    assert [error.code for error in errors] == ["turn_limit_exceeded", "episode_ended"]
    assert errors[1].status_code == 410


def test_an_answer_that_was_not_waited_for_or_not_read_is_not_trained_on() -> None:
    begun: list[asyncio.Task[None]] = []

    async def never_heard(task: AgentTask) -> None:
        with contextlib.suppress(openai.APIError):
            await ask(client_of(task), [user("slow")])

    class Slow(Talking):
        async def generate(self, request: Any) -> Any:
            body = await request.json()
            if "slow" in decode(body["input_ids"]):
                await asyncio.sleep(0.3)
            return await super().generate(request)

    async def program(task: AgentTask) -> str:
        text = await simple(task)
        async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {task.api_key}"}) as session:
            body = {"model": "any", "messages": [user("slow")], "stream": True}
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await session.post(f"{task.base_url}/chat/completions", json=body)
        await asyncio.sleep(0.4)  # the engine has its answer then, and nobody who wants it
        begun.append(asyncio.create_task(never_heard(task)))
        await asyncio.sleep(0.1)
        return text

    with serving(Slow()) as url:
        (sample,) = samples_of(draw(url, program))
        time.sleep(0.4)  # for the engine, to end what nobody waits for
    assert sample.branch == 0 and len(counted_text(sample)) == 1


def test_a_stream_that_breaks_off_is_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        async def prepare(self, request: Any) -> None: ...

        async def write(self, event: bytes) -> None:
            raise ConnectionResetError

    noted: list[Turn] = []
    monkeypatch.setattr(server_module.web, "StreamResponse", lambda **_: Broken())
    episode: Any = SimpleNamespace(note_undelivered=noted.append)
    turn = Turn()
    with pytest.raises(ConnectionResetError):
        asyncio.run(server_module._streamed(None, iter([b"data"]), episode, turn))  # type: ignore[arg-type]
    assert noted == [turn]
