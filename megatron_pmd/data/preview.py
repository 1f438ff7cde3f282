"""What a run would read of a problem file: `megatron-pmd data`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_pmd.config import Data, FileSource, Source
from megatron_pmd.data.problems import Problem
from megatron_pmd.data.prompts import tokenize
from megatron_pmd.data.sources import load_problems


@dataclass(frozen=True)
class Reader:
    """Who would read it: a model's tokenizer, and the run's limit."""

    tokenizer: Any
    max_prompt_tokens: int | None
    """None: nothing is dropped."""


def describe(source: Source, data: Data, reader: Reader | None, first: int) -> Iterator[str]:
    """Lines: how many problems there are, which are dropped and why, token lengths, the first ones in full.

    reader  None: there is no model, so neither lengths nor the chat template's text are known
    first   problems to show in full
    Raises DataError as a run would.
    """
    problems = load_problems(source, data)
    yield f"{_name(source)}: {len(problems):,} problems"
    if reader is None:
        yield "no model is given (--model FOLDER): token lengths and the chat template's words are unknown"
        shown = problems[:first]
    else:
        tokenized, _ = tokenize(problems, reader.tokenizer, sys.maxsize)
        limit = reader.max_prompt_tokens or sys.maxsize
        shown = [problem for problem in tokenized if len(problem.tokens) <= limit]
        yield from _dropped(tokenized, limit)
        yield f"kept: {len(shown):,} problems"
        yield f"tokens of a prompt: {_lengths([len(p.tokens) for p in shown])}"
        answers = [len(reader.tokenizer.encode(p.answer, add_special_tokens=False)) for p in shown]
        yield f"tokens of an answer: {_lengths(answers)}"
    for problem in shown[:first]:
        yield ""
        yield from _in_full(problem, reader)


def _name(source: Source) -> str:
    if not isinstance(source, FileSource):
        return f"reasoning-gym task {source.task}"
    return source.path if isinstance(source.path, str) else " + ".join(source.path)


def _dropped(problems: list[Problem], limit: int) -> Iterator[str]:
    lengths = [len(p.tokens) for p in problems if len(p.tokens) > limit]
    if lengths:
        where = next(p.index for p in problems if len(p.tokens) > limit)
        yield (
            f"dropped: {len(lengths):,} problems over batch.max_prompt_tokens={limit:,} (the longest has "
            f"{max(lengths):,} tokens; the first is problem {where})"
        )
    else:
        yield "dropped: none"


def _lengths(lengths: list[int]) -> str:
    if not lengths:
        return "none"
    middle, high = np.quantile(lengths, [0.5, 0.9], method="higher")
    return f"{min(lengths):,} to {max(lengths):,}; half have at most {middle:,}, nine tenths {high:,}"


def _in_full(problem: Problem, reader: Reader | None) -> Iterator[str]:
    yield f"--- problem {problem.index}, answer {problem.answer!r}"
    if problem.metadata:
        yield f"further columns, for the reward: {', '.join(problem.metadata)}"
    if reader is not None:
        yield reader.tokenizer.decode(problem.tokens)
        return
    for message in problem.messages:
        yield f"{message['role']}: {message['content']}"
