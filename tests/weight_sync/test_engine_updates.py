"""What a real engine takes and refuses of an update, by each transport; one engine for all tests."""

from __future__ import annotations

import asyncio
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_pmd.batch import Segment
from megatron_pmd.config import Rollout
from megatron_pmd.data.problems import Problem
from megatron_pmd.engine.control import EngineControl
from megatron_pmd.errors import EngineError
from megatron_pmd.observe.console import Console
from megatron_pmd.rollout.engine_answer import EngineAnswer
from megatron_pmd.rollout.generate_client import Endpoint, GenerateClient
from megatron_pmd.rollout.groups import Accounts
from megatron_pmd.rollout.trajectory import Trajectory, Turn
from megatron_pmd.rollout.turn_sampler import Sampling, TurnSampler
from megatron_pmd.training.live_engines import LiveEngines
from megatron_pmd.training.separate_engines import SeparateEngines
from megatron_pmd.weight_sync.broadcast import Broadcast
from megatron_pmd.weight_sync.bucket import SharedBucket
from megatron_pmd.weight_sync.transport import Disk
from tests.actor.tiny_models import config_for
from tests.engine.live_engine import (
    ADMIN_KEY,
    KEY,
    PROMPTS,
    bucket,
    control,
    engine,
    folder,
    generate,
    largest_difference,
    log_probs,
    models,
    running_requests,
    starting,
    update,
)
from tests.engine.only_rank import OnlyRank
from tests.weight_sync.filling import fill

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU engine is for machines without CUDA"),
]

FIXTURES = (folder, models, starting, engine, control, bucket)


def test_a_corrupt_bucket_is_refused_by_name_and_the_engine_takes_the_next(control, engine, bucket, models):
    control.begin_update()
    description = fill(bucket, models[1].state_dict())
    bucket.data[77] ^= 1
    with pytest.raises(EngineError, match=rf"engine 3 .*weight bucket test-{os.getpid()}#1: .*checksum"):
        control.load_bucket([description])
    assert control.weight_version() is None and engine.alive()
    update(control, bucket, models[0], version=1)
    assert control.weight_version() == 1
    assert largest_difference(models[0], generate(engine.url)) < 1e-4


def test_a_wrong_shape_or_an_unknown_weight_is_refused_and_the_version_withdrawn(
    control, engine, bucket, models
):
    update(control, bucket, models[0], version=2)
    for name, tensor, reason in [
        ("model.norm.weight", torch.ones(7), "Error"),
        (
            "model.layers.0.mlp.nonsense.weight",
            torch.ones(7),
            "no place for 1 of its tensors.*nonsense.weight",
        ),
    ]:
        control.begin_update()
        with pytest.raises(EngineError, match=reason):
            control.load_bucket([fill(bucket, {name: tensor})])
        assert control.weight_version() is None and engine.alive()


def send(control: EngineControl, bucket: SharedBucket, tensors, name: str, **last) -> None:
    """One bucket of an update, through the loader's accounts."""
    control.load_bucket([fill(bucket, dict(tensors)) | {"update": {"name": name} | last}])


def manifest(model) -> list:
    return [[n, "float32", list(t.shape)] for n, t in model.state_dict().items()]


def test_a_dropped_tensor_is_refused_by_name_and_no_version_follows(control, engine, bucket, models):
    tensors = list(models[1].state_dict().items())
    control.begin_update()
    with pytest.raises(EngineError, match=rf"engine 3 .*tensor {re.escape(tensors[3][0])} did not come"):
        send(control, bucket, tensors[:3] + tensors[4:], "dropped", manifest=manifest(models[1]))
    assert control.weight_version() is None and engine.alive()


def test_full_verification_finds_no_difference_in_sglangs_own_parameters(control, engine, bucket, models):
    """Every parameter is overwritten, loaded again, and is what it was: nothing is left out of an update."""
    tensors = list(models[1].state_dict().items())
    control.begin_update()
    send(control, bucket, tensors[:9], "v")
    send(control, bucket, tensors[9:], "v", manifest=manifest(models[1]))
    send(control, bucket, tensors[:9], "v", verify="first", verify_last=False)
    send(control, bucket, tensors[9:], "v", verify="next", verify_last=True)
    control.end_update(8)
    control.flush_cache()
    assert largest_difference(models[1], generate(engine.url)) < 1e-4


def test_full_verification_names_the_parameters_that_other_weights_went_into(control, engine, bucket, models):
    tensors, others = (list(model.state_dict().items()) for model in models)
    control.begin_update()
    send(control, bucket, [*tensors[:4], others[4], *tensors[5:]], "w", manifest=manifest(models[0]))
    send(control, bucket, tensors[:9], "w", verify="first", verify_last=False)
    with pytest.raises(
        EngineError, match=r"1 parameters of the engine were not what the actor sent: model\.lay"
    ):
        send(control, bucket, tensors[9:], "w", verify="next", verify_last=True)


ALONE = OnlyRank()


@pytest.fixture
def fleet(control, engine):
    return SimpleNamespace(leads=True, senders=(0,), calls=control, urls=[engine.url])


def through(transport, bucket: SharedBucket, model, version: int) -> None:
    """A whole update in two buckets."""
    tensors = list(model.state_dict().items())
    transport.begin()
    for part in (tensors[:9], tensors[9:]):
        transport.load(bucket, [fill(bucket, dict(part))])
    transport.end(version)


@pytest.fixture
def engines(engine, models, folder, tmp_path, monkeypatch):
    """Engines of a run that someone else has started."""
    monkeypatch.setenv("PMD_SERVER_KEY", KEY)
    monkeypatch.setenv("PMD_SERVER_ADMIN_KEY", ADMIN_KEY)
    config = config_for(folder / "model-0").model_copy(
        update={"rollout": Rollout(servers=(engine.url,), start_timeout_seconds=60, restarts=1)}
    )
    engines = LiveEngines(config, ALONE, tmp_path, None, None, Console(), cpu=True)
    yield engines
    engines.close()


def test_a_server_of_others_serves_the_weights_it_is_given_and_outlives_the_run(
    control, engine, bucket, models, engines, tmp_path
):
    engines.make_room()
    transport = Disk(engines.fleet, ALONE, tmp_path / "weights")
    for version, model in ((50, models[1]), (51, models[0])):
        engines.release()
        engines.handover.resume_weights()
        through(transport, bucket, model, version)
        engines.resume()
        answers = generate(engines.router.url)
        assert {answer["meta_info"]["weight_version"] for answer in answers} == {str(version)}
        assert largest_difference(model, answers) < 1e-4
    assert not engines.recovery.any_lost() and engines.engine_bytes() == 0
    transport.close()
    engines.close()
    assert engine.alive() and control.responds(30)


class WithoutSampler(SeparateEngines):
    """The process that samples has tests of its own."""

    def _started(self): ...

    def _asked(self, ask): ...


def separate_engines(engines, engine, bucket, model, folder, pause, meanwhile=lambda: None) -> Any:
    """The same, in a run with separate engines. load() gives them this model's weights.

    meanwhile: called while they are paused.
    """
    given = engines._config
    config = given.model_copy(update={"rollout": given.rollout.model_copy(update={"pause": pause})})
    separate: Any = WithoutSampler(config, ALONE, folder, None, None, Console(), cpu=True, ahead=None)
    separate.router = SimpleNamespace(url=engine.url, start=lambda urls: None, stop=lambda: None)

    def push(shards, version, *, serves, before_load):
        before_load()
        meanwhile()
        through(Disk(separate.fleet, ALONE, folder / "weights"), bucket, model, version)

    separate._shards, separate.weight_push = 1, SimpleNamespace(push=push, close=lambda: None)
    return separate


ACTOR: Any = SimpleNamespace(routing_width=0, release_parameters=None)


def test_a_server_of_others_is_paused_for_an_update_and_goes_on_with_its_responses_under_the_new_weights(
    control, engine, bucket, models, engines, tmp_path
):
    """Each token of a response is of the weights that it says, behind all tokens, whoever made them."""
    update(control, bucket, models[0], version=60)
    separate = separate_engines(engines, engine, bucket, models[1], tmp_path, "retract")
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(generate, engine.url, max_new_tokens=600)
        while not running_requests(engine.url) and not asked.done():
            time.sleep(0.02)
        separate.load(ACTOR, 61)
        answers = asked.result()
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        spans = answer["meta_info"]["weight_versions"]
        assert [span["version"] for span in spans] == ["60", "61"]
        theirs = torch.tensor([entry[0] for entry in answer["meta_info"]["output_token_logprobs"]])
        for model, span in zip(models, spans, strict=True):
            part = slice(span["start"], span["end"])
            ours = log_probs(model, prompt, answer["output_ids"])
            assert (theirs[part] - ours[part]).abs().max() < 1e-4
    separate.close()
    assert engine.alive() and control.weight_version() == 61


class Unending(GenerateClient):
    """Its responses end only where there is no more room."""

    async def generate(self, request: dict[str, Any], routing_key: str) -> EngineAnswer:
        request["sampling_params"]["ignore_eos"] = True
        return await super().generate(request, routing_key)


def respond(endpoint: Endpoint, prompts, newest, tokens: int) -> list[tuple[Turn, torch.Tensor]]:
    """Responses to the prompts, asked for as a run does from these engines, and their log-probabilities.

    newest: says what weights the sampler knows of.
    """

    async def ask() -> list[Turn]:
        sampling = Sampling(
            oldest_version=70, newest_version=newest, temperature=1.0, top_p=1.0, stop_tokens=[],
            max_response_tokens=tokens, max_turns=1, max_new_tokens=None, repetition=None, routing_width=0,
        )  # fmt: skip
        turns = [Turn() for _ in prompts]
        async with Unending(endpoint) as client:
            sampler = TurnSampler(sampling, client, Accounts(), "")
            async with asyncio.TaskGroup() as tasks:
                for number, (prompt, turn) in enumerate(zip(prompts, turns, strict=True)):
                    problem = Problem(index=number, messages=(), answer="", tokens=tuple(prompt))
                    tasks.create_task(sampler.finish(Trajectory(problem, 0, number, [turn]), turn))
        return turns

    return [(turn, torch.from_numpy(turn.log_probs)) for turn in asyncio.run(ask())]


@torch.no_grad()
def log_probs_over_old_cache(models, prompt, tokens: list[int], first: int) -> torch.Tensor:
    """Of the tokens from `first` on, by the second model over the first one's cache of what stands before
    them, as transformers computes it. The last token before is not in the cache yet."""
    before = torch.tensor([[*prompt, *tokens[: first - 1]]])
    cache = models[0](before, use_cache=True).past_key_values
    logits = models[1](torch.tensor([tokens[first - 1 : -1]]), past_key_values=cache).logits[0]
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(tokens[first:])[:, None])[:, 0]


def test_an_update_in_place_leaves_running_responses_their_cache_and_new_ones_are_of_the_new_weights_alone(
    control, engine, bucket, models, engines, tmp_path
):
    """A request that the sampler sent before it knew of the new weights, and that the engine takes after it
    has them, finds its prompt in the cache: SGLang lists the new weights alone, and it is of neither."""
    update(control, bucket, models[0], version=70)
    known, late, sent = [70], list[Any](), Event()

    def newest() -> int:
        version = known[0]
        sent.set()
        return version

    with ThreadPoolExecutor(2) as pool:

        def meanwhile() -> None:
            late.append(pool.submit(respond, separate._endpoint(), PROMPTS[1:2], newest, 24))
            assert sent.wait(60)
            known[0] = 71

        separate = separate_engines(engines, engine, bucket, models[1], tmp_path, "in_place", meanwhile)
        running = pool.submit(respond, separate._endpoint(), PROMPTS, lambda: known[0], 400)
        while running_requests(engine.url) < len(PROMPTS) and not running.done():
            time.sleep(0.02)
        separate.load(ACTOR, 71)
        for prompt, (turn, theirs) in zip(PROMPTS, running.result(), strict=True):
            first, tokens = turn.segments[0].tokens, turn.tokens.tolist()
            assert turn.segments == [Segment(first, 70), Segment(400 - first, 71, stale_cache=True)]
            old, new = (log_probs(model, prompt, tokens) for model in models)
            assert (theirs - old)[:first].abs().max() < 1e-4, "they stay as they were"
            ours = log_probs_over_old_cache(models, prompt, tokens, first)
            assert (theirs[first:] - ours).abs().max() < 1e-4
            assert (theirs - new)[first:].abs().max() > 0.1, "nothing was computed again"
        ((turn, theirs),) = late[0].result()
    assert turn.segments == [Segment(24, 71, stale_cache=True)]
    assert (theirs - log_probs(models[1], PROMPTS[1], turn.tokens.tolist())).abs().max() > 0.1
    later = respond(separate._endpoint(), PROMPTS, lambda: 71, 24)
    for prompt, (turn, theirs) in zip(PROMPTS, later, strict=True):
        assert turn.segments == [Segment(24, 71)]
        assert (theirs - log_probs(models[1], prompt, turn.tokens.tolist())).abs().max() < 1e-4
    separate.close()
    assert engine.alive() and control.weight_version() == 71


def test_a_server_of_others_that_was_lost_is_taken_again_when_it_answers(engines, engine):
    engines.recovery.wait_ready()
    engines.fleet.own.process.url = "http://127.0.0.1:9"
    said = engines.recovery.restart_lost(probe=False)
    assert "server 0 of rollout.servers (http://127.0.0.1:9) does not answer" in said
    assert said.endswith("taken back, with the current weights: engine 0")
    assert engines.fleet.urls == [engine.url]


def test_broadcast_gives_the_engine_the_same_weights_and_a_group_outlasts_an_update(
    control, engine, bucket, models, fleet
):
    transport = Broadcast(fleet, ALONE, timeout_seconds=30)
    for version, model in ((20, models[0]), (21, models[1])):
        through(transport, bucket, model, version)
        control.flush_cache()
        assert control.weight_version() == version
        assert largest_difference(model, generate(engine.url)) < 1e-4


def test_a_broadcast_that_the_engine_refuses_ends_within_its_deadline_and_the_next_update_works(
    control, engine, bucket, models, fleet
):
    """Outside of an update SGLang refuses the request without joining in the broadcast."""
    transport = Broadcast(fleet, ALONE, timeout_seconds=3)
    transport.begin()
    control.end_update(30)
    begun = time.monotonic()
    with pytest.raises(EngineError, match=r"engine 3 .*must run between begin_weight_update"):
        transport.load(bucket, [fill(bucket, models[0].state_dict())])
    assert time.monotonic() - begun < 20
    through(transport, bucket, models[0], 31)
    control.flush_cache()
    assert largest_difference(models[0], generate(engine.url)) < 1e-4


def test_disk_gives_the_engine_the_same_weights_and_leaves_no_files(
    control, engine, bucket, models, fleet, tmp_path
):
    transport = Disk(fleet, ALONE, tmp_path / "weights")
    for version, model in ((40, models[1]), (41, models[0])):
        through(transport, bucket, model, version)
        control.flush_cache()
        assert control.weight_version() == version
        assert largest_difference(model, generate(engine.url)) < 1e-4
    transport.close()
    assert not list(tmp_path.iterdir())
