"""What a set of graded samples says about a policy: mean@k and pass@k, with confidence intervals."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from megatron_pmd.batch import Sample, first_branches

ALWAYS_1 = {"": 1.0}
"""One source, in which a reward of at least 1 passes."""


@dataclass(frozen=True)
class Score:
    """A mean over prompts with the bounds of its 95 % confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Evaluation:
    """mean_at_k: mean reward of a sample. pass_at_k: share of prompts with a correct sample.

    Of several sources it is over all their prompts, each prompt counting once.
    """

    k: int
    prompts: int
    mean_at_k: Score
    pass_at_k: Score
    response_tokens: float
    truncated_share: float
    reward_errors: int
    sources: dict[str, Evaluation] = field(default_factory=dict)
    """By name; empty where there is only one."""

    def metrics(self) -> dict[str, float]:
        values: dict[str, float] = {
            "k": self.k,
            "prompts": self.prompts,
            "mean_at_k": self.mean_at_k.value,
            "mean_at_k/low": self.mean_at_k.low,
            "mean_at_k/high": self.mean_at_k.high,
            "pass_at_k": self.pass_at_k.value,
            "pass_at_k/low": self.pass_at_k.low,
            "pass_at_k/high": self.pass_at_k.high,
            "response_tokens": self.response_tokens,
            "truncated_share": self.truncated_share,
            "reward_errors": self.reward_errors,
        }
        for name, source in self.sources.items():
            values |= {f"source/{name}/{key}": value for key, value in source.metrics().items()}
        return values


def evaluate(samples: Sequence[Sample], correct: Mapping[str, float] = ALWAYS_1) -> Evaluation:
    """Score samples of k responses to each prompt.

    correct: by source, the least reward that passes.

    Prompts, not samples, are the independent draws.
    """
    found = _estimate(samples, correct)
    names = dict.fromkeys(sample.source for sample in samples if sample.source)
    sources = {name: _estimate([s for s in samples if s.source == name], correct) for name in names}
    return replace(found, sources=sources)


def _estimate(samples: Sequence[Sample], correct: Mapping[str, float]) -> Evaluation:
    rewards: dict[int, list[float]] = defaultdict(list)
    passed: dict[int, bool] = defaultdict(bool)
    responses = first_branches(samples)
    for sample in responses:
        rewards[sample.group].append(sample.reward)
        passed[sample.group] |= sample.reward >= correct[sample.source]
    return Evaluation(
        k=max(map(len, rewards.values())),
        prompts=len(rewards),
        mean_at_k=_mean([float(np.mean(r)) for r in rewards.values()]),
        pass_at_k=_share(list(passed.values())),
        response_tokens=float(np.mean([len(s.response_tokens) for s in samples])),
        truncated_share=float(np.mean([s.finish_reason == "length" for s in samples])),
        reward_errors=sum(s.reward_error is not None for s in responses),
    )


def _mean(per_prompt: list[float]) -> Score:
    """Percentile bootstrap over prompts; no width when all prompts agree or there is only one."""
    from scipy.stats import bootstrap  # half a second of imports that only the driver needs

    value = float(np.mean(per_prompt))
    if len(set(per_prompt)) < 2:
        return Score(value, value, value)
    interval = bootstrap(
        (np.array(per_prompt),), np.mean, method="percentile", n_resamples=2000, rng=np.random.default_rng(0)
    ).confidence_interval
    return Score(value, float(interval.low), float(interval.high))


def _share(passed: list[bool]) -> Score:
    """Wilson's interval of a proportion, which has a width also where every prompt passed, or none."""
    from scipy.stats import binomtest

    interval = binomtest(sum(passed), len(passed)).proportion_ci(method="wilson")
    return Score(float(np.mean(passed)), float(interval.low), float(interval.high))
