"""What one iteration fits: its τ, the temperature of its policy, rewards, advantages and objective."""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from megatron_pmd.algorithm.baselines import advantages
from megatron_pmd.algorithm.losses import Constants, Loss, loss_of
from megatron_pmd.algorithm.mismatch import WEIGHTS
from megatron_pmd.algorithm.schedules import scheduled
from megatron_pmd.algorithm.shaping import length_rewards
from megatron_pmd.batch import CUT, RolloutBatch, Sample, SampleColumns, by_response
from megatron_pmd.config import ProblemSource, RunConfig, Schedule
from megatron_pmd.errors import DataError
from megatron_pmd.rollout.trajectory import Trajectory


@dataclass(frozen=True)
class Subproblem:
    """The regression of iteration t; a pure function of the configuration and t, so a resumed run has the
    same."""

    config: RunConfig
    iteration: int

    @property
    def tau(self) -> float:
        """Regularisation strength τ, in reward units, of every source that has none of its own."""
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
        return loss_of(objective, Constants(self.config.batch.max_response_tokens), weight)

    @property
    def supervised(self) -> bool:
        """Whether the responses are demonstrations: no anchor, no rewards, no engines."""
        return self.config.algorithm.objective.supervised

    def count(self, batch: RolloutBatch, samples: np.ndarray) -> int:
        """What the objective's sum over these samples is divided by: sequences, or counted tokens."""
        if self.config.algorithm.objective.counts == "tokens":
            return int(batch.samples.counted_lengths[samples].sum())
        return len(samples)

    def is_correct(self, sample: Sample) -> bool:
        return sample.reward >= self._source(sample.source).reward.correct

    def compute_advantages(self, samples: list[Sample]) -> None:
        """Set every sample's shaped reward, τ and advantage; whole groups, graded before.

        Samples of one response, an agent's trajectories, share all three: a baseline is over responses.
        """
        responses = by_response(samples)
        of_source: dict[str, list[list[Sample]]] = defaultdict(list)
        for parts in responses:
            of_source[parts[0].source].append(parts)
        for name, members in of_source.items():
            shaped = self._shaped(
                name,
                [parts[0].reward for parts in members],
                [sum(len(s.response_tokens) for s in parts) for parts in members],
                [any(s.finish_reason in CUT for s in parts) for parts in members],
                [parts[0].group for parts in members],
            )
            tau = self._source(name).tau or self.tau
            for parts, reward in zip(members, shaped, strict=True):
                for sample in parts:
                    sample.shaped_reward, sample.tau = float(reward), tau
        firsts = [parts[0] for parts in responses]
        values = self._advantages(
            [s.shaped_reward for s in firsts], [s.group for s in firsts], [s.tau for s in firsts]
        )
        for parts, value in zip(responses, values, strict=True):
            for sample in parts:
                sample.advantage = float(value)

    def _advantages(self, rewards: ArrayLike, groups: list[int], taus: ArrayLike) -> np.ndarray:
        values = advantages(rewards, groups, baseline=self.config.algorithm.baseline, tau=taus)
        return self.config.algorithm.objective.advantages(values, groups)

    @property
    def baseline(self) -> str:
        """Whose optimum the advantages are of: a teacher's log-ratio is what it is, with Z = 1."""
        return "partition" if self.config.algorithm.objective.distils else self.config.algorithm.baseline

    def taught(self, batch: RolloutBatch, log_ratios: np.ndarray) -> SampleColumns:
        """The samples with what the teacher adds to the responses' rewards; supervised examples as they are.

        log_ratios: [responses] d = log π_T − log π_t of each, nats.
        An objective that distils has τ d for reward and advantage: its target log-ratio is A/τ = d.
        """
        teacher, known = self.config.algorithm.teacher, batch.samples
        assert teacher is not None, "there are log-ratios to one"
        # examples have no τ, and their groups have the numbers of responses' groups
        responses = slice(batch.sampled)
        taus, rewards, values = known.taus[responses], known.rewards.copy(), known.advantages.copy()
        if self.config.algorithm.objective.distils:
            rewards[responses] = values[responses] = taus * log_ratios
        else:
            rewards[responses] += taus * teacher.weight * log_ratios
            groups = known.groups[responses].tolist()
            values[responses] = self._advantages(rewards[responses], groups, taus)
        return dataclasses.replace(known, rewards=rewards, advantages=values)

    def _shaped(
        self,
        source: str,
        rewards: Sequence[float],
        lengths: Sequence[int],
        truncated: Sequence[bool],
        groups: Sequence[int],
    ) -> np.ndarray:
        """The graders' rewards with what length and truncation add or take: what is trained on.

        All but the source's name are [samples]: lengths in response tokens, groups the labels of the samples'
        prompts.
        """
        settings, values = self._source(source).reward, np.asarray(rewards, np.float64)
        shaped = values - settings.truncation_penalty * np.asarray(truncated, bool)
        if settings.length is not None and self.iteration >= settings.length.warmup_iterations:
            correct = values >= settings.correct
            shaped = shaped + settings.length.weight * length_rewards(lengths, correct, groups)
        return shaped

    def shaped_group(self, members: Sequence[Trajectory]) -> list[float]:
        """The rewards that one group's graded responses are trained on."""
        rewards = self._shaped(
            members[0].problem.source,
            [member.reward or 0.0 for member in members],
            [member.episode_length for member in members],
            [member.truncated for member in members],
            [0] * len(members),
        )
        return rewards.tolist()

    @functools.cached_property
    def _sources(self) -> dict[str, ProblemSource]:
        return {source.name: source for source in self.config.problem_sources("train")}

    def _source(self, name: str) -> ProblemSource:
        """DataError if the run has no such source: the rollout is another run's."""
        if name not in self._sources:
            here = ", ".join(filter(None, self._sources)) or "one source without a name"
            raise DataError(
                f"the rollout has responses to problems of {name or 'a source without a name'}; data.train "
                f"has {here}: replay it with the data settings of the run that it is from"
            )
        return self._sources[name]


def _at(start: float, schedule: Schedule | None, t: int) -> float:
    if schedule is None:
        return start
    return scheduled(start, schedule.end, schedule.iterations, t, schedule.shape)
