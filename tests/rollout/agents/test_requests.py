"""What a program may ask for, and what it gets where it may not; on the real openai client."""

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

from megatron_pmd.rollout.agents import server as server_module
from megatron_pmd.rollout.agents.program import AgentTask
from megatron_pmd.rollout.trajectory import Turn
from tests.rollout.agents.talking_engine import (
    Talking,
    assistant,
    client_of,
    decode,
    draw,
    problem,
    user,
)
from tests.rollout.agents.test_conversations import ask, counted_text
from tests.rollout.agents.test_program import samples_of, simple
from tests.rollout.test_sampler import rollout_for
from tools.bench.stub_engine import serving


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
