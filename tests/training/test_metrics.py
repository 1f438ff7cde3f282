"""What the numbers of an iteration count."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from megatron_pmd.actor.actor import StepReport
from megatron_pmd.batch import NOT_SAMPLED, RolloutBatch, Sample, Segment
from megatron_pmd.config import override
from megatron_pmd.rollout.metrics import staleness_values
from megatron_pmd.training.metrics import step_values, throughput
from megatron_pmd.training.subproblem import Subproblem
from recipes import recipe

SFT = ["algorithm.objective=sft", "warm_start=null", "actor.experts.replay_routing=false"]
SECONDS = {"rollout": 2.0, "anchor": 4.0, "update": 8.0}


def sample(group: int, prompt: int, response: int) -> Sample:
    return Sample(
        group=group, number=0, problem=group, prompt="", response="", answer="",
        prompt_tokens=np.ones(prompt), response_tokens=np.ones(response), engine_log_probs=np.zeros(response),
        finish_reason="stop", weight_version=0, seed=0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "sampled", "expected"),
    [
        # 4 responses of 10 + 30 tokens, and 2 examples of 20 + 60
        ([], 500, {"rollout": 250.0, "anchor": 40.0, "update": 40.0}),
        (["algorithm.anchor=engine"], 500, {"rollout": 250.0, "anchor": 20.0, "update": 40.0}),
        ([], None, {"anchor": 40.0, "update": 40.0}),
        (SFT, None, {"update": 40.0}),
    ],
)
def test_tokens_per_second_are_of_what_each_phase_computed(settings, sampled, expected):
    """Also what the filter dropped is sampled; supervised examples and carried tokens are not."""
    sizes = ["batch.prompts_per_rollout=4", "batch.prompts_per_step=2", "batch.samples_per_prompt=1"]
    config = override(recipe("tiny_moe_cpu"), [*sizes, *settings])
    responses, examples = [sample(i, 10, 30) for i in range(4)], [sample(i, 20, 60) for i in range(2)]
    batch = RolloutBatch.describe([*responses, *examples], 1.0, examples=len(examples))
    found = throughput(batch, SECONDS, config, sampled)
    assert found == {f"{name}/tokens_per_second": value for name, value in expected.items()}


def test_staleness_counts_tokens_by_the_age_of_their_weights_and_leaves_out_what_was_inserted():
    """Under weights 5: 10 + 30 tokens of ages 2 and 0 with 7 inserted between, and 20 of age 1."""
    mixed = [Segment(10, 3), Segment(7, NOT_SAMPLED, counted=False), Segment(30, 5, stale_cache=True)]
    first, second = sample(0, 4, 47), sample(1, 4, 20)
    first.segments, second.segments = mixed, [Segment(20, 4)]
    assert staleness_values([first, second], 5) == pytest.approx(
        {
            "staleness/mean": (2 * 10 + 20) / 60,
            "staleness/max": 2,
            "staleness/mixed_responses": 0.5,
            "staleness/stale_cache": 30 / 60,
            "staleness/share_0": 30 / 60,
            "staleness/share_1": 20 / 60,
            "staleness/share_2": 10 / 60,
        }
    )


def report(samples: np.ndarray, mismatch_sum: np.ndarray) -> StepReport:
    """A replica's, of a step before which the policy has not moved; each sequence has 30 counted tokens."""
    names = ("log_ratio", "kl_k2", "kl_k3", "mismatch_abs_sum", "mismatch_abs_max")
    zeros = np.zeros(len(samples))
    per_sequence = dict.fromkeys(names, zeros) | {"length": zeros + 30, "weight": zeros + 1}
    per_sequence["mismatch_sum"] = mismatch_sum[samples]
    return StepReport(0.1, 1.0, 0.0, len(samples), samples, per_sequence, 0.0, 30 * len(samples), 0.0, 0)


def test_a_step_compares_with_the_same_optimum_however_many_trajectories_an_episode_has():
    """Four episodes; two replicas have them in another order. The first one's log-weight is −0.9 in all."""
    config = override(recipe("tiny_moe_overlap_cpu"), ["algorithm.baseline=mean_loo"])
    found = []
    for trajectories in (1, 3):
        samples = [replace(sample(0, 10, 30), number=n, reward=float(n < 2)) for n in range(4)]
        samples[1:1] = [replace(samples[0], branch=branch) for branch in range(1, trajectories)]
        log_weights = np.array([-0.9 / trajectories] * trajectories + [0.1, 0.2, 0.3])
        subproblem = Subproblem(config, 0)
        subproblem.compute_advantages(samples)
        early, late = np.array_split(np.arange(len(samples)), 2)
        reports = [report(late, log_weights), report(early, log_weights)]
        values = step_values(RolloutBatch.describe(samples, 1.0), reports, subproblem)
        of_group = ("pmd/chi2_weight", "pmd/log_z_gap", "stale/chi2_weight", "stale/effective_sample_size")
        found.append({key: values[key] for key in of_group})
    assert min(found[0].values()) > 0
    assert found[1] == pytest.approx(found[0])


def test_a_step_without_a_counted_token_has_no_loss():
    """All its responses are of earlier weights, which rollout.partial.count_earlier_segments leaves out."""
    config = override(recipe("tiny_moe_cpu"), ["algorithm.objective=grpo"])
    samples = [replace(sample(0, 10, 30), number=n, reward=float(n < 2)) for n in range(4)]
    subproblem = Subproblem(config, 0)
    subproblem.compute_advantages(samples)
    nothing = replace(report(np.arange(4), np.zeros(4)), loss_sum=0.0, loss_count=0, tokens=0)
    nothing.per_sequence["length"] = np.zeros(4)
    values = step_values(RolloutBatch.describe(samples, 1.0), [nothing], subproblem)
    assert values["loss"] == values["entropy"] == 0.0
