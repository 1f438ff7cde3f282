"""What the numbers of an iteration count."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_pmd.batch import RolloutBatch, Sample
from megatron_pmd.config import override
from megatron_pmd.training.metrics import throughput
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
