"""From the model's words to what a program gets: thoughts, text and calls of tools, by SGLang's parsers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_pmd.errors import ConfigError
from megatron_pmd.plugins import did_you_mean


class OutputReader:
    """Reads a model's turns."""

    def __init__(self, tool_parser: str | None, reasoning_parser: str | None, tokenizer: Any) -> None:
        """ConfigError for a parser that SGLang has not."""
        self._tool_parser, self._reasoning_parser = tool_parser, reasoning_parser
        self._tokenizer = tokenizer
        # to import SGLang takes seconds: only where a parser is asked for
        if tool_parser is not None:
            from sglang.srt.function_call.parser_names import TOOL_CALL_PARSER_NAMES

            _known(tool_parser, "tool_parser", TOOL_CALL_PARSER_NAMES)
        if reasoning_parser is not None:
            from sglang.srt.parser.reasoning_parser_names import REASONING_PARSER_NAMES

            _known(reasoning_parser, "reasoning_parser", REASONING_PARSER_NAMES)

    @property
    def finds_calls(self) -> bool:
        return self._tool_parser is not None

    def text(self, tokens: Sequence[int], *, with_tools: bool) -> str:
        """Decoded; with special tokens where a parser may look for them, as SGLang does."""
        plain = not with_tools and self._reasoning_parser is None
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=plain)
        return text

    def read(
        self, text: str, tools: Sequence[dict[str, Any]]
    ) -> tuple[str | None, str, tuple[tuple[str, str], ...]]:
        """(thoughts, text, calls as name and JSON arguments). What only looks like a call stays text."""
        thoughts = None
        if self._reasoning_parser is not None:
            from sglang.srt.parser.reasoning_parser import ReasoningParser

            parser = ReasoningParser(
                self._reasoning_parser, stream_reasoning=False, tool_call_parser_active=bool(tools)
            )
            thoughts, text = parser.parse_non_stream(text)
        if not tools or self._tool_parser is None:
            return thoughts, text or "", ()
        from sglang.srt.entrypoints.openai.protocol import Tool
        from sglang.srt.function_call.function_call_parser import FunctionCallParser

        calls_in = FunctionCallParser([Tool(**tool) for tool in tools], self._tool_parser, self._tokenizer)
        try:
            rest, calls = calls_in.parse_non_stream(text or "")
        except Exception:  # a model writes anything, and SGLang's own server answers with the text then
            return thoughts, text or "", ()
        return thoughts, rest if calls else text or "", tuple((c.name or "", c.parameters) for c in calls)


def _known(name: str, setting: str, names: Sequence[str]) -> None:
    if name not in names:
        raise ConfigError(
            f"rollout.agent.{setting}={name!r} is no parser of SGLang{did_you_mean(name, names)}; use "
            f"{', '.join(sorted(names))}"
        )
