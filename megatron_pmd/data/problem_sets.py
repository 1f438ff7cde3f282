"""The problems of a run, and where it stands in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_pmd.config import RunConfig, Sampling, Source
from megatron_pmd.data.demonstrations import that_fit
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
        limit, longest = config.batch.max_prompt_tokens, config.longest_trained_sample

        def kept(source: Source, what: str, *, trained_on: bool) -> list[Problem]:
            """trained_on: the answers are responses to learn."""
            problems = load_problems(source, config.data)
            result, dropped = tokenize(problems, tokenizer, limit)
            if dropped:
                say(f"{dropped} of {len(problems)} {what} prompts are over {limit} tokens: dropped")
            if not trained_on:
                return result
            fitting = that_fit(result, tokenizer, longest)
            if too_long := len(result) - len(fitting):
                say(
                    f"{too_long} of {len(problems)} {what} prompts have with their answers over {longest} "
                    "tokens, all that a forward pass holds: dropped"
                )
            return fitting

        def order(problems: list[Problem], sampling: Sampling) -> PromptSource:
            return prompt_source(problems, config.seed, sampling)

        ptx, evaluation = config.algorithm.ptx, config.data.evaluation
        supervised = config.algorithm.objective.supervised or config.warm_start is not None
        return cls(
            train=order(kept(config.data.train, "training", trained_on=supervised), config.data.sampling),
            held_out=[] if evaluation is None else kept(evaluation, "evaluation", trained_on=False),
            supervised=None
            if ptx is None
            else order(kept(ptx.source, "supervised", trained_on=True), "uniform"),
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
