"""What a run would read of a problem file: `megatron-pmd data`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from megatron_pmd.config import ProblemSource, ReasoningGymSource, Source, VerifiersSource
from megatron_pmd.data.problems import Problem
from megatron_pmd.data.prompts import tokenize
from megatron_pmd.data.sources import named, problems_of


def headline(given: ProblemSource, others: Sequence[ProblemSource]) -> str:
    """The setting that it stands under; of a mixture also its name, its share, and what it has of its own.

    others: all sources of the run.
    """
    if not given.name:
        return given.key
    said = [f"{given.key}: {given.name}"]
    stage = given.key.rpartition(".")[0]
    if stage == "data.train":
        weights = sum(other.weight for other in others if other.key.startswith(stage))
        said.append(f"{given.weight / weights:.1%} of the prompts")
    said.append(f"reward {given.reward.name}")
    if given.tau is not None:
        said.append(f"τ {given.tau:g}")
    if given.max_response_tokens is not None:
        said.append(f"responses of at most {given.max_response_tokens:,} tokens")
    return ", ".join(said)


def describe(given: ProblemSource, tokenizer: Any, first: int) -> Iterator[str]:
    """Lines: how many problems there are, which are dropped and why, token lengths, the first ones in full.

    tokenizer  of the model that would read them; None: neither lengths nor the chat template's text are known
    first      problems to show in full
    Raises DataError as a run would.
    """
    problems = problems_of(given)
    yield f"{_name(given.source)}: {len(problems):,} problems"
    if tokenizer is None:
        yield "no model is given (--model FOLDER): token lengths and the chat template's words are unknown"
        shown = problems[:first]
    else:
        with named(given):
            tokenized, _ = tokenize(problems, tokenizer, sys.maxsize)
        limit = given.max_prompt_tokens
        shown = [problem for problem in tokenized if len(problem.tokens) <= limit]
        yield from _dropped(tokenized, limit, given.limited_by)
        yield f"kept: {len(shown):,} problems"
        yield f"tokens of a prompt: {_lengths([len(p.tokens) for p in shown])}"
        answers = [len(tokenizer.encode(p.answer, add_special_tokens=False)) for p in shown]
        yield f"tokens of an answer: {_lengths(answers)}"
    for problem in shown[:first]:
        yield ""
        yield from _in_full(problem, tokenizer)


def _name(source: Source) -> str:
    if isinstance(source, ReasoningGymSource):
        return f"reasoning-gym task {source.task}"
    if isinstance(source, VerifiersSource):
        return f"environment {source.taskset}"
    return source.path if isinstance(source.path, str) else " + ".join(source.path)


def _dropped(problems: list[Problem], limit: int, setting: str) -> Iterator[str]:
    lengths = [len(p.tokens) for p in problems if len(p.tokens) > limit]
    if lengths:
        where = next(p.index for p in problems if len(p.tokens) > limit)
        yield (
            f"dropped: {len(lengths):,} problems over {setting}={limit:,} (the longest has "
            f"{max(lengths):,} tokens; the first is problem {where})"
        )
    else:
        yield "dropped: none"


def _lengths(lengths: list[int]) -> str:
    if not lengths:
        return "none"
    middle, high = np.quantile(lengths, [0.5, 0.9], method="higher")
    return f"{min(lengths):,} to {max(lengths):,}; half have at most {middle:,}, nine tenths {high:,}"


def _in_full(problem: Problem, tokenizer: Any) -> Iterator[str]:
    yield f"--- problem {problem.index}, answer {problem.answer!r}"
    if problem.metadata:
        yield f"further columns, for the reward: {', '.join(problem.metadata)}"
    if tokenizer is not None:
        yield tokenizer.decode(problem.tokens)
        return
    for message in problem.messages:
        yield f"{message['role']}: {message['content']}"
