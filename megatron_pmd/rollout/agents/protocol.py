"""OpenAI's chat completions: what a program may ask for, and the form of what it gets."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from megatron_pmd.plugins import did_you_mean
from megatron_pmd.rollout.agents.model_output import Words

MODEL = "policy"
"""The model's name in answers; a program may ask for any."""
OF_THE_RUN = ("temperature", "top_p", "top_k", "min_p", "seed")
"""Whatever a program asks for, the policy that is trained is the run's: its own settings are used."""
WITHOUT_EFFECT = ("model", "user", "metadata", "store", "service_tier", "parallel_tool_calls",
                  "reasoning_effort", "safety_identifier", "prompt_cache_key")  # fmt: skip
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "echo": (False,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none"),
}
"""Parameters that may be given if they change nothing: else the samples would be of another policy."""
READ = ("messages", "tools", "max_tokens", "max_completion_tokens", "stop", "stream", "stream_options",
        "chat_template_kwargs")  # fmt: skip
KNOWN = (*READ, *NEUTRAL, *OF_THE_RUN, *WITHOUT_EFFECT)
MESSAGE_KEYS = ("role", "content", "tool_calls", "tool_call_id", "name", "reasoning_content")
"""What a chat template may look at."""


class RequestError(Exception):
    """A request that is not answered; the program gets it in OpenAI's form."""

    def __init__(self, message: str, *, status: int = 400, code: str = "invalid_request") -> None:
        super().__init__(message)
        self.status, self.code = status, code

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": None, "code": self.code}}


@dataclass(frozen=True)
class Message:
    """A chat message as a template is given it."""

    fields: Mapping[str, Any]

    @property
    def role(self) -> str:
        return str(self.fields["role"])

    @cached_property
    def key(self) -> tuple[Any, ...]:
        """Equal for messages that say the same.

        White space at the ends, the spelling of JSON arguments, the names of an assistant's calls and its
        thoughts are left out: programs change the first three in passing, and are not to send the last.
        """
        fields = self.fields
        calls = tuple(
            (call["function"]["name"], json.dumps(call["function"]["arguments"], sort_keys=True))
            for call in fields.get("tool_calls", ())
        )
        return self.role, fields["content"].strip(), calls, fields.get("tool_call_id")


@dataclass(frozen=True)
class ChatRequest:
    """What a program asks for, as far as it has a choice."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False
    template_arguments: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, body: Any) -> ChatRequest:
        """From a request's JSON. RequestError for one that is wrong, or asks for what there is not."""
        if not isinstance(body, dict):
            raise RequestError("the body is not a JSON object")
        given = {name: value for name, value in body.items() if value is not None}
        _refuse_others(given)
        messages = given.get("messages")
        if not isinstance(messages, list) or not messages:
            raise RequestError("messages: a list with at least one message is expected")
        options = _of_type(given, "stream_options", dict, {})
        tools = () if given.get("tool_choice") == "none" else tuple(map(_tool, given.get("tools") or ()))
        return cls(
            messages=tuple(_message(message, number) for number, message in enumerate(messages)),
            tools=tools,
            max_tokens=_max_tokens(given),
            stop=_stops(given.get("stop", [])),
            stream=_of_type(given, "stream", bool, False),
            include_usage=bool(options.get("include_usage")),
            template_arguments=_of_type(given, "chat_template_kwargs", dict, {}),
        )


def _refuse_others(given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        if name in NEUTRAL and value not in NEUTRAL[name]:
            usual = " or ".join(json.dumps(each) for each in NEUTRAL[name])
            raise RequestError(
                f"{name}={json.dumps(value)[:100]} is not possible here: the samples would not be the "
                f"trained policy's; leave it out or set it to {usual}",
                code="unsupported_value",
            )
        if name not in KNOWN:
            raise RequestError(
                f"{name} is no parameter of this endpoint{did_you_mean(name, KNOWN)}",
                code="unknown_parameter",
            )


def _of_type(given: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    value = given.get(name, default)
    if not isinstance(value, kind):
        raise RequestError(f"{name}={json.dumps(value)[:100]}: a value of type {kind.__name__} is expected")
    return value


def _max_tokens(given: Mapping[str, Any]) -> int | None:
    for name in ("max_completion_tokens", "max_tokens"):
        if name in given:
            value = given[name]
            if type(value) is not int or value < 1:
                raise RequestError(f"{name}={value!r}: a whole number from 1 is expected")
            return value
    return None


def _stops(given: Any) -> tuple[str, ...]:
    stops = [given] if isinstance(given, str) else given
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise RequestError("stop: a text or a list of texts is expected")
    return tuple(stops)


def _tool(tool: Any) -> dict[str, Any]:
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RequestError('tools: {"type": "function", "function": {"name": …, …}} is expected of each')
    return tool


def _message(message: Any, number: int) -> Message:
    where = f"messages[{number}]"
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise RequestError(f"{where}: an object with a role is expected")
    fields = {key: message[key] for key in MESSAGE_KEYS if message.get(key) is not None}
    fields["content"] = _text(message.get("content"), where)
    if calls := fields.pop("tool_calls", None):
        try:
            fields["tool_calls"] = [_call(call) for call in calls]
        except (TypeError, KeyError):
            raise RequestError(
                f"{where}.tool_calls: a list of calls with function.name and function.arguments is expected"
            ) from None
    return Message(fields)


def _text(content: Any, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list) and all(isinstance(part, dict) and "text" in part for part in content):
        return "".join(str(part["text"]) for part in content)
    raise RequestError(f"{where}.content: a text or a list of parts with a text is expected")


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    """With arguments as templates take them: an object where the text is JSON of one."""
    name, arguments = call["function"]["name"], call["function"]["arguments"]
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except ValueError:
            parsed = None
        arguments = parsed if isinstance(parsed, dict) else arguments
    function = {"name": name, "arguments": arguments}
    return {"id": call.get("id"), "type": "function", "function": function}


@dataclass(frozen=True)
class ChatAnswer:
    """The model's turn, as the program gets it."""

    name: str
    words: Words
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int

    @property
    def message(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": self.words.text or None}
        if self.words.thoughts:
            message["reasoning_content"] = self.words.thoughts
        if self.words.calls:
            message["tool_calls"] = [
                {"id": f"call_{self.name}_{n}", "type": "function", "function": {"name": f, "arguments": a}}
                for n, (f, a) in enumerate(self.words.calls)
            ]
        return message

    @property
    def usage(self) -> dict[str, int]:
        made, asked = self.completion_tokens, self.prompt_tokens
        return {"prompt_tokens": asked, "completion_tokens": made, "total_tokens": asked + made}

    def body(self) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "message": self.message, "logprobs": None}
        choice["finish_reason"] = self.finish_reason
        return self._envelope("chat.completion") | {"choices": [choice], "usage": self.usage}

    def events(self, *, include_usage: bool) -> Iterator[bytes]:
        """The same as server-sent events: the answer is there when the first is sent."""
        message = self.message
        deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
        for key in ("reasoning_content", "content"):
            deltas += [{key: message[key]}] if message.get(key) else []
        for index, call in enumerate(message.get("tool_calls", ())):
            deltas.append({"tool_calls": [{"index": index, **call}]})
        chunks: list[dict[str, Any]] = [{"index": 0, "delta": d, "finish_reason": None} for d in deltas]
        chunks.append({"index": 0, "delta": {}, "finish_reason": self.finish_reason})
        for chunk in chunks:
            yield self._event({"choices": [chunk]})
        if include_usage:
            yield self._event({"choices": [], "usage": self.usage})
        yield b"data: [DONE]\n\n"

    def _event(self, content: dict[str, Any]) -> bytes:
        return b"data: %s\n\n" % json.dumps(self._envelope("chat.completion.chunk") | content).encode()

    def _envelope(self, kind: str) -> dict[str, Any]:
        return dict(id=f"chatcmpl-{self.name}", object=kind, created=int(time.time()), model=MODEL)
