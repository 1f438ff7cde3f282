"""The process that samples ahead, as a run keeps it: when one that was killed is started again."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from aiohttp import web

from megatron_pmd.config import RunConfig, override
from megatron_pmd.data.problems import Problem
from megatron_pmd.data.prompts import PromptSource
from megatron_pmd.errors import SamplerLost
from megatron_pmd.observe.console import Console
from megatron_pmd.training.production import Ahead
from megatron_pmd.training.separate_engines import SeparateEngines
from recipes import recipe
from recipes.tiny_moe_cpu import make_model, make_tokenizer
from tests.engine.only_rank import OnlyRank
from tests.training.test_sampler_process import WithinVocabulary
from tools.bench.stub_engine import serving

ACTOR: Any = SimpleNamespace(routing_width=0, release_parameters=None)


class Server(WithinVocabulary):
    """As a server that others started."""

    def routes(self, app: web.Application) -> None:
        super().routes(app)

        async def well(request: web.Request) -> web.Response:
            return web.Response()

        for path in ("/health", "/health_generate"):
            app.router.add_get(path, well)
        app.router.add_post("/flush_cache", well)


def configured(folder: Path, url: str) -> RunConfig:
    make_model(folder)
    settings = [
        f"model.path={folder}", "reward.name=exact", "data.evaluation=null", "warm_start=null",
        "rollout.placement=separate", "rollout.staleness=1", "rollout.restarts=1",
        "rollout.ranks_per_engine=null", f'rollout.servers=["{url}"]', "sync.transport=disk",
        "layout.data=1", "layout.expert=1", "batch.prompts_per_rollout=8",
        "actor.experts.replay_routing=false",
    ]  # fmt: skip
    return override(recipe("tiny_moe_cpu"), settings)


def engines_of(folder: Path, url: str) -> Any:
    """Separate engines whose weights are a number."""
    problems = [Problem(index=i, messages=(), answer=str(i), tokens=(4, 5)) for i in range(100)]
    order = PromptSource(problems, 0, "in_order")
    engines: Any = SeparateEngines(
        configured(folder, url), OnlyRank(), folder, make_tokenizer(), None, Console(), cpu=True,
        problems=SimpleNamespace(train=order), ahead=Ahead(0, order.state(), []),
    )  # fmt: skip
    engines.router = SimpleNamespace(url=url, start=lambda urls: None, stop=lambda: None)

    def push(shards: Any, version: int, *, serves: Any, before_load: Callable[[], None]) -> None:
        before_load()
        httpx.post(f"{url}/update_weight_version", json={"new_version": str(version)}, trust_env=False)

    engines._shards, engines.weight_push = 1, SimpleNamespace(push=push, close=lambda: None)
    return engines


def kill(engines: Any) -> None:
    process = engines._sampler._process
    os.kill(process.pid, signal.SIGKILL)
    process.join(10)


def test_a_sampler_that_is_killed_while_the_trainer_trains_samples_again_before_the_next_take(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rollout 1 is under way when it is killed. Killed again before a rollout was taken, it stays so."""
    engine = Server(median_tokens=100, sigma=0.2, tokens_per_second=200, slots=64, keep_requests=True)
    with serving(engine) as url:
        engines = engines_of(tmp_path, url)
        engines.load(ACTOR, 0)
        first = engines.take(0, [], ACTOR)
        kill(engines)
        while engine.running:
            time.sleep(0.01)  # the engine ends what nobody waits for
        asked = len(engine.requests)
        begun = time.monotonic()
        engines.attend()
        attended = time.monotonic()
        while len(engine.requests) == asked:
            assert time.monotonic() - begun < 300
            engines.attend()
            time.sleep(0.05)
        assert attended - begun < (time.monotonic() - begun) / 2, "the actor trains while it gets ready"
        engines.load(ACTOR, 1)
        second = engines.take(1, [], ACTOR)
        problems = [[s.problem for s in drawn.samples[::16]] for drawn in (first, second)]
        assert problems == [list(range(8)), list(range(8, 16))]
        for drawn in (first, second):
            assert drawn.values["ahead/trained_responses"] == 128 * (1 + (drawn is second))
        assert capsys.readouterr().out.count("ended with status -9: was it killed?") == 1
        kill(engines)
        engines.attend()
        kill(engines)
        engines.attend()
        with pytest.raises(SamplerLost, match="ended with status -9"):
            engines.take(2, [], ACTOR)
        engines.close()
