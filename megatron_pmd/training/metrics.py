"""Numbers that a run logs of its rollouts and optimizer steps: pure functions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron_pmd.actor.actor import AnchorReport, StepReport
from megatron_pmd.actor.batching import steps_of_groups
from megatron_pmd.actor.expert_load import imbalance
from megatron_pmd.actor.noise_floor import FloorReport
from megatron_pmd.algorithm.diagnostics import diagnostics, histogram_quantile, stale_diagnostics
from megatron_pmd.batch import RolloutBatch, Sample, first_branches
from megatron_pmd.config import RunConfig
from megatron_pmd.training.subproblem import Subproblem


def source_values(samples: Sequence[Sample], subproblem: Subproblem) -> dict[str, float]:
    """Of each source of a mixture in a rollout, as source/NAME/…; {} where there is only one.

    reward                mean of the grader's rewards
    response_tokens       mean length
    correct               share of the responses that are correct
    groups                prompts
    groups_with_signal    those in which not every advantage is 0; absent with a teacher, who adds to the
                          advantages later
    """
    of_source: dict[str, list[Sample]] = defaultdict(list)
    for sample in first_branches(samples):
        if sample.source:
            of_source[sample.source].append(sample)
    values: dict[str, float] = {}
    for name, members in of_source.items():
        found = {
            "reward": float(np.mean([s.reward for s in members])),
            "response_tokens": float(np.mean([len(s.response_tokens) for s in members])),
            "correct": float(np.mean([subproblem.is_correct(s) for s in members])),
            "groups": len({s.group for s in members}),
        }
        if subproblem.config.algorithm.teacher is None:
            found["groups_with_signal"] = len({s.group for s in members if s.advantage})
        values |= {f"source/{name}/{key}": value for key, value in found.items()}
    return values


def anchor_values(reports: Sequence[AnchorReport]) -> dict[str, float]:
    """How far the engines' log-probabilities are from the actor's, from the reports of all ranks; nats.

    Nothing of it where no token was sampled under the actor's weights: all were sampled ahead.
    """
    tokens, counted = sum(r.tokens for r in reports), sum(r.counted for r in reports)
    values = {
        "entropy": sum(r.entropy_sum for r in reports) / max(counted, 1),
        **imbalance([r.expert_tokens for r in reports]),
    }
    if tokens:
        values["sync/mean_abs_difference"] = sum(r.sum_absolute for r in reports) / tokens
        values["sync/max_abs_difference"] = max(r.max_absolute for r in reports)
        histogram = np.sum([r.histogram for r in reports], axis=0)
        values["mismatch/p99_abs"] = histogram_quantile(histogram, 0.99)
    return values


def floor_values(reports: Sequence[FloorReport]) -> dict[str, float]:
    """What rounding alone makes of diagnostics' values of the same names; nats a sequence."""
    sequences = max(sum(r.sequences for r in reports), 1)
    return {
        "pmd/drift/floor": sum(r.absolute for r in reports) / sequences,
        "pmd/kl_anchor_k2/floor": sum(r.k2 for r in reports) / sequences,
        "pmd/kl_anchor_k3/floor": sum(r.k3 for r in reports) / sequences,
    }


def throughput(
    batch: RolloutBatch,
    seconds_by_phase: Mapping[str, float],
    config: RunConfig,
    sampled_tokens: int | None,
) -> dict[str, float]:
    """Tokens per second of an iteration's phases; a phase in which nothing was computed has none.

    rollout  tokens that the engines sampled in it (`sampled_tokens`), also of responses that were dropped or
             left over. Neither inserted tokens nor those carried over from an earlier iteration
    anchor   prompt and response tokens of the responses that went through it
    update   those of all responses and supervised examples
    """
    lengths = batch.samples.lengths
    tokens = {"update": int(lengths.sum())}
    if sampled_tokens is not None:
        tokens["rollout"] = sampled_tokens
    if not config.algorithm.objective.supervised:
        # the engines' own log-probabilities are only checked, in the first step
        lengths = lengths[: batch.sampled]
        if config.algorithm.anchor == "engine":
            groups = batch.samples.groups[: batch.sampled]
            lengths = lengths[steps_of_groups(groups, config.batch.prompts_per_step)[0]]
        tokens["anchor"] = int(lengths.sum())
    return {f"{name}/tokens_per_second": count / seconds_by_phase[name] for name, count in tokens.items()}


def step_values(
    batch: RolloutBatch, reports: Sequence[StepReport], subproblem: Subproblem
) -> dict[str, float]:
    """One optimizer step's numbers from the reports of all ranks."""
    tokens = sum(r.tokens for r in reports)
    values = {
        # no token counts in a step whose responses are all of earlier weights that are not to count
        "loss": sum(r.loss_sum for r in reports) / max(1, sum(r.loss_count for r in reports)),
        "gradient_norm": reports[0].gradient_norm,
        "learning_rate": reports[0].learning_rate,
        "entropy": sum(r.entropy_sum for r in reports) / max(tokens, 1),
    }
    if examples := sum(r.example_tokens for r in reports):
        values["ptx/loss"] = sum(r.example_loss_sum for r in reports) / examples
    if subproblem.supervised:
        return values
    reporting = [r for r in reports if len(r.samples)]
    samples = np.concatenate([r.samples for r in reporting])
    per_sequence = {
        name: np.concatenate([r.per_sequence[name] for r in reporting]) for name in reporting[0].per_sequence
    }
    of_samples: dict[str, Any] = {
        "reward": batch.samples.rewards[samples],
        "group": batch.samples.groups[samples],
        "response": batch.samples.responses[samples],
        "baseline": subproblem.baseline,
        "tau": batch.samples.taus[samples],
    }
    values |= diagnostics(per_sequence, advantage=batch.samples.advantages[samples], **of_samples)
    if subproblem.config.rollout.staleness:
        values |= stale_diagnostics(per_sequence["mismatch_sum"], **of_samples)
    return values
