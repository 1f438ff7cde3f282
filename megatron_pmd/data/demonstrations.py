"""Supervised examples: the problems' own answers in the place of sampled responses."""

from __future__ import annotations

from typing import Any

import numpy as np

from megatron_pmd.batch import NOT_SAMPLED, Sample, Segment
from megatron_pmd.data.problems import Problem


def demonstrations(problems: list[Problem], tokenizer: Any) -> list[Sample]:
    """One sample a problem, its response the answer and the end-of-sequence token."""
    samples = []
    for group, problem in enumerate(problems):
        answer = tokenizer.encode(problem.answer, add_special_tokens=False)
        response = np.array([*answer, tokenizer.eos_token_id], np.int32)
        samples.append(
            Sample(
                group=group,
                number=0,
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
