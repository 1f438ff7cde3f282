"""An engine that answers in words, and the sampler of a program that talks to it."""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any

from aiohttp import web
from openai import AsyncOpenAI

from megatron_pmd.data.problems import Problem
from megatron_pmd.rollout.agents.model_output import OutputReader
from megatron_pmd.rollout.agents.program import Agent, AgentTask
from megatron_pmd.rollout.groups import RolloutGroups
from recipes.tiny_moe_cpu import make_tokenizer
from tests.rollout.test_sampler import rollout_for, sampler_for
from tools.bench.stub_engine import StubEngine

TEMPLATE = (
    "{% if tools %}<|system|>{{ tools | tojson }}<|end|> {% endif %}"
    "{% for m in messages %}<|{{ 'user' if m.role == 'tool' else m.role }}|>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|end|> "
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CALL = re.compile(r"<tool_call>(.*?)</tool_call>")
END = 0
"""The token <|end|>."""


@functools.cache
def tokenizer() -> Any:
    """transformers' own, of characters; a blank follows what a turn ends with, as in Qwen a line end does."""
    made = make_tokenizer()
    made.chat_template = TEMPLATE
    return made


def encode(text: str) -> list[int]:
    return tokenizer().encode(text, add_special_tokens=False)


def decode(tokens: Any) -> str:
    return tokenizer().decode(tokens)


def render(messages: list[dict[str, Any]], **arguments: Any) -> str:
    return tokenizer().apply_chat_template(messages, tokenize=False, **arguments)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def tool(text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text, "tool_call_id": "call_0"}


@dataclass
class Talking(StubEngine):
    """Says what `says` gives for the text that it is asked with. The n-th token it samples has −n/8."""

    says: Callable[[str], str | list[int]] = lambda prompt: "yes"
    answers: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._places = itertools.count(1)

    async def generate(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.requests.append(body)
        if self.failures:
            self.failures -= 1
            return web.Response(status=503, text="busy")
        said = self.says(decode(body["input_ids"]))
        tokens = [*encode(said), END] if isinstance(said, str) else said
        most = body["sampling_params"]["max_new_tokens"]
        finish = "length" if len(tokens) > most else "stop"
        tokens = tokens[:most]
        self.answers.append(tokens)
        self.decoded_tokens += len(tokens)
        information = {
            "weight_version": self.weight_version,
            "finish_reason": {"type": finish},
            "output_token_logprobs": [[-next(self._places) / 8, token, None] for token in tokens],
        }
        return web.json_response({"output_ids": tokens, "meta_info": information})

    def routes(self, app: web.Application) -> None:
        super().routes(app)
        app.router.add_post("/parse_function_call", self.parse)
        app.router.add_post("/separate_reasoning", self.separate)

    async def parse(self, request: web.Request) -> web.Response:
        """As SGLang answers with its parser `qwen25` (tests/engine/test_engine.py asks a real one)."""
        body = await request.json()
        found = [json.loads(call) for call in CALL.findall(body["text"])] if body["tools"] else []
        calls = [{"tool_index": n, "name": call["name"], "parameters": json.dumps(call["arguments"])}
                 for n, call in enumerate(found)]  # fmt: skip
        text = CALL.sub("", body["text"]) if calls else body["text"]
        return web.json_response({"normal_text": text, "calls": calls})

    async def separate(self, request: web.Request) -> web.Response:
        thoughts, _, text = (await request.json())["text"].rpartition("</think>")
        return web.json_response({"reasoning_text": thoughts.removeprefix("<think>"), "text": text})


def client_of(task: AgentTask) -> Any:
    return AsyncOpenAI(base_url=task.base_url, api_key=task.api_key, max_retries=0)


def problem(index: int = 0) -> Problem:
    return Problem(index, (user("go"),), "yes", tokens=tuple(encode("<|user|>go<|end|> <|assistant|>")))


def draw(
    url: str,
    function: Callable[[AgentTask], Awaitable[Any]],
    *,
    samples_per_prompt: int = 1,
    rollout: RolloutGroups | None = None,
    agent: dict[str, Any] | None = None,
    **changes: Any,
) -> RolloutGroups:
    """A rollout by this program; changes: of the sampler."""
    rollout = rollout or rollout_for(0, problems=[problem()], samples_per_prompt=samples_per_prompt)
    settings: dict[str, Any] = {"timeout_seconds": 120.0, "max_prompt_tokens": 400} | (agent or {})
    made = Agent(function=function, reader=settings.pop("reader", OutputReader(tokenizer())), **settings)
    sampler = sampler_for(url, max_turns=9, **changes)
    replace(sampler, tokenizer=tokenizer(), stop_tokens=[END], function=made).run(rollout)
    return rollout
