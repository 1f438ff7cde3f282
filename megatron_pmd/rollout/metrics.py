"""A rollout in numbers: rewards, lengths, why responses ended, what was dropped or left over."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from megatron_pmd.batch import NOT_SAMPLED, Sample, first_branches
from megatron_pmd.data.problems import Key
from megatron_pmd.rollout.groups import RolloutGroups

FINISH_REASONS = ("stop", "length", "repetition")


def rollout_values(samples: Sequence[Sample]) -> dict[str, float]:
    """Rewards and failures of a rollout's responses; lengths (with inserted tokens) and ends of samples."""
    lengths, responses = [len(s.response_tokens) for s in samples], first_branches(samples)
    rewards, shaped = [s.reward for s in responses], [s.shaped_reward for s in responses]
    reasons = Counter(s.finish_reason for s in samples)
    low, middle, high = np.quantile(lengths, [0.1, 0.5, 0.9])
    values = {
        "reward": float(np.mean(rewards)),
        "reward_deviation": float(np.std(rewards)),
        **({"shaped_reward": float(np.mean(shaped))} if shaped != rewards else {}),
        "response_tokens": float(np.mean(lengths)),
        "response_tokens/p10": float(low),
        "response_tokens/p50": float(middle),
        "response_tokens/p90": float(high),
        "response_tokens/max": float(np.max(lengths)),
        "truncated_share": reasons["length"] / len(samples),
        "reward_errors": sum(s.reward_error is not None for s in responses),
    }
    for reason in FINISH_REASONS:
        values[f"finish/{reason}"] = reasons[reason] / len(samples)
    segments = [segment for s in samples for segment in s.segments]
    if any(not segment.counted for segment in segments):
        inserted = sum(g.tokens for g in segments if g.weight_version == NOT_SAMPLED)
        values["rollout/inserted_share"] = inserted / sum(lengths)
        values["rollout/counted_share"] = sum(g.tokens for g in segments if g.counted) / sum(lengths)
    return values


def success_rates(samples: Sequence[Sample], is_correct: Callable[[Sample], bool]) -> dict[Key, float]:
    """Share of each problem's responses that are correct."""
    verdicts: dict[Key, list[bool]] = defaultdict(list)
    for sample in first_branches(samples):
        verdicts[sample.source, sample.problem].append(is_correct(sample))
    return {problem: float(np.mean(right)) for problem, right in verdicts.items()}


def staleness_values(samples: Sequence[Sample], weight_version: int) -> dict[str, float]:
    """How much older than the weights that are trained the policies are that sampled the tokens.

    weight_version: of those weights. By sampled tokens: mean and largest age in iterations, the share of each
    age, and the share that may stand on a cache of earlier weights; of the responses, the share that several
    policies sampled.
    """
    ages: Counter[int] = Counter()
    stale_cache = 0
    for sample in samples:
        for segment in sample.segments:
            if segment.weight_version != NOT_SAMPLED:
                ages[weight_version - segment.weight_version] += segment.tokens
                stale_cache += segment.tokens if segment.stale_cache else 0
    total = max(1, ages.total())
    versions = [{s.weight_version for s in sample.segments} - {NOT_SAMPLED} for sample in samples]
    return {
        "staleness/mean": sum(age * tokens for age, tokens in ages.items()) / total,
        "staleness/max": max(ages, default=0),
        "staleness/mixed_responses": sum(len(found) > 1 for found in versions) / max(1, len(samples)),
        "staleness/stale_cache": stale_cache / total,
        **{f"staleness/share_{age}": ages[age] / total for age in range(max(ages, default=0) + 1)},
    }


def account_values(rollout: RolloutGroups) -> dict[str, float]:
    """Of the drawing: where every response and token went. Only what the run's settings make possible."""
    accounts, settings = rollout.accounts, rollout.settings
    values: dict[str, float] = {}
    if accounts.first_refusal:
        values |= {
            "rollout/refused_requests": accounts.refusals,
            "rollout/refused_groups": accounts.dropped["refused"] / settings.samples_per_prompt,
        }
    values |= {f"agent/{name}": count for name, count in accounts.agents.items()}
    if rollout.rules.group_filter is not None:
        values |= {
            "filter/dropped_groups": accounts.dropped["group_filter"] / settings.samples_per_prompt,
            "filter/dropped_tokens": accounts.dropped_tokens["group_filter"],
            "filter/let_through_groups": accounts.filter_passed,
        }
    if rollout.rules.partial is not None:
        left_over = [member for group in rollout.left_over for member in group.members]
        stopped = Counter(member.stopped for member in left_over if not member.finished)
        ages = [
            settings.weight_version - (member.first_version or 0)
            for group in rollout.chosen
            for member in group.members
        ]
        values |= {
            "partial/carried_responses": accounts.carried,
            "partial/started_responses": accounts.started,
            "partial/sampled_tokens": accounts.sampled_tokens,
            "partial/restarted_responses": accounts.dropped["stale"],
            "partial/restarted_tokens": accounts.dropped_tokens["stale"],
            "partial/left_over_groups": len(rollout.left_over),
            "partial/left_over_finished_responses": sum(member.finished for member in left_over),
            "partial/left_over_tokens": sum(member.length for member in left_over),
            "partial/mean_age": float(np.mean(ages)),
        }
        for reason in ("deadline", "enough_groups", "token_budget"):
            values[f"partial/stopped_{reason}"] = stopped[reason]
    return values
