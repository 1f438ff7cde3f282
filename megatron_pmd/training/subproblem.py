"""What one iteration fits: its τ, the temperature of its policy, rewards, advantages and objective."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_pmd.algorithm.baselines import advantages
from megatron_pmd.algorithm.losses import Constants, Loss, loss_of
from megatron_pmd.algorithm.mismatch import WEIGHTS
from megatron_pmd.algorithm.schedules import scheduled
from megatron_pmd.algorithm.shaping import length_rewards
from megatron_pmd.batch import RolloutBatch, Sample
from megatron_pmd.config import RunConfig, Schedule
from megatron_pmd.rollout.trajectory import Trajectory


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
        """π is the policy at this temperature, in the engines and in the actor; 1 in supervised training."""
        if self.supervised:
            return 1.0
        return _at(self.config.rollout.temperature, self.config.rollout.temperature_schedule, self.iteration)

    @property
    def loss(self) -> Loss:
        """From the log-probabilities of a micro-batch to its summed loss."""
        objective, mismatch = self.config.algorithm.objective, self.config.algorithm.mismatch
        weight = functools.partial(WEIGHTS[objective.counts][mismatch.weight], **mismatch.bounds)
        return loss_of(objective, Constants(self.tau, self.config.batch.max_response_tokens), weight)

    @property
    def supervised(self) -> bool:
        """Whether the responses are demonstrations: no anchor, no rewards, no engines."""
        return self.config.algorithm.objective.supervised

    def count(self, batch: RolloutBatch, samples: np.ndarray) -> int:
        """What the objective's sum over these samples is divided by: sequences, or counted tokens."""
        if self.config.algorithm.objective.counts == "tokens":
            return int(batch.samples.counted_lengths[samples].sum())
        return len(samples)

    def compute_advantages(self, samples: list[Sample]) -> None:
        """Set every sample's shaped reward and its advantage; whole groups, graded before."""
        groups = [s.group for s in samples]
        truncated = [s.finish_reason == "length" for s in samples]
        lengths = [len(s.response_tokens) for s in samples]
        shaped = self.shaped([s.reward for s in samples], lengths, truncated, groups)
        values = advantages(shaped, groups, baseline=self.config.algorithm.baseline, tau=self.tau)
        values = self.config.algorithm.objective.advantages(values, groups)
        for sample, reward, value in zip(samples, shaped, values, strict=True):
            sample.shaped_reward, sample.advantage = float(reward), float(value)

    def shaped(
        self,
        rewards: Sequence[float],
        lengths: Sequence[int],
        truncated: Sequence[bool],
        groups: Sequence[int],
    ) -> np.ndarray:
        """The graders' rewards with what length and truncation add or take: what is trained on.

        All are [samples]: lengths in response tokens, groups the labels of the samples' prompts.
        """
        settings, values = self.config.reward, np.asarray(rewards, np.float64)
        shaped = values - settings.truncation_penalty * np.asarray(truncated, bool)
        if settings.length is not None and self.iteration >= settings.length.warmup_iterations:
            correct = values >= settings.correct
            shaped = shaped + settings.length.weight * length_rewards(lengths, correct, groups)
        return shaped

    def shaped_group(self, members: Sequence[Trajectory]) -> list[float]:
        """shaped() of one group's graded responses."""
        rewards = self.shaped(
            [member.reward or 0.0 for member in members],
            [member.length for member in members],
            [member.finish_reason == "length" for member in members],
            [0] * len(members),
        )
        return rewards.tolist()


def _at(start: float, schedule: Schedule | None, t: int) -> float:
    if schedule is None:
        return start
    return scheduled(start, schedule.end, schedule.iterations, t, schedule.shape)
