"""What one iteration fits: its τ, the temperature of its policy, rewards, advantages and objective."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_pmd.algorithm.baselines import advantages, per_standard_deviation
from megatron_pmd.algorithm.losses import OBJECTIVES, TOKEN_OBJECTIVES, Objective
from megatron_pmd.algorithm.mismatch import SEQUENCE_WEIGHTS, TOKEN_WEIGHTS
from megatron_pmd.algorithm.schedules import scheduled
from megatron_pmd.algorithm.shaping import length_rewards
from megatron_pmd.batch import RolloutBatch, Sample
from megatron_pmd.config import Algorithm, RunConfig, Schedule


@dataclass(frozen=True)
class Subproblem:
    """The regression of iteration t; a pure function of the configuration and t, so a resumed run has the
    same."""

    config: RunConfig
    iteration: int

    @property
    def tau(self) -> float:
        """Regularisation strength τ, in reward units."""
        return _at(self.config.algorithm.tau, self.config.algorithm.tau_schedule, self.iteration)

    @property
    def temperature(self) -> float:
        """π is the policy at this temperature, in the engines and in the actor."""
        return _at(self.config.rollout.temperature, self.config.rollout.temperature_schedule, self.iteration)

    @property
    def objective(self) -> Objective:
        """From the log-probabilities of a micro-batch to its summed loss."""
        algorithm = self.config.algorithm
        options = _options(algorithm, self.tau, self.config.batch.max_response_tokens)
        if algorithm.objective != "sft":
            weights = TOKEN_WEIGHTS if algorithm.objective in TOKEN_OBJECTIVES else SEQUENCE_WEIGHTS
            weight = functools.partial(weights[algorithm.mismatch.weight], **algorithm.mismatch.bounds)
            options["mismatch"] = weight
        return functools.partial(OBJECTIVES[algorithm.objective], **options)

    @property
    def supervised(self) -> bool:
        """Whether the responses are demonstrations: no anchor, no rewards, no engines."""
        return self.config.algorithm.objective == "sft"

    def count(self, batch: RolloutBatch, samples: np.ndarray) -> int:
        """What the objective's sum over these samples is divided by: sequences, or counted tokens."""
        if self.config.algorithm.objective in TOKEN_OBJECTIVES:
            return int(batch.counted_lengths[samples].sum())
        return len(samples)

    def grade(self, samples: list[Sample]) -> None:
        """Set every sample's shaped reward and its advantage; whole groups, graded before."""
        shaped = self._shaped(samples)
        groups = [s.group for s in samples]
        values = advantages(shaped, groups, baseline=self.config.algorithm.baseline, tau=self.tau)
        if self.config.algorithm.grpo.divide_by_deviation:
            values = per_standard_deviation(values, groups)
        for sample, reward, value in zip(samples, shaped, values, strict=True):
            sample.shaped_reward, sample.advantage = float(reward), float(value)

    def _shaped(self, samples: list[Sample]) -> np.ndarray:
        """Rewards with what length and truncation add or take."""
        settings = self.config.reward
        rewards = np.array([s.reward for s in samples], np.float64)
        truncated = np.array([s.finish_reason == "length" for s in samples])
        shaped = rewards - settings.truncation_penalty * truncated
        if settings.length is not None and self.iteration >= settings.length.warmup_iterations:
            lengths = [len(s.response_tokens) for s in samples]
            correct, groups = rewards >= settings.correct, [s.group for s in samples]
            shaped = shaped + settings.length.weight * length_rewards(lengths, correct, groups)
        return shaped


def _at(start: float, schedule: Schedule | None, t: int) -> float:
    if schedule is None:
        return start
    return scheduled(start, schedule.end, schedule.iterations, t, schedule.shape)


def _options(algorithm: Algorithm, tau: float, max_response_tokens: int) -> dict[str, Any]:
    """The keyword arguments that the chosen objective takes, without its mismatch weight."""
    normaliser = dict(normaliser=algorithm.normaliser, max_response_tokens=max_response_tokens)
    match algorithm.objective:
        case "pmd":
            return dict(tau=tau, scaling=algorithm.scaling, **normaliser)
        case "reinforce":
            return normaliser
        case "pmd_token":
            return dict(tau=tau, **algorithm.pmd_token.model_dump())
        case "grpo":
            return algorithm.grpo.model_dump(exclude={"divide_by_deviation"})
        case "gspo":
            return algorithm.gspo.model_dump()
        case "cispo":
            return algorithm.cispo.model_dump()
        case "sft":
            return {}
