"""Our calls to an engine, taken by SGLang's own application behind its own check of keys."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import uvicorn
from sglang.srt.entrypoints import http_server
from sglang.srt.managers.tokenizer_control_mixin import normalize_serialized_named_tensor_payloads
from sglang.srt.managers.tokenizer_manager import ServerStatus
from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater
from sglang.srt.runtime_context import SpawnRanks, get_serving, publish
from sglang.srt.utils import MultiprocessingSerializer
from sglang.srt.utils.auth import add_api_key_middleware, app_has_admin_force_endpoints

from megatron_pmd.engine.control import EngineControl
from megatron_pmd.engine.keys import NO_KEYS, Keys
from megatron_pmd.engine.server import answers, free_port
from megatron_pmd.engine.sglang_server import LOADER, EngineSpec
from megatron_pmd.errors import EngineError
from megatron_pmd.rollout.generate_client import Endpoint, GenerateClient
from megatron_pmd.weight_sync.bucket import SharedBucket
from tests.gpu_contract.engine_arguments import arguments_of, spec_of
from tests.gpu_contract.model_folders import configured

RECIPE = "qwen2_5_7b_dapo_8xh100"
DEADLINE_SECONDS = 60.0
KEYS = {"none": NO_KEYS, "ours": Keys("generates", "changes"), "one for both": Keys("both", None)}


class Model(torch.nn.Module):
    """What an update is loaded into."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(8, 16, dtype=torch.bfloat16))

    def load_weights(self, weights: Any) -> None:
        parameters = dict(self.named_parameters())
        with torch.no_grad():
            for name, tensor in weights:
                parameters[name].copy_(tensor)


class Manager:
    """In the place of the tokenizer manager, which passes requests on to an engine's other processes.

    It notes what the application made of each request. A bucket takes the scheduler's own way from here.
    """

    gracefully_exit, server_status, is_generation = False, ServerStatus.Up, True
    model_path, served_model_name, startup_time = "model", "model", 0.0
    rid_to_state: dict[str, Any] = {}

    def __init__(self, arguments: Any) -> None:
        self.server_args, self.version, self.model = arguments, "none", Model()
        self.received: dict[str, Any] = {}
        self.model_config = SimpleNamespace(
            is_image_understandable_model=False, is_audio_understandable_model=False, hf_config=None
        )
        self.updater = WeightUpdater(
            tp_rank=0, device="cpu", gpu_id=0, model_config=None, custom_weight_loaders=[LOADER],
            get_model=lambda: self.model, update_model_fields=None, recapture_cuda_graph=None,
            get_model_runner=None,
        )  # fmt: skip

    @property
    def last_receive_tstamp(self) -> float:
        return time.time()

    def is_ready(self) -> bool:
        return True

    def config_value(self, name: str) -> Any:
        return {"weight_version": self.version}.get(name)

    async def get_internal_state(self) -> list[Any]:
        return []

    async def generate_request(self, request: Any, _: Any) -> Any:
        request.normalize_batch_and_arguments()
        self.received["generate"] = request
        yield {
            "output_ids": [7, 8],
            "meta_info": {
                "finish_reason": {"type": "stop", "matched": 8}, "weight_version": "3",
                "output_token_logprobs": [(-0.5, 7, None), (-0.25, 8, None)],
            },
        }  # fmt: skip

    async def update_weight_version(self, request: Any) -> None:
        self.version = request.new_version

    async def flush_cache(self, timeout_s: float) -> Any:
        self.received["flush_cache"] = timeout_s
        return SimpleNamespace(success=True, message="")

    async def update_weights_from_tensor(self, request: Any, _: Any) -> tuple[bool, str]:
        self.received["update_weights_from_tensor"] = request
        payloads = normalize_serialized_named_tensor_payloads(request.serialized_named_tensors)
        named = MultiprocessingSerializer.deserialize(payloads[0])
        return self.updater.update_weights_from_tensor(named, load_format=request.load_format)

    async def update_weights_from_disk(self, request: Any, _: Any) -> tuple[bool, str, int]:
        self.received["update_weights_from_disk"] = request
        return True, "", 0

    def abort_request(self, rid: str = "", abort_all: bool = False) -> None:
        self.received["abort_request"] = abort_all

    def __getattr__(self, name: str) -> Any:
        async def note(request: Any, _: Any) -> tuple[bool, str]:
            self.received[name] = request
            return True, ""

        return note


class Server(uvicorn.Server):
    """SGLang's application on a port of this machine, as launch_server puts it there."""

    def __init__(self, spec: EngineSpec) -> None:
        arguments = arguments_of(spec)
        publish(arguments, role="scheduler", ranks=SpawnRanks(world_rank=0))
        self.manager = Manager(arguments)
        http_server.set_global_state(SimpleNamespace(tokenizer_manager=self.manager, scheduler_info={}))
        app, serving = http_server.app, get_serving()
        app.user_middleware.clear()
        app.middleware_stack = None
        if serving.api_key or serving.admin_api_key or app_has_admin_force_endpoints(app):
            add_api_key_middleware(app, api_key=serving.api_key, admin_api_key=serving.admin_api_key)
        super().__init__(uvicorn.Config(app, port=spec.port, log_level="error", lifespan="off"))
        self._thread = threading.Thread(target=self.run, daemon=True)
        self._thread.start()
        until = time.monotonic() + DEADLINE_SECONDS
        while not answers(spec.url + "/ready", DEADLINE_SECONDS):
            assert time.monotonic() < until and self._thread.is_alive(), "the application did not start"

    def close(self) -> None:
        self.should_exit = True
        self._thread.join()


@pytest.fixture(params=KEYS)
def served(request, models, tmp_path) -> Iterator[tuple[EngineSpec, Server]]:
    spec = spec_of(configured(RECIPE, models), tmp_path, keys=KEYS[request.param], port=free_port())
    server = Server(spec)
    yield spec, server
    server.close()


def test_every_call_to_an_engine_is_taken_with_its_keys(served, tmp_path):
    spec, server = served
    received = server.manager.received
    with EngineControl(spec, DEADLINE_SECONDS) as control:
        assert control.responds(DEADLINE_SECONDS) and control.generates(DEADLINE_SECONDS)
        control.release(["kv_cache"])
        assert received["release_memory_occupation"].tags == ["kv_cache"]
        assert received["flush_cache"] == DEADLINE_SECONDS
        control.resume(["weights"])
        assert received["resume_memory_occupation"].tags == ["weights"]
        control.begin_update()
        assert control.weight_version() is None and "begin_weight_update" in received
        control.end_update(3)
        assert control.weight_version() == 3 and "end_weight_update" in received
        control.join_group("127.0.0.1", 1, "g", rank_offset=1, world=3)
        group = received["init_weights_update_group"]
        assert (group.rank_offset, group.world_size, group.backend) == (1, 3, "nccl")
        control.load_broadcast([("w", "bfloat16", (2, 3))], "g")
        broadcast = received["update_weights_from_distributed"]
        assert (broadcast.names, broadcast.shapes, broadcast.group_name) == (["w"], [[2, 3]], "g")
        assert broadcast.load_format == "flattened_bucket"
        assert control.tensor_parallel() == spec.rollout.tensor_parallel
        control.leave_group("g")
        control.load_from_disk(tmp_path)
        assert received["update_weights_from_disk"].model_path == str(tmp_path)


def test_a_bucket_goes_through_the_engines_own_schema_unpickler_and_updater_into_our_loader(served, tmp_path):
    spec, server = served
    bucket = SharedBucket(f"contract-{spec.port}", 1 << 16, folder=tmp_path)
    sent = torch.randn(8, 16).bfloat16()
    entry = bucket.layout.add("w", "bfloat16", (8, 16))
    bucket.tensor(entry).copy_(sent)
    with EngineControl(spec, DEADLINE_SECONDS) as control:
        control.begin_update()
        control.load_bucket([bucket.description()])
        assert torch.equal(server.manager.model.w.data, sent)
        description = bucket.description()
        bucket.data[3] ^= 1
        with pytest.raises(EngineError, match="rank 0 refused the weights"):
            control.load_bucket([description])
        assert torch.equal(server.manager.model.w.data, sent)
    bucket.close()


def test_a_request_to_generate_and_an_abort_are_taken_and_the_answer_is_read(served):
    spec, server = served
    endpoint = Endpoint(
        router_url=spec.url, engine_urls=[spec.url], headers=spec.keys.headers,
        request_timeout_seconds=DEADLINE_SECONDS, retries=0, any_engine_alive=lambda: True,
        abort_headers=spec.keys.admin_headers,
    )  # fmt: skip
    sampling = {
        "max_new_tokens": 4,
        "temperature": 1.0,
        "top_p": 1.0,
        "stop_token_ids": [8],
        "sampling_seed": 5,
    }
    request = {
        "input_ids": [1, 2], "sampling_params": sampling, "return_logprob": True,
        "return_routed_experts": False,
    }  # fmt: skip

    async def ask() -> Any:
        async with GenerateClient(endpoint) as client:
            answer = await client.generate(request, "key")
            idle = asyncio.Event()
            asyncio.get_running_loop().call_later(0.01, idle.set)
            await client.stop("the end", idle)
            return answer

    answer = asyncio.run(ask())
    assert answer.tokens.tolist() == [7, 8] and answer.log_probs.tolist() == [-0.5, -0.25]
    assert answer.spans == [(2, "3")] and answer.finish_reason["type"] == "stop"
    taken = server.manager.received["generate"]
    assert taken.input_ids == [1, 2] and taken.sampling_params == sampling and taken.return_logprob
    assert server.manager.received["abort_request"] is True


@pytest.mark.parametrize("served", ["ours"], indirect=True)
def test_without_its_keys_an_engine_takes_nothing_that_reads_or_changes_it(served):
    spec, _ = served
    for wrong in (NO_KEYS, Keys("generates", "generates")):
        other = EngineSpec(**{**spec.__dict__, "keys": wrong})
        with EngineControl(other, DEADLINE_SECONDS) as control:
            for call in (
                control.flush_cache, control.withdraw_version, lambda: control.release(["weights"]),
                lambda: control.load_bucket([{"reply": "r", "bucket": "b"}]),
            ):  # fmt: skip
                with pytest.raises(EngineError, match="with status 401"):
                    call()
            assert control.responds(DEADLINE_SECONDS) == (wrong is not NO_KEYS)
