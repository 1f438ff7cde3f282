"""Rollouts sampled ahead, against a stub engine: what is begun when, what is handed over, what is known."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import pytest

from megatron_pmd.config import GroupFilter, RunConfig, override
from megatron_pmd.data.problems import Problem
from megatron_pmd.data.prompts import PromptSource
from megatron_pmd.errors import EnginesLost, StaleWeights
from megatron_pmd.rollout import sampler as sampling
from megatron_pmd.rollout.carried_over_file import read_carried_over, write_carried_over
from megatron_pmd.rollout.generate_client import Endpoint
from megatron_pmd.rollout.group_journal import GroupJournal
from megatron_pmd.rollout.groups import RolloutGroups
from megatron_pmd.rollout.metrics import staleness_values
from megatron_pmd.training.production import Ahead, Production
from megatron_pmd.training.rollouts import evaluation_rollout
from recipes import recipe
from tests.rollout.test_sampler import Grading, Numbers
from tools.bench.stub_engine import STOP_TOKEN, StubEngine, serving

PROMPTS, SAMPLES = 4, 3
Score = Callable[[str, Problem], float]
Begin = Callable[..., Production]
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


@pytest.fixture
def production(tmp_path: Path) -> Begin:
    numbers = itertools.count()

    def begun(
        config: RunConfig,
        order: PromptSource,
        score: Score = lambda *_: 1.0,
        *,
        ahead: Ahead | None = None,
        newest_version: int = 0,
    ) -> Production:
        ahead = ahead or Ahead(0, order.state(), [])
        return Production(
            config,
            order,
            ahead,
            Numbers(),
            Grading(score),
            GroupJournal(tmp_path / f"{next(numbers)}"),
            newest_version,
        )

    return begun


def run(body: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(body(), 60))


async def update(
    engine: StubEngine, url: str, version: int, publish: Callable[[], None] = lambda: None
) -> None:
    """As the driver has it done: pause, weights and their version, the sampler is told, and on."""
    async with httpx.AsyncClient(base_url=url, trust_env=False) as client:
        await client.post("/pause_generation", json={"mode": "retract"})
        await client.post("/update_weight_version", json={"new_version": str(version)})
        publish()
        await client.post("/continue_generation", json={})


def versions(rollout: RolloutGroups) -> set[int]:
    return {segment.weight_version for sample in rollout.samples(Numbers()) for segment in sample.segments}


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_no_rollout_is_begun_before_its_weights_allow_it_and_all_are_taken_in_order(
    staleness: int, production: Begin
) -> None:
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
            assert versions(rollout) <= set(range(max(0, t - staleness), t + 1))
        assert len(engine.requests) == config.iterations * PROMPTS * SAMPLES

    with serving(engine) as url:
        run(body)


def test_a_response_that_meets_an_update_is_whole_and_says_which_weights_sampled_what(
    production: Begin,
) -> None:
    engine = StubEngine(median_tokens=400, sigma=0.0, tokens_per_second=200)

    async def body() -> None:
        producing = production(configured(1), prompts())
        producing.publish(0, WIDTH, endpoint(url))
        while engine.running < PROMPTS * SAMPLES:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        producing.publish(1, WIDTH, endpoint(url))  # the sampler knows of new weights before the engines
        await update(engine, url, 1)
        first = await producing.take(0)
        for sample in first.samples(Numbers()):
            whole = [engine.token(sample.seed, i) for i in range(engine.length(sample.seed))]
            assert sample.response_tokens.tolist() == whole
            assert [segment.weight_version for segment in sample.segments] == [0, 1]
            assert sample.segments[0].tokens > 20 and sample.weight_version == 1
        values = staleness_values(first.samples(Numbers()), 1)
        assert values["staleness/max"] == 1 and values["staleness/mixed_responses"] == 1.0
        assert values["staleness/mean"] == pytest.approx(values["staleness/share_1"])
        assert values["staleness/share_0"] + values["staleness/share_1"] == pytest.approx(1.0)

    with serving(engine) as url:
        run(body)


def test_behind_an_update_in_place_only_what_was_asked_for_under_the_new_weights_is_of_one_policy(
    tmp_path: Path, production: Begin
) -> None:
    """Of rollout 0 some responses run when the weights change, and some wait for a slot: the engine lists the
    new weights alone for these, and may have their prompts cached under the old ones."""
    slots = PROMPTS * SAMPLES - 4
    # five seconds each: a busy machine has not ended one before the weights change
    engine = StubEngine(median_tokens=400, sigma=0.0, tokens_per_second=80, slots=slots, keep_requests=True)

    async def body() -> None:
        order, engines = prompts(), dataclasses.replace(endpoint(url), keeps_cache=True)
        producing = production(configured(1), order)
        producing.publish(0, WIDTH, engines)
        while engine.running < PROMPTS * SAMPLES:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)
        asked = len(engine.requests)
        await update(engine, url, 1, lambda: producing.publish(1, WIDTH, engines))
        rollout = await producing.take(0)
        assert {request["extra_key"] for request in engine.requests[:asked]} == {"0"}
        first = rollout.samples(Numbers())
        found = [[(g.weight_version, g.stale_cache) for g in sample.segments] for sample in first]
        assert found.count([(0, False), (1, True)]) == slots and found.count([(1, True)]) == 4
        share = sum(s.segments[-1].tokens for s in first) / sum(len(s.response_tokens) for s in first)
        assert staleness_values(first, 1)["staleness/stale_cache"] == pytest.approx(share)
        write_carried_over(tmp_path, rollout.groups)
        kept = [m for group in read_carried_over(tmp_path, order.problem) for m in group.members]
        assert [m.segments(0) for m in kept] == [s.segments for s in first]
        for sample in (await producing.take(1)).samples(Numbers()):
            assert [(g.weight_version, g.stale_cache) for g in sample.segments] == [(1, False)]

    with serving(engine) as url:
        run(body)


def test_weights_that_nobody_has_published_end_the_rollout(production: Begin) -> None:
    async def body() -> None:
        producing = production(configured(1), prompts())
        producing.publish(0, WIDTH, endpoint(url))
        with pytest.raises(StaleWeights, match="weight version 7, expected 0"):
            await producing.take(0)

    with serving(StubEngine(weight_version="7")) as url:
        run(body)


def test_what_was_lost_with_the_engines_goes_on_when_they_are_back(production: Begin) -> None:
    engine = StubEngine(keep_requests=True)

    async def body() -> None:
        producing = production(configured(1), prompts())
        lost = Endpoint("http://127.0.0.1:9", [], {}, 5.0, retries=0, any_engine_alive=lambda: False)
        producing.publish(0, WIDTH, lost)
        for t in range(2):
            with pytest.raises(EnginesLost):
                await producing.take(t)
        producing.publish(0, WIDTH, endpoint(url))
        for t in range(2):
            assert len((await producing.take(t)).chosen) == PROMPTS
        assert len(engine.requests) == 2 * PROMPTS * SAMPLES

    with serving(engine) as url:
        run(body)


def test_dropped_groups_are_replaced_in_their_own_rollout_and_the_accounts_hold(production: Begin) -> None:
    config = configured(2, **{"rollout.group_filter.max_dropped": 3})
    assert config.rollout.group_filter == GroupFilter(max_dropped=3)

    async def body() -> None:
        producing = production(config, prompts(), lambda response, problem: float(problem.index > 5))
        producing.publish(0, WIDTH, endpoint(url))
        for t in range(3):
            rollout = await producing.take(t)
            assert len(rollout.chosen) == PROMPTS and not rollout.left_over
            rollout.check()
            assert rollout.accounts.dropped["group_filter"] <= 3 * SAMPLES

    with serving(StubEngine()) as url:
        run(body)


def test_from_a_checkpoint_what_was_ahead_is_continued_and_every_prompt_comes_once(
    tmp_path: Path, production: Begin
) -> None:
    engine = StubEngine(median_tokens=60, sigma=0.3, tokens_per_second=300, slots=PROMPTS * SAMPLES)
    seeds: list[int] = []

    async def begin() -> None:
        order = prompts()
        producing = production(configured(2), order)
        producing.publish(0, WIDTH, endpoint(url))
        rollout = await producing.take(0)
        while True:
            ahead = producing.ahead(responses=True)
            finished = sum(member.finished for group in ahead.groups for member in group.members)
            if finished:
                break
            await asyncio.sleep(0.01)
        assert [group.begun for group in ahead.groups] == [1] * PROMPTS + [2] * PROMPTS
        assert finished < 2 * PROMPTS * SAMPLES
        again = producing.ahead(responses=False)
        assert ahead.first == again.first == 1
        assert again.prompts == ahead.prompts and not any(g.complete for g in again.groups)
        write_carried_over(tmp_path, ahead.groups)
        saved.append(ahead.prompts)
        seeds.extend(sample.seed for sample in rollout.samples(Numbers()))

    async def go_on() -> None:
        order = prompts()
        groups = read_carried_over(tmp_path, order.problem)
        ahead = Ahead(1, saved[0], groups)
        producing = production(configured(2), order, ahead=ahead, newest_version=1)
        while engine.running:  # what the other process asked for
            await asyncio.sleep(0.01)
        producing.publish(1, WIDTH, endpoint(url))
        decoded = engine.decoded_tokens
        carried = sum(member.length for group in groups for member in group.members)
        for t in (1, 2, 3):
            rollout = await producing.take(t)
            drawn = [group.problem.index for group in rollout.chosen]
            assert drawn == list(range(t * PROMPTS, (t + 1) * PROMPTS))
            samples = rollout.samples(Numbers())
            seeds.extend(sample.seed for sample in samples)
            tokens.append(sum(len(sample.response_tokens) for sample in samples))
        assert sum(tokens) == carried + engine.decoded_tokens - decoded, "nothing finished is sampled again"

    saved: list[dict[str, Any]] = []
    tokens: list[int] = []
    with serving(engine) as url:
        run(begin)
        engine.weight_version = "1"
        run(go_on)
    assert len(set(seeds)) == len(seeds) == 4 * PROMPTS * SAMPLES


def test_an_interrupted_rollout_is_handed_over_as_it_is_and_the_rest_is_known(production: Begin) -> None:
    engine = StubEngine(median_tokens=2000, sigma=0.0, tokens_per_second=100)

    async def body() -> None:
        producing = production(configured(1), prompts())
        producing.publish(0, WIDTH, endpoint(url))
        await asyncio.sleep(0.3)
        producing.interrupt()
        rollout = await producing.take(0)
        assert not rollout.may_end and len(rollout.groups) == PROMPTS
        ahead = producing.ahead(responses=True).groups
        assert [group.begun for group in ahead] == [1] * PROMPTS

    with serving(engine) as url:
        run(body)


def test_an_evaluation_is_drawn_beside_what_is_ahead(production: Begin) -> None:
    async def body() -> None:
        config, order = configured(1), prompts()
        producing = production(config, order)
        producing.publish(0, WIDTH, endpoint(url))
        evaluation = evaluation_rollout(config, order.peek(3), 0)
        drawn = await producing.draw(evaluation)
        assert drawn.finished == 3 * config.evaluation.samples_per_prompt
        assert len((await producing.take(0)).chosen) == PROMPTS

    with serving(StubEngine()) as url:
        run(body)


def test_one_that_takes_over_within_an_iteration_begins_no_rollout_that_is_taken(production: Begin) -> None:
    async def body() -> None:
        config, order = configured(1), prompts()
        producing = production(config, order)
        producing.publish(0, WIDTH, endpoint(url))
        await producing.take(0)
        known = producing.ahead(responses=False)
        successor = production(config, prompts(), ahead=known)
        successor.publish(0, WIDTH, endpoint(url))
        for t in (1, 2):
            engine.weight_version = str(t)
            successor.publish(t, WIDTH, endpoint(url))
            rollout = await successor.take(t)
            drawn = [group.problem.index for group in rollout.chosen]
            assert drawn == list(range(t * PROMPTS, (t + 1) * PROMPTS))

    engine = StubEngine()
    with serving(engine) as url:
        run(body)


def test_requests_of_an_older_rollout_come_before_those_of_a_newer_one(production: Begin) -> None:
    engine = StubEngine(keep_requests=True)

    async def body() -> None:
        producing = production(configured(2), prompts())
        producing.publish(0, WIDTH, endpoint(url))
        for t in range(3):
            await producing.take(t)
        iterations = [int(key.partition("-")[0]) for key in engine.routing_keys]
        assert iterations == sorted(iterations) and len(iterations) == 3 * PROMPTS * SAMPLES

    with serving(engine) as url:
        run(body)
