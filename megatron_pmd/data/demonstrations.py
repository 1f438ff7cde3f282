"""Supervised examples: the problems' own answers in the place of sampled responses."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_pmd.batch import NOT_SAMPLED, Sample, Segment
from megatron_pmd.data.problems import Problem
from megatron_pmd.errors import DataError


def answer_tokens(problem: Problem, tokenizer: Any) -> list[int]:
    """The problem's answer as a response: with the end-of-sequence token. DataError without one."""
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"the tokenizer of {getattr(tokenizer, 'name_or_path', '') or 'this model'} has no "
            "end-of-sequence token, which ends an answer that is learned: set eos_token in its "
            "tokenizer_config.json"
        )
    return [*tokenizer.encode(problem.answer, add_special_tokens=False), tokenizer.eos_token_id]


def that_fit(problems: list[Problem], tokenizer: Any, max_tokens: int) -> list[Problem]:
    """The problems whose prompt and answer together have at most max_tokens. DataError if none has."""
    lengths = [len(problem.tokens) + len(answer_tokens(problem, tokenizer)) for problem in problems]
    kept = [problem for problem, length in zip(problems, lengths, strict=True) if length <= max_tokens]
    if not kept:
        raise DataError(
            f"all {len(problems)} problems are longer with their answers than the {max_tokens} tokens that "
            f"a forward pass holds; the shortest has {min(lengths)}: raise batch.max_tokens_per_microbatch"
        )
    return kept


def demonstrations(problems: list[Problem], tokenizer: Any) -> list[Sample]:
    """One sample a problem, its response the answer and the end-of-sequence token."""
    samples = []
    for group, problem in enumerate(problems):
        response = np.array(answer_tokens(problem, tokenizer), np.int32)
        samples.append(
            Sample(
                group=group,
                number=0,
                source=problem.source,
                problem=problem.index,
                prompt=tokenizer.decode(problem.tokens),
                response=problem.answer,
                answer=problem.answer,
                prompt_tokens=np.array(problem.tokens, np.int32),
                response_tokens=response,
                engine_log_probs=np.zeros(len(response), np.float32),
                finish_reason="stop",
                weight_version=NOT_SAMPLED,
                seed=0,
                segments=[Segment(len(response), NOT_SAMPLED)],
            )
        )
    return samples
