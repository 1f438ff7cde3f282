"""What a real engine takes and refuses of an update, by each transport; one engine for all tests."""

from __future__ import annotations

import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_pmd.config import Rollout
from megatron_pmd.engine.control import EngineControl
from megatron_pmd.errors import EngineError
from megatron_pmd.observe.console import Console
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
    assert engine.alive() and control.health()


class WithoutSampler(SeparateEngines):
    """The process that samples has tests of its own."""

    def _started(self): ...

    def _asked(self, ask): ...


def test_a_server_of_others_is_paused_for_an_update_and_goes_on_with_its_responses_under_the_new_weights(
    control, engine, bucket, models, engines, tmp_path
):
    """Each token of a response is of the weights that it says, behind all tokens, whoever made them."""
    update(control, bucket, models[0], version=60)
    separate: Any = WithoutSampler(
        engines._config, ALONE, tmp_path, None, None, Console(), cpu=True, ahead=None
    )
    separate.router = SimpleNamespace(url=engine.url, start=lambda urls: None, stop=lambda: None)

    def push(shards, version, *, serves, before_load):
        before_load()
        through(Disk(separate.fleet, ALONE, tmp_path / "weights"), bucket, models[1], version)

    separate._shards, separate.weight_push = 1, SimpleNamespace(push=push, close=lambda: None)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(generate, engine.url, max_new_tokens=600)
        while not running_requests(engine.url) and not asked.done():
            time.sleep(0.02)
        separate.load(SimpleNamespace(routing_width=0, release_parameters=None), 61)
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
