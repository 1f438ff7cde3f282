"""Responses of several turns: what the engine is asked, and how a stopped one goes on."""

from __future__ import annotations

import base64
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from megatron_pmd.batch import NOT_SAMPLED, RolloutBatch
from megatron_pmd.config import PartialRollouts
from megatron_pmd.errors import RolloutError
from megatron_pmd.rollout.episode import Episode, message_text
from megatron_pmd.rollout.groups import Group
from megatron_pmd.rollout.metrics import rollout_values
from tests.rollout.test_sampler import Numbers, problem, rollout_for, sampler_for
from tools.bench.stub_engine import StubEngine, serving


class Turns(StubEngine):
    """Each turn is 100 + 10 x turn + position, of four tokens; a turn begins behind an inserted 50."""

    def length(self, seed: int) -> int:
        return 10_000

    async def generate(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.requests.append(body)
        ids = body["input_ids"]
        turn = ids.count(50)
        since = ids[::-1].index(50) if turn else len(ids) - self.prompt_tokens
        wanted = min(4 - since, body["sampling_params"]["max_new_tokens"])
        made, aborted = await self._decode(wanted)
        tokens = [100 + 10 * turn + since + i for i in range(made)]
        self.decoded_tokens += made
        finish = "abort" if aborted else "stop" if since + made == 4 else "length"
        information = {
            "weight_version": self.weight_version,
            "finish_reason": {"type": finish},
            "output_token_logprobs": [[-1.0, token, None] for token in tokens],
        }
        return web.json_response({"output_ids": tokens, "meta_info": information})


async def three_turns(episode: Episode) -> str:
    for number in range(2):
        await episode.generate()
        await episode.insert(f"{7 + number} 50")
    return (await episode.generate()).text


WHOLE = [100, 101, 102, 103, 7, 50, 110, 111, 112, 113, 8, 50, 120, 121, 122, 123]


def test_the_engine_is_asked_with_its_own_tokens_and_inserted_ones_do_not_count():
    engine = Turns()
    graded = []

    def score(text: str, _: object) -> float:
        graded.append(text)
        return 1.0

    with serving(engine) as url:
        rollout = rollout_for(1, samples_per_prompt=1)
        sampler_for(url, score, function=three_turns, max_turns=3).run(rollout)
    sample = rollout.samples(Numbers())[0]
    assert sample.response_tokens.tolist() == WHOLE
    assert [request["input_ids"] for request in engine.requests] == [
        [1, 2],
        [1, 2, *WHOLE[:6]],
        [1, 2, *WHOLE[:12]],
    ]
    assert graded == ["120 121 122 123"]
    assert sample.response == Numbers().decode(WHOLE)
    batch = RolloutBatch.pack([sample], temperature=1.0)
    inserted = [token in (7, 8, 50) for token in WHOLE]
    assert batch.tokens.counted[2:].tolist() == [not i for i in inserted]
    assert (batch.tokens.policies[2:] == NOT_SAMPLED).tolist() == inserted
    assert rollout_values([sample])["rollout/inserted_share"] == 4 / 16


def test_no_turn_follows_the_last_that_is_allowed_or_has_room():
    async def greedy(episode: Episode) -> str:
        while episode.can_go_on:
            await episode.generate()
            await episode.insert("7 50")
        last = await episode.generate()
        assert (last.tokens, last.finish) == ([], "length")
        return ""

    cases: list[tuple[dict[str, Any], list[int]]] = [
        ({"max_turns": 2}, WHOLE[:10]),
        ({"max_turns": 9, "max_response_tokens": 5}, WHOLE[:4]),
        ({"max_turns": 9, "max_response_tokens": 8}, WHOLE[:8]),
    ]
    for limits, expected in cases:
        with serving(Turns()) as url:
            rollout = rollout_for(1, samples_per_prompt=1)
            sampler_for(url, function=greedy, **limits).run(rollout)
        sample = rollout.samples(Numbers())[0]
        assert sample.response_tokens.tolist() == expected
        assert sample.finish_reason == ("stop" if limits["max_turns"] == 2 else "length")


def test_a_stopped_response_goes_on_without_asking_again_or_running_a_tool_again():
    """Problem 0 takes twelve sampled tokens and gets five an iteration; the others take four."""
    calls: list[str] = []

    async def tool() -> str:
        calls.append("run")
        return "7 50"

    async def function(episode: Episode) -> str:
        answer = await episode.generate()
        if episode.problem.index == 0:
            await episode.insert(tool)
            await episode.generate()
            await episode.insert("8 50")
            answer = await episode.generate()
        return answer.text

    engine = Turns()
    carried: list[Group] = []
    with serving(engine) as url:
        for t in range(3):
            engine.weight_version = str(t)
            problems = [problem(i) for i in ([0, 1] if t == 0 else [1 + t])]
            rollout = rollout_for(
                0, problems=problems, samples_per_prompt=1, iteration=t, weight_version=t, wanted=2,
                groups_per_step=1, partial=PartialRollouts(max_new_tokens=5), carried_over=carried,
            )  # fmt: skip
            sampler_for(url, function=function, max_turns=3).run(rollout)
            carried = rollout.left_over
    assert calls == ["run"]
    assert engine.decoded_tokens == 12 + 3 * 4
    assert not carried
    sample = rollout.samples(Numbers())[0]
    assert sample.response_tokens.tolist() == WHOLE
    origins = [(g.tokens, g.weight_version) for g in sample.segments]
    assert origins == [(4, 0), (2, -1), (1, 0), (3, 1), (2, -1), (2, 1), (2, 2)]


def test_a_function_that_does_not_repeat_itself_is_refused():
    asked = []

    async def forgetful(episode: Episode) -> str:
        asked.append(1)
        if len(asked) > 1:
            await episode.insert("50")
        return (await episode.generate()).text

    engine = Turns()
    with serving(engine) as url:
        rollout = rollout_for(1, samples_per_prompt=1, partial=PartialRollouts(max_new_tokens=3))
        with pytest.raises(RolloutError, match="did not repeat itself on problem 0"):
            sampler_for(url, function=forgetful).run(rollout)


def test_a_function_that_asks_nothing_or_returns_no_text_is_refused():
    async def silent(episode: Episode) -> str:
        return "42"

    async def wrong(episode: Episode) -> Any:
        return await episode.generate()

    with serving(StubEngine()) as url:
        for function, said in [
            (silent, "made 0 turns and returned a str"),
            (wrong, "1 turns and returned a A"),
        ]:
            with pytest.raises(RolloutError, match=said):
                sampler_for(url, function=function).run(rollout_for(1))


# Chat messages


class ChatTokenizer(Numbers):
    """Words are tokens; the template of ChatML, whose turns end with a token of their own."""

    WORDS = ["<|im_end|>", "\n", "<|im_start|>", "user", "assistant", "tool", "hello"]

    def apply_chat_template(self, messages: Any, *, add_generation_prompt: bool, tokenize: bool) -> str:
        text = "".join(f"<|im_start|> {m['role']} \n {m['content']} <|im_end|> \n " for m in messages)
        return text + ("<|im_start|> assistant \n" if add_generation_prompt else "")

    def encode(self, text: str, **_: Any) -> list[int]:
        return [900 + self.WORDS.index(word) for word in text.split(" ") if word]


def test_a_message_is_what_the_template_writes_behind_the_assistants_words():
    text = message_text(ChatTokenizer(), "tool", "hello")
    assert text == " <|im_end|> \n <|im_start|> tool \n hello <|im_end|> \n <|im_start|> assistant \n"


def test_a_turn_that_ended_itself_is_not_ended_twice():
    async def chat(episode: Episode) -> str:
        await episode.generate()
        await episode.insert_message("user", "hello")
        return (await episode.generate()).text

    for last, first in [(900, 901), (5, 900)]:
        engine = Turns()
        engine.generate = answering([104, last], [104])  # type: ignore[method-assign]
        with serving(engine) as url:
            rollout = rollout_for(1, samples_per_prompt=1)
            replace(sampler_for(url, function=chat, max_turns=2), tokenizer=ChatTokenizer()).run(rollout)
        response = rollout.samples(ChatTokenizer())[0].response_tokens.tolist()
        assert response[:3] == [104, last, first]
        assert response.count(900) == 2  # the turn's own end, and the message's


def test_an_inserted_message_is_written_with_the_problems_template_arguments():
    class Thinking(ChatTokenizer):
        def apply_chat_template(self, messages: Any, *, enable_thinking: bool = True, **others: Any) -> str:
            return super().apply_chat_template(messages, **others) + " hello" * (not enable_thinking)

    async def chat(episode: Episode) -> str:
        await episode.generate()
        await episode.insert_message("user", "hello")
        return (await episode.generate()).text

    engine = Turns()
    engine.generate = answering([104], [104])  # type: ignore[method-assign]
    silent = replace(problem(0), template_arguments={"enable_thinking": False})
    with serving(engine) as url:
        rollout = rollout_for(1, samples_per_prompt=1, problems=[silent])
        replace(sampler_for(url, function=chat, max_turns=2), tokenizer=Thinking()).run(rollout)
    assert rollout.samples(Thinking())[0].response_tokens.tolist()[-2:] == [906, 104]


def answering(*answers: list[int]) -> Any:
    """A stub engine's generate: these answers, one after another."""
    waiting = iter(answers)

    async def generate(request: Any) -> web.Response:
        tokens = next(waiting)
        information = {
            "weight_version": "0",
            "finish_reason": {"type": "stop"},
            "output_token_logprobs": [[-1.0, token, None] for token in tokens],
        }
        return web.json_response({"output_ids": tokens, "meta_info": information})

    return generate


def test_a_template_that_refuses_or_forgets_is_named():
    class Refusing(ChatTokenizer):
        def apply_chat_template(self, messages: Any, **_: Any) -> str:
            raise ValueError("only user and assistant roles")

    class Forgetting(ChatTokenizer):
        def apply_chat_template(self, messages: Any, **_: Any) -> str:
            return "user: " + messages[-1]["content"]

    with pytest.raises(RolloutError, match="refuses a message of role 'tool': only user"):
        message_text(Refusing(), "tool", "1")
    with pytest.raises(RolloutError, match="drops an assistant's words"):
        message_text(Forgetting(), "user", "1")


def test_recorded_experts_are_the_last_answers_about_the_whole_response():
    """Three turns of one, two and one token behind a prompt of two; 3 layers of top 2, the token's place."""
    engine = StubEngine()
    answers = iter([[4], [5, 6], [7]])

    async def generate(request: web.Request) -> web.Response:
        body = await request.json()
        assert body["return_routed_experts"]
        tokens = next(answers)
        places = np.arange(len(body["input_ids"]) + len(tokens) - 1, dtype=np.int32)
        information = {
            "weight_version": "0",
            "finish_reason": {"type": "stop"},
            "output_token_logprobs": [[-1.0, token, None] for token in tokens],
            "routed_experts": base64.b64encode(np.repeat(places, 6).tobytes()).decode(),
        }
        return web.json_response({"output_ids": tokens, "meta_info": information})

    engine.generate = generate  # type: ignore[method-assign]
    with serving(engine) as url:
        rollout = rollout_for(1, samples_per_prompt=1)
        sampler_for(url, function=three_turns, max_turns=3, routing_width=6).run(rollout)
    batch = RolloutBatch.pack(rollout.samples(Numbers()), temperature=1.0)
    assert batch.tokens.ids.tolist() == [1, 2, 4, 7, 50, 5, 6, 8, 50, 7]
    batch.check_routing(6)
    assert batch.tokens.routed_experts is not None
    assert batch.tokens.routed_experts[:, 0].tolist() == [*range(9), 8]
