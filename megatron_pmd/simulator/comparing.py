"""The runs that one plan allows on its devices, played beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_pmd.config import PartialRollouts
from megatron_pmd.errors import ConfigError
from megatron_pmd.planner.memory import mean_response
from megatron_pmd.planner.planning import Plan
from megatron_pmd.planner.split import split_of
from megatron_pmd.simulator.accounts import Played
from megatron_pmd.simulator.lengths import Lengths, LogNormal, log_normal_of_mean
from megatron_pmd.simulator.playing import play
from megatron_pmd.simulator.scenario import Failures, colocated, overlapped


@dataclass(frozen=True)
class Play:
    """How runs are played."""

    lengths: Lengths
    iterations: int
    warm_up: int
    """Iterations at the beginning that do not count."""
    failures: Failures
    staleness: Sequence[int]
    """Of the overlapped runs."""
    seed: int


def compare(plan: Plan, how: Play) -> list[Played]:
    """Colocated, partial, and overlapped with each staleness if the devices can be split.

    A recipe of rollout.placement=separate, overlapped alone: its engines have devices beside its layout's.
    Raises ConfigError for a run without engines of its own.
    """
    if plan.sampled_by != "engines":
        raise ConfigError(
            f"{plan.config.name} has no engines of its own to be played: remove rollout.servers, or choose "
            "another algorithm.objective than a supervised one"
        )
    scenarios = []
    if plan.config.rollout.placement == "colocated":
        partial = plan.config.rollout.partial or extra_groups(plan)
        scenarios = [colocated(plan, rules, how.failures) for rules in (None, partial)]
    if split := split_of(plan):
        scenarios += [overlapped(plan, split, n, how.failures) for n in how.staleness]
    return [play(s, how.lengths, how.iterations, how.seed, how.warm_up) for s in scenarios]


def extra_groups(plan: Plan) -> PartialRollouts:
    """Partial rollouts of a recipe that has none: a quarter more groups in flight."""
    return PartialRollouts(extra_groups=max(1, plan.config.batch.prompts_per_rollout // 4))


def planned_lengths(plan: Plan, sigma: float) -> LogNormal:
    """Log-normal lengths with the mean that the plan counts with, cut at batch.max_response_tokens."""
    batch = plan.config.batch
    mean = mean_response(plan.config, plan.assumptions)
    return log_normal_of_mean(mean, sigma, batch.max_response_tokens, batch.max_prompt_tokens // 2)
