"""What the configuration says of an iteration reaches the mathematics."""

from __future__ import annotations

import functools
import json
import math
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest
import torch

from megatron_pmd.algorithm import losses, mismatch
from megatron_pmd.algorithm.baselines import advantages
from megatron_pmd.batch import RolloutBatch, Sample
from megatron_pmd.config import Objective, RunConfig, override
from megatron_pmd.data.problems import Problem
from megatron_pmd.errors import DataError
from megatron_pmd.objectives.cispo import Cispo
from megatron_pmd.objectives.grpo import Grpo
from megatron_pmd.objectives.gspo import Gspo
from megatron_pmd.objectives.pmd import Pmd
from megatron_pmd.objectives.pmd_token import PmdToken
from megatron_pmd.objectives.reinforce import Reinforce
from megatron_pmd.rollout.metrics import success_rates
from megatron_pmd.rollout.trajectory import Trajectory, Turn
from megatron_pmd.training.metrics import source_values
from megatron_pmd.training.rollouts import train_rollout
from megatron_pmd.training.subproblem import Subproblem
from recipes import recipe
from tests.data.test_mixture import mixture

if TYPE_CHECKING:
    from megatron_pmd.data.prompts import PromptSource


def config_with(*settings: str) -> RunConfig:
    return override(recipe("tiny_moe_cpu"), list(settings))


def some_tokens() -> losses.LossInput:
    rng = torch.Generator().manual_seed(0)
    anchor = -torch.rand(9, generator=rng) - 0.1
    return losses.LossInput(
        log_probs=(anchor + 0.4 * torch.randn(9, generator=rng)).requires_grad_(),
        anchor_log_probs=anchor,
        engine_log_probs=anchor + 0.5 * torch.randn(9, generator=rng),
        mask=torch.tensor([1, 1, 0, 1, 1, 1, 1, 0, 1]),
        sequence=torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2]),
        advantages=torch.tensor([0.5, -1.0, 0.25]),
        tau=torch.tensor([0.1, 0.1, 0.1]),
    )


def expected(objective: Objective, weight: Any = None, cut: int = 8) -> losses.Loss:
    return losses.loss_of(objective, losses.Constants(max_response_tokens=cut), weight)


CASES: dict[str, tuple[list[str], losses.Loss]] = {
    "pmd": (["algorithm.objective.normaliser=none"], expected(Pmd(normaliser="none"))),
    "pmd, every option": (
        ["algorithm.objective.normaliser=max_response", "algorithm.objective.scaling=regression",
         "batch.max_response_tokens=7", "algorithm.mismatch.weight=sequence_mis",
         "algorithm.mismatch.low=0.9", "algorithm.mismatch.high=1.2"],
        expected(Pmd(normaliser="max_response", scaling="regression"), cut=7,
                 weight=functools.partial(mismatch.sequence_mis, low=0.9, high=1.2)),
    ),
    "reinforce": (
        ["algorithm.objective.normaliser=none", "algorithm.mismatch.weight=geometric_tis",
         "algorithm.mismatch.cap=1.1"],
        expected(Reinforce(normaliser="none"), weight=functools.partial(mismatch.geometric_tis, cap=1.1)),
    ),
    "pmd_token": (
        ["algorithm.objective.log_ratio_low=-0.2", "algorithm.objective.log_ratio_high=0.3",
         "algorithm.mismatch.weight=token_mis"],
        expected(PmdToken(log_ratio_low=-0.2, log_ratio_high=0.3), weight=mismatch.mis_by_token),
    ),
    "grpo": (
        ["algorithm.objective.clip_low=0.1", "algorithm.objective.clip_high=0.3",
         "algorithm.objective.kl_coefficient=0.5", "algorithm.mismatch.weight=token_veto",
         "algorithm.mismatch.lowest=0.7"],
        expected(Grpo(clip_low=0.1, clip_high=0.3, kl_coefficient=0.5),
                 weight=functools.partial(mismatch.veto_by_token, lowest=0.7)),
    ),
    "gspo": (["algorithm.objective.clip_low=0.05"], expected(Gspo(clip_low=0.05))),
    "cispo": (["algorithm.objective.ratio_high=1.1"], expected(Cispo(ratio_high=1.1))),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_setting_of_an_objective_reaches_its_loss(case):
    settings, right_loss = CASES[case]
    subproblem = Subproblem(config_with(f"algorithm.objective={case.split(',')[0]}", *settings), 0)
    x = some_tokens()
    found, right, default = (f(x) for f in (subproblem.loss, right_loss, _default(case)))
    assert found.sum == right.sum
    assert torch.equal(*(torch.autograd.grad(t.sum, x.log_probs)[0] for t in (found, right)))
    # the settings above are such that each case differs from its objective's defaults
    assert found.sum != default.sum


def _default(case: str) -> Any:
    return Subproblem(config_with(f"algorithm.objective={case.split(',')[0]}"), 0).loss


def test_schedules_change_tau_and_temperature_and_nothing_else():
    config = config_with(
        "algorithm.tau_schedule.end=0.4", "algorithm.tau_schedule.iterations=2",
        "rollout.temperature_schedule.end=0.5", "rollout.temperature_schedule.iterations=2",
        "rollout.temperature_schedule.shape=geometric",
    )  # fmt: skip
    found = [(Subproblem(config, t).tau, Subproblem(config, t).temperature) for t in range(4)]
    assert found == [(0.1, 2.0), (0.25, pytest.approx(1.0)), (0.4, 0.5), (0.4, 0.5)]


class Prompts:
    """A source of problems without end."""

    def take(self, count: int) -> list[Problem]:
        return [Problem(i, (), "1", tokens=(1, 2)) for i in range(count)]


@pytest.mark.parametrize(("objective", "temperature"), [("pmd", 0.8), ("sft", 1.0)])
def test_a_supervised_loss_is_at_temperature_1(objective, temperature):
    config = config_with(
        f"algorithm.objective={objective}",
        "rollout.temperature=0.8",
        "warm_start=null",
        "actor.experts.replay_routing=false",
        "batch.samples_per_prompt=1",
    )
    assert Subproblem(config, 0).temperature == temperature


def rollout(rewards: list[float], lengths: list[int], cut: list[bool]) -> list[Sample]:
    return [
        Sample(
            group=i // 2, number=i % 2, problem=i // 2, prompt="", response="", answer="",
            prompt_tokens=np.ones(1), response_tokens=np.full(n, 2), engine_log_probs=np.zeros(n),
            finish_reason="length" if c else "stop",
            weight_version=0, seed=0, reward=r,
        )
        for i, (r, n, c) in enumerate(zip(rewards, lengths, cut, strict=True))
    ]  # fmt: skip


def test_advantages_are_of_shaped_rewards_under_the_iterations_tau():
    settings = [
        "reward.length.weight=0.5",
        "reward.length.warmup_iterations=1",
        "reward.truncation_penalty=0.2",
    ]
    config = config_with(
        *settings, "algorithm.baseline=partition", "algorithm.tau_schedule.end=0.5",
        "algorithm.tau_schedule.iterations=1",
    )  # fmt: skip
    samples = rollout([1.0, 1.0, 0.0, 1.0], [2, 4, 3, 5], [False, False, True, False])
    Subproblem(config, 0).compute_advantages(samples)
    assert [s.shaped_reward for s in samples] == [1.0, 1.0, -0.2, 1.0]
    Subproblem(config, 1).compute_advantages(samples)
    # ± half the weight within a group; a wrong short answer gains nothing
    shaped = [1.25, 0.75, -0.2, 0.75]
    assert [s.shaped_reward for s in samples] == pytest.approx(shaped)
    expected = advantages(shaped, [0, 0, 1, 1], baseline="partition", tau=0.5)
    assert [s.advantage for s in samples] == pytest.approx(expected.tolist())
    assert [s.reward for s in samples] == [1.0, 1.0, 0.0, 1.0]
    assert {s.tau for s in samples} == {0.5}


def test_an_agents_trajectories_share_the_advantage_of_their_episode_which_a_baseline_counts_once():
    """The first of four responses has three trajectories, of 2, 1 and 3 tokens."""
    config = config_with("reward.length.weight=0.5", "algorithm.baseline=mean")
    whole = rollout([1.0, 1.0, 0.0, 1.0], [6, 4, 3, 5], [False, False, True, False])
    first, *others = rollout([1.0, 1.0, 0.0, 1.0], [2, 4, 3, 5], [False, False, True, False])
    branches = [replace(first, branch=n + 1, response_tokens=np.full(n, 2), segments=[]) for n in (1, 3)]
    branches = [replace(b, branch=n, engine_log_probs=np.zeros(len(b.response_tokens)))
                for n, b in enumerate(branches, start=1)]  # fmt: skip
    for samples in (whole, [first, *branches, *others]):
        Subproblem(config, 5).compute_advantages(samples)
    assert {s.shaped_reward for s in (first, *branches)} == {whole[0].shaped_reward}
    assert {s.advantage for s in (first, *branches)} == {whole[0].advantage} != {0.0}
    assert [s.advantage for s in others] == [s.advantage for s in whole[1:]]
    member = Trajectory(Problem(0, (), "1"), 0, 0, reward=1.0)
    member.branches = [Trajectory(member.problem, 0, 0) for _ in range(2)]
    for part, length in zip(member.parts, (2, 1, 3), strict=True):
        part.turns = [Turn(np.ones(length, np.int32), np.zeros(length, np.float32), finish="stop")]
    other = Trajectory(member.problem, 1, 0, reward=1.0)
    other.turns = [Turn(np.ones(4, np.int32), np.zeros(4, np.float32), finish="stop")]
    assert Subproblem(config, 5).shaped_group([member, other]) == [s.shaped_reward for s in whole[:2]]


@pytest.mark.parametrize(
    ("setting", "lengths", "finish", "kept"),
    [
        ("reward.length.weight=0.5", (2, 4), ("stop", "stop"), True),
        ("reward.length.weight=0.5", (3, 3), ("stop", "stop"), False),
        ("reward.truncation_penalty=0.2", (3, 3), ("stop", "length"), True),
        ("reward.truncation_penalty=0.2", (3, 3), ("stop", "repetition"), True),
        ("reward.truncation_penalty=0.2", (3, 3), ("length", "length"), False),
        ("reward.truncation_penalty=0", (2, 4), ("stop", "length"), False),
    ],
)
def test_the_group_filter_looks_at_the_rewards_that_are_trained_on(setting, lengths, finish, kept):
    config = config_with(
        setting, "rollout.group_filter.max_dropped=1", "batch.samples_per_prompt=2",
        "batch.prompts_per_rollout=4", "batch.prompts_per_step=4",
    )  # fmt: skip
    groups = train_rollout(config, cast("PromptSource", Prompts()), 0, carried_over=[])
    group = groups.groups[0]
    for member, length, reason in zip(group.members, lengths, finish, strict=True):
        member.turns = [Turn(np.ones(length, np.int32), np.zeros(length, np.float32), finish=reason)]
        member.reward = 1.0
    assert (groups.settled(group) is None) == kept


def test_grpo_divides_by_the_deviation_only_when_told():
    samples = rollout([1.0, 0.0, 0.0, 3.0], [1] * 4, [False] * 4)
    Subproblem(config_with("algorithm.objective=grpo"), 0).compute_advantages(samples)
    assert [s.advantage for s in samples] == pytest.approx([0.5, -0.5, -1.5, 1.5])
    divided = config_with("algorithm.objective=grpo", "algorithm.objective.divide_by_deviation=true")
    Subproblem(divided, 0).compute_advantages(samples)
    # two samples lie half their distance from their mean, 1/√2 of their n − 1 deviation
    root = 0.5**0.5
    assert [s.advantage for s in samples] == pytest.approx([root, -root, -root, root], rel=1e-5)


@pytest.mark.parametrize(("objective", "expected"), [("pmd", 3), ("grpo", 2 + 5 + 3)])
def test_the_count_is_what_the_objective_divides_by(objective, expected):
    batch = RolloutBatch.pack(rollout([0.0] * 4, [2, 4, 5, 3], [False] * 4), 1.0)
    subproblem = Subproblem(config_with(f"algorithm.objective={objective}"), 0)
    assert subproblem.count(batch, np.array([0, 2, 3])) == expected


GYM = {"kind": "reasoning_gym", "task": "spell_backward", "size": 10}
MIXED = [
    {"name": "sums", "source": GYM, "tau": 0.5},
    {"name": "words", "source": GYM, "reward": {
        "name": "exact", "correct": 0.5, "truncation_penalty": 0.25, "length": {"weight": 0.5}}},
]  # fmt: skip


def mixed(*settings: str) -> RunConfig:
    return config_with(f"data.train={json.dumps(MIXED)}", *settings)


def mixed_rollout() -> list[Sample]:
    """Groups of two: 0 and 2 of sums, 1 and 3 of words."""
    cut = [False, False, False, True, False, False, False, False]
    samples = rollout([1.0, 0.0, 0.6, 0.0, 0.0, 0.0, 1.0, 0.6], [3, 5, 2, 4, 3, 3, 2, 6], cut)
    for sample in samples:
        sample.source = ("sums", "words")[sample.group % 2]
    return samples


def test_each_source_has_its_own_tau_penalty_and_length_reward_in_its_advantages():
    """The baseline of `partition` is τ [logsumexp(r/τ) − log 2], of the shaped rewards."""
    samples = mixed_rollout()
    subproblem = Subproblem(mixed("algorithm.baseline=partition", "algorithm.tau=0.2"), 0)
    subproblem.compute_advantages(samples)
    # of words: the shorter of two gains 0.25 if it is correct, which 0.6 is; a wrong longer one loses 0.25
    shaped = [1.0, 0.0, 0.85, 0.0 - 0.25 - 0.25, 0.0, 0.0, 1.25, 0.35]
    assert [s.shaped_reward for s in samples] == pytest.approx(shaped)
    assert [s.tau for s in samples] == [0.5, 0.5, 0.2, 0.2] * 2
    for first in range(0, 8, 2):
        tau, pair = samples[first].tau, shaped[first : first + 2]
        baseline = tau * math.log(sum(math.exp(r / tau) for r in pair) / 2)
        assert [s.advantage for s in samples[first : first + 2]] == pytest.approx(
            [r - baseline for r in pair]
        )
    values = source_values(samples, subproblem)
    assert values == {
        "source/sums/reward": 0.25, "source/sums/response_tokens": 3.5, "source/sums/correct": 0.25,
        "source/sums/groups": 2, "source/sums/groups_with_signal": 1,
        "source/words/reward": pytest.approx(0.55), "source/words/response_tokens": 3.5,
        "source/words/correct": 0.75, "source/words/groups": 2, "source/words/groups_with_signal": 2,
    }  # fmt: skip
    assert success_rates(samples, subproblem.is_correct)["words", 3] == 1.0


def test_with_a_teacher_no_source_says_which_groups_have_a_signal():
    """The advantages of a rollout are of its rewards alone; what the teacher adds comes later."""
    config = mixed("algorithm.teacher.url=http://here", "rollout.temperature=1")
    values = source_values(mixed_rollout(), Subproblem(config, 0))
    assert values["source/sums/groups"] == 2 and not [key for key in values if key.endswith("with_signal")]


def test_the_target_of_a_sequence_is_its_own_sources_advantage_over_tau():
    """(τ/2)(s − A/τ)² / n with each sequence's own τ, and its gradient (τ s − A)/n at every counted token."""
    samples = mixed_rollout()
    subproblem = Subproblem(mixed("algorithm.tau=0.2", "batch.samples_per_prompt=2"), 0)
    subproblem.compute_advantages(samples)
    columns = RolloutBatch.describe(samples, 1.0).samples
    lengths = torch.from_numpy(columns.response_lengths)
    sequence = torch.repeat_interleave(torch.arange(8), lengths)
    rng = torch.Generator().manual_seed(0)
    anchor = -torch.rand(len(sequence), generator=rng, dtype=torch.float64)
    moved = torch.randn(len(sequence), generator=rng, dtype=torch.float64)
    x = losses.LossInput(
        (anchor + moved).requires_grad_(), anchor, anchor, torch.ones(len(sequence)), sequence,
        torch.from_numpy(columns.advantages), torch.from_numpy(columns.taus),
    )  # fmt: skip
    found = subproblem.loss(x)
    total, slopes = 0.0, []
    for i, sample in enumerate(samples):
        tau, n = (0.5 if sample.source == "sums" else 0.2), len(sample.response_tokens)
        s = moved[sequence == i].sum().item()
        total += tau / 2 * (s - sample.advantage / tau) ** 2 / n
        slopes += [(tau * s - sample.advantage) / n] * n
    assert found.sum.item() == pytest.approx(total, rel=1e-12)
    assert torch.autograd.grad(found.sum, x.log_probs)[0].tolist() == pytest.approx(slopes, rel=1e-9)


def test_the_group_filter_looks_at_a_group_with_its_own_sources_rewards():
    """Two right answers of different lengths: only with a length reward do they differ."""
    members = [Trajectory(Problem(0, (), "1", source="words"), i, 0, reward=1.0) for i in range(2)]
    for member, length in zip(members, (2, 4), strict=True):
        member.turns = [Turn(np.ones(length, np.int32), np.zeros(length, np.float32), finish="stop")]
    subproblem = Subproblem(mixed(), 0)
    assert subproblem.shaped_group(members) == [1.25, 0.75]
    of_sums = [replace(m, problem=replace(m.problem, source="sums")) for m in members]
    assert subproblem.shaped_group(of_sums) == [1.0, 1.0]


def test_a_group_is_of_one_source_and_a_rollout_has_each_sources_share():
    config = mixed("data.train.0.weight=3", "batch.prompts_per_rollout=16", "rollout.partial.extra_groups=4")
    prompts = mixture({"sums": 3, "words": 1})
    for t in range(3):
        groups = train_rollout(config, prompts, t, carried_over=[]).groups
        for group in groups:
            assert {member.problem.key for member in group.members} == {group.problem.key}
            assert len(group.members) == config.batch.samples_per_prompt
        assert Counter(group.problem.source for group in groups) == {"sums": 15, "words": 5}


def test_a_replayed_rollout_of_other_sources_is_refused():
    samples = mixed_rollout()
    samples[3].source = "poems"
    with pytest.raises(DataError, match=r"problems of poems; data\.train has sums, words: replay it with"):
        Subproblem(mixed(), 0).compute_advantages(samples)
    with pytest.raises(DataError, match=r"problems of sums; data\.train has one source without a name"):
        Subproblem(config_with(), 0).compute_advantages(mixed_rollout())


def test_the_schedule_moves_the_runs_tau_and_no_sources_own():
    samples = mixed_rollout()
    config = mixed("algorithm.tau_schedule.end=0.4", "algorithm.tau_schedule.iterations=2")
    Subproblem(config, 2).compute_advantages(samples)
    assert {(s.source, s.tau) for s in samples} == {("sums", 0.5), ("words", 0.4)}
