"""Programs on the real openai client: which trajectories their requests become, and which tokens count."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from megatron_pmd.batch import NOT_SAMPLED, RolloutBatch, Sample
from megatron_pmd.rollout.agents.program import AgentTask
from megatron_pmd.rollout.metrics import account_values, rollout_values
from recipes.tiny_moe_cpu import QUESTION
from tests.rollout.agents.talking_engine import (
    END,
    TEMPLATE,
    Talking,
    assistant,
    client_of,
    decode,
    draw,
    encode,
    render,
    tokenizer,
    tool,
    user,
)
from tools.bench.stub_engine import serving


def counted_text(sample: Sample) -> list[str]:
    """The pieces that count in the loss, as text."""
    pieces, start = [], 0
    for segment in sample.segments:
        if segment.counted:
            pieces.append(decode(sample.response_tokens[start : start + segment.tokens].tolist()))
        start += segment.tokens
    return pieces


async def ask(client: Any, messages: list[dict[str, Any]], **others: Any) -> str:
    answer = await client.chat.completions.create(model="any", messages=messages, **others)
    return answer.choices[0].message.content or ""


def played(says: Any, program: Any, **changes: Any) -> tuple[list[Sample], Talking, dict[str, float]]:
    """Samples of one episode, the engine, and what is logged of the drawing."""
    engine = Talking(says=says)
    with serving(engine) as url:
        rollout = draw(url, program, **changes)
    return rollout.samples(tokenizer()), engine, account_values(rollout)


def numbered(prompt: str) -> str:
    """Each turn another word."""
    return f"word {prompt.count('<|assistant|>')}"


@pytest.mark.parametrize("stream", [False, True])
def test_a_conversation_is_one_trajectory_of_exactly_the_tokens_that_were_sampled(stream: bool) -> None:
    async def program(task: AgentTask) -> str:
        messages = [user("go")]
        async with client_of(task) as client:
            for reply in ("and?", "more"):
                if stream:
                    chunks = await client.chat.completions.create(
                        model="any", messages=messages, stream=True, stream_options={"include_usage": True}
                    )
                    parts = [c async for c in chunks]
                    text = "".join(c.choices[0].delta.content or "" for c in parts if c.choices)
                    assert parts[-2].choices[0].finish_reason == "stop" and parts[-1].usage is not None
                else:
                    text = await ask(client, messages)
                messages += [assistant(text), user(reply)]
            return await ask(client, messages)

    (sample,), engine, values = played(numbered, program)
    first, second, third = (request["input_ids"] for request in engine.requests)
    assert second[: len(first) + len(engine.answers[0])] == first + engine.answers[0]
    assert third[: len(second) + len(engine.answers[1])] == second + engine.answers[1]
    assert sample.tokens.tolist() == third + engine.answers[2]
    whole = [user("go"), assistant("word 1"), user("and?"), assistant("word 2"), user("more"),
             assistant("word 3")]  # fmt: skip
    assert decode(sample.tokens.tolist()) + " " == render(whole)
    assert counted_text(sample) == ["word 1<|end|>", "word 2<|end|>", "word 3<|end|>"]
    batch = RolloutBatch.pack([sample], temperature=1.0)
    counted = batch.tokens.counted
    assert batch.tokens.engine_log_probs[counted].tolist() == [-n / 8 for n in range(1, counted.sum() + 1)]
    assert set(batch.tokens.policies[counted]) == {0}
    assert set(batch.tokens.policies[~counted]) == {NOT_SAMPLED}
    assert values == {"agent/turns": 3}


def test_tokens_are_kept_where_their_text_would_be_encoded_otherwise() -> None:
    spelled = [*(encode(letter)[0] for letter in QUESTION), END]
    assert encode(QUESTION + "<|end|>") != spelled

    async def program(task: AgentTask) -> str:
        async with client_of(task) as client:
            text = await ask(client, [user("go")])
            # white space at the ends, parts and empty fields are no edits
            again = {
                "role": "assistant",
                "content": [{"type": "text", "text": f" {text}\n"}],
                "refusal": None,
            }
            return await ask(client, [user("go"), again, user("on")])

    (sample,), engine, _ = played(lambda prompt: "end" if "on" in prompt else spelled, program)
    asked = engine.requests[0]["input_ids"] + spelled
    assert engine.requests[1]["input_ids"][: len(asked)] == asked == sample.tokens[: len(asked)].tolist()
    assert len(counted_text(sample)) == 2


def test_a_fork_is_a_trajectory_of_its_own_that_counts_nothing_twice() -> None:
    async def program(task: AgentTask) -> str:
        async with client_of(task) as client:
            first = await ask(client, [user("go")])
            so_far = [user("go"), assistant(first)]
            left = await ask(client, [*so_far, user("left")])
            await ask(client, [*so_far, user("right")])
            return await ask(client, [*so_far, user("left"), assistant(left), user("on")])

    samples, engine, values = played(
        lambda prompt: f"{prompt.split('<|user|>')[-1][:2]}{len(prompt)}", program
    )
    assert [(s.group, s.number, s.branch) for s in samples] == [(0, 0, 0), (0, 0, 1)]
    pieces = [piece for s in samples for piece in counted_text(s)]
    answers = [decode(answer) for answer in engine.answers]
    assert pieces == [answers[0], answers[1], answers[3], answers[2]]
    # the fork was asked with the tokens of before, though they count in the first trajectory
    asked = engine.requests[0]["input_ids"] + engine.answers[0]
    assert engine.requests[2]["input_ids"][: len(asked)] == asked == samples[1].tokens[: len(asked)].tolist()
    assert values == {"agent/turns": 4, "agent/branches": 1}
    assert len({request["sampling_params"]["sampling_seed"] for request in engine.requests}) == 4
    assert rollout_values(samples)["reward"] == 1.0


@pytest.mark.parametrize("at_once", [False, True])
def test_answers_to_the_same_request_are_trajectories_and_one_of_them_goes_on(at_once: bool) -> None:
    async def program(task: AgentTask) -> str:
        async with client_of(task) as client:
            asking = [ask(client, [user("go")]) for _ in range(3)]
            answers = await asyncio.gather(*asking) if at_once else [await each for each in asking]
            return await ask(client, [user("go"), assistant(answers[1]), user("on")])

    numbers = iter(range(9))
    samples, engine, values = played(lambda _: f"try {next(numbers)}", program)
    assert sorted(len(counted_text(s)) for s in samples) == [1, 1, 2]
    assert sum(len(t) for t in engine.answers) == sum(
        g.tokens for s in samples for g in s.segments if g.counted
    )
    assert values == {"agent/turns": 4, "agent/branches": 2}


@pytest.mark.parametrize(
    ("history", "reason"),
    [
        ([user("go"), assistant("another word"), user("on")], "edited_turns"),
        ([user("go"), user("on")], "hidden_turns"),
        ([user("go"), tool("on")], "hidden_turns"),
    ],
)
def test_a_turn_that_the_program_rewrites_is_recorded_and_does_not_count(history: Any, reason: str) -> None:
    async def program(task: AgentTask) -> str:
        async with client_of(task) as client:
            await ask(client, [user("go")])
            return await ask(client, history)

    samples, engine, values = played(numbered, program)
    assert counted_text(samples[0]) == []
    assert samples[0].response_tokens.tolist() == engine.answers[0]
    assert counted_text(samples[1]) == [decode(engine.answers[1])]
    assert decode(engine.requests[1]["input_ids"]) == render(history, add_generation_prompt=True)
    assert values == {"agent/turns": 2, "agent/branches": 1, f"agent/{reason}": 1}


def test_other_tools_and_a_template_that_drops_thoughts_begin_a_trajectory_and_mask_nothing() -> None:
    forgetful = TEMPLATE.replace(
        "{{ m.content }}", "{{ m.content if loop.last or m.role != 'assistant' else m.content[:2] }}"
    )

    for template, arguments in ((forgetful, {}), (TEMPLATE, {"other": 1})):
        made = tokenizer()
        made.chat_template = template
        try:

            async def asking(task: AgentTask, arguments: Any = arguments) -> str:
                async with client_of(task) as client:
                    text = await ask(client, [user("go")])
                    extra = {"chat_template_kwargs": arguments}
                    return await ask(client, [user("go"), assistant(text), user("on")], extra_body=extra)

            samples, engine, values = played(numbered, asking)
        finally:
            made.chat_template = TEMPLATE
        assert [counted_text(s) for s in samples] == [[decode(answer)] for answer in engine.answers]
        assert values == {"agent/turns": 2, "agent/branches": 1}


def test_a_history_that_is_longer_than_a_prompt_counts_as_what_was_inserted() -> None:
    async def program(task: AgentTask) -> str:
        async with client_of(task) as client:
            return await ask(client, [user("a long question")])

    (sample,), engine, _ = played(numbered, program, agent={"max_prompt_tokens": 5})
    assert len(sample.prompt_tokens) == 5
    assert sample.tokens.tolist() == engine.requests[0]["input_ids"] + engine.answers[0]
    assert counted_text(sample) == [decode(engine.answers[0])]


def test_recorded_experts_belong_to_each_trajectorys_last_answer() -> None:
    class Routing(Talking):
        async def generate(self, request: Any) -> Any:
            answer = json.loads((await super().generate(request)).text or "")
            body = await request.json()
            tokens = len(body["input_ids"]) + len(answer["output_ids"]) - 1
            places = np.repeat(np.arange(tokens, dtype=np.int32), 6)
            answer["meta_info"]["routed_experts"] = base64.b64encode(places.tobytes()).decode()
            return web.json_response(answer)

    async def program(task: AgentTask) -> str:
        async with client_of(task) as client:
            await ask(client, [user("go")])
            return await ask(client, [user("other")])

    with serving(Routing(says=numbered)) as url:
        samples = draw(url, program, routing_width=6).samples(tokenizer())
    assert len(samples) == 2
    for sample in samples:
        assert sample.routed_experts is not None
        assert sample.routed_experts[:, 0].tolist() == list(range(len(sample.tokens) - 1))
    RolloutBatch.pack(samples, temperature=1.0).check_routing(6)
