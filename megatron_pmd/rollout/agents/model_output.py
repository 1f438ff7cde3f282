"""From the model's words to what a program gets: thoughts, text and calls of tools.

SGLang's parsers do it, in an engine: their import brings torch and changes transformers, which the process
that drives has to be spared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_pmd.rollout.generate_client import GenerateClient


@dataclass(frozen=True)
class Words:
    """A turn of the model, taken apart."""

    thoughts: str | None
    text: str
    calls: tuple[tuple[str, str], ...]
    """Name and arguments, these as JSON."""


@dataclass(frozen=True)
class OutputReader:
    """Reads a model's turns."""

    tokenizer: Any
    tool_parser: str | None = None
    reasoning_parser: str | None = None
    """SGLang's names; None: there is nothing of the kind in its words."""

    def text(self, tokens: np.ndarray, *, with_tools: bool) -> str:
        """int32 [tokens], decoded; with special tokens where a parser may look for them, as SGLang does."""
        plain = not with_tools and self.reasoning_parser is None
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=plain)
        return text

    async def read(self, text: str, tools: Sequence[dict[str, Any]], client: GenerateClient) -> Words:
        """What only looks like a call stays text. Raises what GenerateClient.ask raises."""
        thoughts = None
        if self.reasoning_parser is not None:
            asked = {"text": text, "reasoning_parser": self.reasoning_parser}
            found = await client.ask("/separate_reasoning", asked)
            thoughts, text = found["reasoning_text"], found["text"] or ""
        if not tools or self.tool_parser is None:
            return Words(thoughts, text, ())
        question = {"text": text, "tools": list(tools), "tool_call_parser": self.tool_parser}
        found = await client.ask("/parse_function_call", question)
        calls = tuple((call["name"] or "", call["parameters"]) for call in found["calls"])
        return Words(thoughts, found["normal_text"] or "" if calls else text, calls)
