"""The problems of a run, and where it stands in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_pmd.config import ProblemSource, RunConfig
from megatron_pmd.data.demonstrations import that_fit
from megatron_pmd.data.mixture import MixedPrompts, Share, seed_of
from megatron_pmd.data.problems import Problem
from megatron_pmd.data.prompts import PromptOrder, PromptSource, prompt_source, tokenize
from megatron_pmd.data.sources import named, problems_of


@dataclass(frozen=True)
class ProblemSets:
    """What the driver draws problems from."""

    train: PromptOrder
    held_out: list[Problem]
    """For evaluation, the first evaluation.prompts of each source; empty without data.evaluation."""
    supervised: PromptSource | None
    """Of the PTX term; None without one."""

    @classmethod
    def load(cls, config: RunConfig, tokenizer: Any, say: Callable[[str], None]) -> ProblemSets:
        """Read and tokenise all of them; what is too long is dropped and said. Raises DataError."""
        supervised = config.algorithm.objective.supervised or config.warm_start is not None
        ptx, longest = config.supervised_source, config.longest_trained_sample

        def kept(given: ProblemSource, what: str, *, trained_on: bool) -> list[Problem]:
            """trained_on: the answers are responses to learn."""
            what = f"{what} prompts of {given.name}" if given.name else f"{what} prompts"
            problems, limit = problems_of(given), given.max_prompt_tokens
            with named(given):
                result, dropped = tokenize(problems, tokenizer, limit, given.limited_by)
                if dropped:
                    say(f"{dropped} of {len(problems)} {what} are over {limit} tokens: dropped")
                if not trained_on:
                    return result
                fitting = that_fit(result, tokenizer, longest)
            if too_long := len(result) - len(fitting):
                say(
                    f"{too_long} of {len(problems)} {what} have with their answers over {longest} "
                    "tokens, all that a forward pass holds: dropped"
                )
            return fitting

        def train() -> PromptOrder:
            sources = config.problem_sources("train")
            problems = [kept(given, "training", trained_on=supervised) for given in sources]
            if not sources[0].name:
                return prompt_source(problems[0], config.seed, config.data.sampling)
            return MixedPrompts(
                [
                    Share(
                        given.name,
                        given.weight,
                        prompt_source(own, seed_of(config.seed, given.name), config.data.sampling),
                    )
                    for given, own in zip(sources, problems, strict=True)
                ]
            )

        def held_out() -> list[Problem]:
            sources = config.problem_sources("evaluation")
            if sources and config.algorithm.objective.supervised:
                say(
                    "data.evaluation: this run has no engines, and samples no held-out problems; "
                    "`megatron-pmd evaluate` does, of its model"
                )
                return []
            found = [kept(given, "evaluation", trained_on=False) for given in sources]
            return [problem for problems in found for problem in problems[: config.evaluation.prompts]]

        return cls(
            train=train(),
            held_out=held_out(),
            supervised=None
            if ptx is None
            else prompt_source(kept(ptx, "supervised", trained_on=True), config.seed, "uniform"),
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
