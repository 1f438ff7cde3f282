"""The process that samples ahead, seen from the driver; what it does is in test_production.py."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from megatron_pmd.config import RunConfig, override
from megatron_pmd.data.problems import Problem
from megatron_pmd.data.prompts import PromptSource
from megatron_pmd.errors import ConfigError, SamplerLost
from megatron_pmd.rollout.generate_client import Endpoint
from megatron_pmd.training.production import Ahead
from megatron_pmd.training.sampler_process import SamplerProcess, Setup
from recipes import recipe
from recipes.tiny_moe_cpu import make_model, make_tokenizer
from tools.bench.stub_engine import STOP_TOKEN, StubEngine, serving


class WithinVocabulary(StubEngine):
    def token(self, seed: int, position: int) -> int:
        return STOP_TOKEN if position == self.length(seed) - 1 else 4 + super().token(seed, position) % 90


def setup(folder: Path, reward: str) -> Setup:
    make_model(folder)
    settings = [
        f"model.path={folder}", f"reward.name={reward}", "rollout.placement=separate", "rollout.staleness=1",
        "batch.prompts_per_rollout=8", "data.evaluation=null", "actor.experts.replay_routing=false",
    ]  # fmt: skip
    config: RunConfig = override(recipe("tiny_moe_cpu"), settings)
    problems = [Problem(index=i, messages=(), answer=str(i), tokens=(4, 5)) for i in range(100)]
    order = PromptSource(problems, 0, "in_order")
    return Setup(config, order, Ahead(0, order.state(), []), folder, 0)


def test_a_reward_that_is_not_there_is_refused_at_the_start(tmp_path: Path) -> None:
    process = SamplerProcess(setup(tmp_path, "no_such_module:reward"), lambda: False)
    with pytest.raises(ConfigError, match="no_such_module"):
        process.wait_ready()
    process.close()


def test_a_rollout_comes_whole_through_the_pipe_and_a_killed_process_is_told_from_a_failure(
    tmp_path: Path,
) -> None:
    waited: list[int] = []

    def meanwhile() -> bool:
        waited.append(1)
        return False

    given = setup(tmp_path, "exact")
    process = SamplerProcess(given, meanwhile)
    with serving(WithinVocabulary(median_tokens=6)) as url:
        process.wait_ready()
        process.publish(0, 0, Endpoint(url, [url], {}, 20.0, 1, bool))
        rollout, ahead, _ = process.take(0, seconds=30)
        samples = rollout.samples(make_tokenizer())
        assert len(samples) == given.config.batch.samples_per_rollout
        assert [s.problem for s in samples[::16]] == list(range(8))
        assert ahead.first == 1 and [group.problem.index for group in ahead.groups] == list(range(8, 16))
        assert given.prompts.state()["cursor"] == 0, "the driver's own order is another"
        os.kill(process._process.pid or 0, signal.SIGKILL)
        with pytest.raises(SamplerLost, match="ended with status -9: was it killed"):
            process.take(1, seconds=30)
    assert waited, "the driver gives signs of life while it waits"
    process.close()
