"""A real SGLang engine on the CPU: what it computes, how it takes weights, that nothing of it is left behind.

One engine serves the whole module (its start takes 15-45 s); two tests start another, which never gets ready.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest
import torch

from megatron_pmd.config import Model, Rollout
from megatron_pmd.errors import ConfigError, EngineError
from megatron_pmd.rollout.control import EngineControl, resident_bytes
from megatron_pmd.rollout.engine import (
    EngineProcess,
    EngineSpec,
    RouterProcess,
    RouterSpec,
    engine_options,
    free_port,
)
from megatron_pmd.weight_sync.bucket import SharedBucket

pytestmark = [
    pytest.mark.serial,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU engine is for machines without CUDA"),
]

KEY = "a-key-nobody-else-has"
PROMPTS = [[5, 6, 7, 8], [100, 90, 80, 70, 60, 50, 40, 30, 20, 10], [11] * 7, [300]]
START_SECONDS = 180.0


def tiny_qwen3(folder: Path, seed: int):
    """A random two-layer Qwen3, with weights large enough that a wrong one shows in every log-prob."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=2048, tie_word_embeddings=False,
        eos_token_id=2, pad_token_id=0, bos_token_id=None, initializer_range=0.2, dtype="float32",
    )  # fmt: skip
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config).float().eval()
    model.save_pretrained(folder)
    return model


def spec_for(model: Path, folder: Path, **changes) -> EngineSpec:
    rollout = changes.pop("rollout", None) or Rollout(max_total_tokens=8192, max_running_requests=16)
    return EngineSpec(
        number=3, model=Model(path=str(model), precision="fp32"), rollout=rollout, port=free_port(),
        log=folder / "logs" / "engine-3.log", seed=0, cpu=True, **changes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("engine")


@pytest.fixture(scope="module")
def models(folder):
    """Two models of one architecture; the engine starts from the first one's folder, without its weights."""
    return [tiny_qwen3(folder / f"model-{seed}", seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def starting(folder, models):
    engine = EngineProcess(spec_for(folder / "model-0", folder, api_key=KEY))
    yield engine
    engine.stop()


@pytest.fixture(scope="module")
def engine(starting):
    starting.wait_ready(START_SECONDS)
    return starting


@pytest.fixture
def control(engine):
    with EngineControl(engine.spec, timeout_seconds=60) as control:
        yield control


@pytest.fixture
def bucket():
    bucket = SharedBucket(f"test-{os.getpid()}", 1 << 20)
    yield bucket
    bucket.close()


def fill(bucket: SharedBucket, model) -> dict:
    bucket.clear()
    for name, tensor in model.state_dict().items():
        bucket.place(name, tensor)
    return bucket.description()


def update(control: EngineControl, bucket: SharedBucket, model, version: int) -> None:
    """The whole exchange of one iteration, in the order that a GPU needs."""
    control.release(["kv_cache"])
    control.release(["weights"])
    control.resume(["weights"])
    control.begin_update()
    control.load_bucket(fill(bucket, model))
    control.end_update(version)
    control.resume(["kv_cache"])
    control.flush_cache()


def generate(url: str, **sampling) -> list[dict]:
    sampling = {"max_new_tokens": 24, "temperature": 1.0, "ignore_eos": True} | sampling
    request = {"input_ids": PROMPTS, "sampling_params": sampling, "return_logprob": True}
    reply = httpx.post(
        url + "/generate",
        json=request,
        headers={"Authorization": f"Bearer {KEY}"},
        timeout=60,
        trust_env=False,
    )
    assert reply.status_code == 200, reply.text
    return reply.json()


@torch.no_grad()
def largest_difference(model, answers: list[dict], temperature: float = 1.0) -> float:
    """Largest |log-prob of the engine − log-prob of transformers' fp32 forward| over all sampled tokens."""
    worst = 0.0
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        tokens = answer["output_ids"]
        theirs = torch.tensor([entry[0] for entry in answer["meta_info"]["output_token_logprobs"]])
        logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        ours = torch.log_softmax(logits / temperature, -1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        worst = max(worst, (theirs - ours).abs().max().item())
    return worst


def survivors(processes: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Those still running after at most so many seconds; a zombie nobody reaps is dead."""
    deadline = time.monotonic() + seconds
    while True:
        alive = [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        if not alive or time.monotonic() > deadline:
            return alive
        time.sleep(0.1)


# Before the engine is ready: these only need the time of its start.


def test_an_unknown_sglang_option_is_refused_with_the_nearest_name(folder, tmp_path):
    wrong = spec_for(
        folder, tmp_path, rollout=Rollout(max_total_tokens=64, sglang={"chunked_prefil_size": 8})
    )
    with pytest.raises(ConfigError, match=r"rollout\.sglang\.chunked_prefil_size .*chunked_prefill_size"):
        EngineProcess(wrong)
    assert not wrong.log.parent.exists()  # nothing was written, let alone started


def test_an_option_that_follows_a_setting_of_ours_is_refused_by_that_setting(folder):
    taken = spec_for(folder, folder, rollout=Rollout(max_total_tokens=64, sglang={"tp_size": 8}))
    with pytest.raises(ConfigError, match=r"sglang\.tp_size is set by rollout\.tensor_parallel"):
        engine_options(taken)


def test_a_cpu_engine_needs_the_size_of_its_cache(folder):
    with pytest.raises(ConfigError, match=r"rollout\.max_total_tokens must be set"):
        engine_options(spec_for(folder, folder, rollout=Rollout()))


def test_a_call_to_nobody_names_engine_call_and_port(folder):
    spec = spec_for(folder, folder)
    with EngineControl(spec, 5) as control:
        assert not control.health()
        with pytest.raises(EngineError, match=rf"engine 3 .*port {spec.port}\) failed in /model_info"):
            control.weight_version()


def test_a_missed_deadline_names_engine_call_and_port(folder):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        spec = spec_for(folder, folder)
        spec = EngineSpec(**{**vars(spec), "port": silent.getsockname()[1]})
        with (
            EngineControl(spec, 0.3) as control,
            pytest.raises(EngineError, match=r"engine 3 .*/flush_cache within 0\.3 s"),
        ):
            control.flush_cache()


def test_an_engine_that_cannot_start_reports_the_end_of_its_log(starting, tmp_path):
    (tmp_path / "empty").mkdir()
    broken = EngineProcess(spec_for(tmp_path / "empty", tmp_path))
    try:
        with pytest.raises(
            EngineError, match=r"(?s)engine 3 .*exited with status 1 at start.*engine-3\.log.*empty"
        ):
            broken.wait_ready(START_SECONDS)
        assert not broken.alive()
    finally:
        broken.stop()


def test_a_trainer_killed_while_its_engine_starts_leaves_no_process(starting, models, folder, tmp_path):
    """SGLang's children ask to die with their parent only after their imports: this is the time before."""
    program = (
        "import sys, time; from pathlib import Path; from megatron_pmd.config import *\n"
        "from megatron_pmd.rollout.engine import *\n"
        "model, folder = sys.argv[1:]\n"
        "model = Model(path=model, precision='fp32')\n"
        "engine = EngineProcess(EngineSpec(number=0, model=model, seed=0, cpu=True,\n"
        "    rollout=Rollout(max_total_tokens=64), port=free_port(), log=Path(folder) / 'engine.log'))\n"
        "print(engine.pid, flush=True); time.sleep(600)"
    )
    trainer = subprocess.Popen(
        [sys.executable, "-c", program, str(folder / "model-0"), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert trainer.stdout is not None
        warden = psutil.Process(int(trainer.stdout.readline()))
        deadline = time.monotonic() + START_SECONDS
        # warden > server > resource tracker, scheduler, detokenizer
        while len(family := [warden, *warden.children(recursive=True)]) < 5:
            assert time.monotonic() < deadline, (tmp_path / "engine.log").read_text()
            time.sleep(0.05)
    finally:
        trainer.send_signal(signal.SIGKILL)
        trainer.wait()
    assert not survivors(family, seconds=5)


# With the engine.


def test_a_new_engine_serves_no_version(control):
    assert control.health()
    assert control.weight_version() is None


def test_the_api_key_is_required_and_on_no_command_line(engine):
    assert httpx.post(engine.url + "/generate", json={"input_ids": [1]}, trust_env=False).status_code == 401
    warden = psutil.Process(engine.pid)
    assert all(KEY not in " ".join(p.cmdline()) for p in [warden, *warden.children(recursive=True)])
    assert (engine.log.with_name("engine-3.log.yaml").stat().st_mode & 0o777) == 0o600


def test_a_corrupt_bucket_is_refused_by_name_and_the_engine_takes_the_next(control, engine, bucket, models):
    control.begin_update()
    description = fill(bucket, models[1])
    bucket.data[77] ^= 1
    with pytest.raises(EngineError, match=rf"engine 3 .*weight bucket test-{os.getpid()}#1: .*checksum"):
        control.load_bucket(description)
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
        ("model.layers.0.mlp.nonsense.weight", torch.ones(7), "nonsense.weight not found"),
    ]:
        control.begin_update()
        bucket.clear()
        bucket.place(name, tensor)
        with pytest.raises(EngineError, match=reason):
            control.load_bucket(bucket.description())
        assert control.weight_version() is None and engine.alive()


def test_log_probs_equal_transformers_before_and_after_an_update(control, engine, bucket, models):
    for version, model in [(3, models[0]), (4, models[1])]:
        update(control, bucket, model, version)
        for temperature in (1.0, 0.7):
            answers = generate(engine.url, temperature=temperature)
            assert largest_difference(model, answers, temperature) < 1e-4
            assert {answer["meta_info"]["weight_version"] for answer in answers} == {str(version)}
    assert largest_difference(models[0], answers, temperature) > 0.1


def test_greedy_tokens_equal_transformers(control, engine, bucket, models):
    update(control, bucket, models[0], version=5)
    for prompt, answer in zip(PROMPTS, generate(engine.url, temperature=0.0), strict=True):
        tokens = list(prompt)
        for _ in range(24):
            with torch.no_grad():
                tokens.append(int(models[0](torch.tensor([tokens])).logits[0, -1].argmax()))
        assert answer["output_ids"] == tokens[len(prompt) :]


def test_a_stop_token_ends_the_response_and_is_its_last_token(control, engine, bucket, models):
    update(control, bucket, models[0], version=6)
    free = generate(engine.url, temperature=0.0)
    stop = free[0]["output_ids"][3]
    stopped = generate(engine.url, temperature=0.0, stop_token_ids=[stop], ignore_eos=False)[0]
    expected = free[0]["output_ids"][: free[0]["output_ids"].index(stop) + 1]
    assert stopped["output_ids"] == expected
    assert stopped["meta_info"]["finish_reason"]["type"] == "stop"
    assert len(stopped["meta_info"]["output_token_logprobs"]) == len(expected)


def test_resident_memory_counts_the_whole_tree(engine):
    assert resident_bytes(engine.pid) > 500e6  # the warden alone has 10 MB; the scheduler has torch


def test_the_router_passes_tokens_and_log_probs_and_says_when_no_engine_is_left(
    control, engine, bucket, models, folder
):
    """The last test: it stops the module's engine."""
    update(control, bucket, models[0], version=7)
    spec = RouterSpec([engine.url], free_port(), folder / "logs" / "router.log", 60.0, api_key=KEY)
    router = RouterProcess(spec)
    try:
        router.wait_ready(START_SECONDS)
        assert KEY not in " ".join(psutil.Process(router.pid).cmdline())
        assert largest_difference(models[0], generate(router.url)) < 1e-4
        family = [psutil.Process(engine.pid), *psutil.Process(engine.pid).children(recursive=True)]
        engine.stop()
        engine.stop()
        assert not engine.alive() and not survivors(family, seconds=5)
        request = {"input_ids": [1], "sampling_params": {"max_new_tokens": 1}}
        headers = {"Authorization": f"Bearer {KEY}"}
        reply = httpx.post(
            router.url + "/generate", json=request, headers=headers, timeout=60, trust_env=False
        )
        assert reply.status_code in (500, 503)
    finally:
        router.stop()
    with pytest.raises(EngineError, match=r"engine 3 .*died"):
        engine.check_alive()
