"""Messages as text, by the model's chat template, so that tokens of earlier turns can stay as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_pmd.rollout.agents.protocol import Message, RequestError

WORDS = "assistant-words-6f1d"


class Renderer:
    """One conversation head: the chat template with its tools and arguments."""

    def __init__(self, tokenizer: Any, tools: Sequence[dict[str, Any]], arguments: dict[str, Any]) -> None:
        self._tokenizer, self._arguments = tokenizer, dict(arguments)
        if tools:
            self._arguments["tools"] = list(tools)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of all messages, ready for the model's turn."""
        return self._encode(self._text([m.fields for m in messages], open_turn=True))

    def continuation(self, messages: Sequence[Message], kept: int, last: int | None) -> list[int] | None:
        """Tokens behind the model's turn that is messages[kept - 1], up to where its next turn begins.

        last: the last token of that turn. What the template writes to end a turn is added where the model
        has not sampled it. None: the template writes the first `kept` messages otherwise where others follow.
        """
        whole = self._text([m.fields for m in messages], open_turn=True)
        before = self._text([m.fields for m in messages[:kept]], open_turn=False)
        if not whole.startswith(before):
            return None
        tokens = self._encode(self._turn_end() + whole[len(before) :])
        return tokens[1:] if tokens and tokens[0] == last else tokens

    def _turn_end(self) -> str:
        """What the template writes behind an assistant's words."""
        rendered = self._text(
            [{"role": "user", "content": "?"}, {"role": "assistant", "content": WORDS}], open_turn=False
        )
        _, found, after = rendered.partition(WORDS)
        if not found:
            raise RequestError("the chat template drops an assistant's words", code="chat_template")
        return after

    def _text(self, messages: Sequence[Any], *, open_turn: bool) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                add_generation_prompt=open_turn,
                tokenize=False,
                **self._arguments,
            )
        except Exception as error:  # jinja's, or whatever the template's own code leads to
            roles = ", ".join(str(message["role"]) for message in messages)
            raise RequestError(
                f"the chat template refuses the messages ({roles}): {error}", code="chat_template"
            ) from error
        return text

    def _encode(self, text: str) -> list[int]:
        tokens: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return tokens
