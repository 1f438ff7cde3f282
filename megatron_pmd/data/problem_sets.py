"""The problems of a run, and where it stands in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_pmd.config import RunConfig, Sampling, Source
from megatron_pmd.data.problems import Problem
from megatron_pmd.data.prompts import PromptSource, prompt_source, tokenize
from megatron_pmd.data.sources import load_problems


@dataclass(frozen=True)
class ProblemSets:
    """What the driver draws problems from."""

    train: PromptSource
    held_out: list[Problem]
    """For evaluation; empty without data.evaluation."""
    supervised: PromptSource | None
    """Of the PTX term; None without one."""

    @classmethod
    def load(cls, config: RunConfig, tokenizer: Any, say: Callable[[str], None]) -> ProblemSets:
        """Read and tokenise all of them; what is too long is dropped and said. Raises DataError."""

        def kept(source: Source, what: str) -> list[Problem]:
            problems = load_problems(source, config.data)
            result, dropped = tokenize(problems, tokenizer, config.batch.max_prompt_tokens)
            if dropped:
                limit = config.batch.max_prompt_tokens
                say(f"{dropped} of {len(problems)} {what} prompts are over {limit} tokens: dropped")
            return result

        def order(problems: list[Problem], sampling: Sampling) -> PromptSource:
            return prompt_source(problems, config.seed, sampling)

        ptx, evaluation = config.algorithm.ptx, config.data.evaluation
        return cls(
            train=order(kept(config.data.train, "training"), config.data.sampling),
            held_out=[] if evaluation is None else kept(evaluation, "evaluation"),
            supervised=None if ptx is None else order(kept(ptx.source, "supervised"), "uniform"),
        )

    def state(self) -> dict[str, Any]:
        """Where the run stands, in JSON values."""
        return {
            "prompts": self.train.state(),
            "supervised": self.supervised.state() if self.supervised else None,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. DataError if it is of other problems."""
        self.train.load_state(state["prompts"])
        if self.supervised:
            self.supervised.load_state(state["supervised"])
