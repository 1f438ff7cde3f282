"""Rollouts sampled ahead, against a stub engine: what is begun when, what is handed over, what is known."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine
from typing import Any

import httpx
import pytest

from megatron_pmd.config import GroupFilter, RunConfig, override
from megatron_pmd.data.problems import Problem
from megatron_pmd.data.prompts import PromptSource
from megatron_pmd.errors import StaleWeights
from megatron_pmd.rollout import sampler as sampling
from megatron_pmd.rollout.carried_over_file import read_carried_over, write_carried_over
from megatron_pmd.rollout.generate_client import Endpoint, EnginesLost
from megatron_pmd.rollout.groups import RolloutGroups
from megatron_pmd.rollout.metrics import staleness_values
from megatron_pmd.training.production import Production
from recipes import recipe
from tests.rollout.test_sampler import Grading, Numbers
from tools.bench.stub_engine import STOP_TOKEN, StubEngine, serving

PROMPTS, SAMPLES = 4, 3
WIDTH = 0
"""Nothing replays routing here."""


@pytest.fixture(autouse=True)
def _stop_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "stop_tokens", lambda tokenizer, path: [STOP_TOKEN])


def configured(staleness: int, **changes: Any) -> RunConfig:
    settings = {
        "iterations": 6, "rollout.placement": "separate", "rollout.staleness": staleness,
        "rollout.temperature": 1.0, "batch.prompts_per_rollout": PROMPTS, "batch.prompts_per_step": 2,
        "batch.samples_per_prompt": SAMPLES, "batch.max_response_tokens": 1000,
        "batch.max_tokens_per_microbatch": 4096, "data.evaluation": "null", **changes,
    }  # fmt: skip
    return override(recipe("tiny_moe_cpu"), [f"{name}={value}" for name, value in settings.items()])


def prompts(count: int = 1000) -> PromptSource:
    return PromptSource(
        [Problem(index=i, messages=(), answer=str(i), tokens=(1, 2)) for i in range(count)], 0, "in_order"
    )


def endpoint(url: str) -> Endpoint:
    return Endpoint(url, [url], {}, 20.0, retries=1, any_engine_alive=lambda: True)


def production(config: RunConfig, order: PromptSource, score: Callable[..., float] = lambda *_: 1.0, **more: Any):
    return Production(config, order, more.get("carried_over", []), Numbers(), Grading(score))


def run(body: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(body(), 60))


async def update(engine: StubEngine, url: str, version: int) -> None:
    """As the driver has it done: pause, weights and their version, and on."""
    async with httpx.AsyncClient(base_url=url, trust_env=False) as client:
        await client.post("/pause_generation", json={"mode": "retract"})
        await client.post("/update_weight_version", json={"new_version": str(version)})
        await client.post("/continue_generation", json={})


def segments(rollout: RolloutGroups) -> list[list[tuple[int, int]]]:
    return [
        [(s.tokens, s.weight_version) for s in sample.segments] for sample in rollout.samples(Numbers())
    ]


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_no_rollout_is_begun_before_its_weights_allow_it_and_all_are_taken_in_order(staleness: int) -> None:
    engine = StubEngine(keep_requests=True)

    async def body() -> None:
        config, order = configured(staleness), prompts()
        producing = production(config, order)
        for t in range(config.iterations):
            await update(engine, url, t)
            producing.publish(t, WIDTH, endpoint(url))
            await asyncio.sleep(0.3)  # whatever may be begun is
            allowed = min(t + staleness + 1, config.iterations)
            assert order.state()["cursor"] == allowed * PROMPTS
            rollout = await producing.take(t)
            drawn = [group.problem.index for group in rollout.chosen]
            assert drawn == list(range(t * PROMPTS, (t + 1) * PROMPTS))
            versions = {version for spans in segments(rollout) for _, version in spans}
            assert versions <= set(range(max(0, t - staleness), t + 1))
        assert len(engine.requests) == config.iterations * PROMPTS * SAMPLES

    with serving(engine) as url:
        run(body)
