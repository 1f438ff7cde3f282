"""A real SGLang engine on the CPU: what it computes, how it takes weights, that nothing of it is left behind.

One engine serves the whole module (its start takes 15-45 s); two tests start another, which never gets ready.
"""

from __future__ import annotations

import dataclasses
import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import psutil
import pytest
import torch

from megatron_pmd.config import Rollout
from megatron_pmd.engine import installed_options
from megatron_pmd.engine.control import EngineControl
from megatron_pmd.engine.router import RouterProcess, RouterSpec
from megatron_pmd.engine.server import free_port
from megatron_pmd.engine.sglang_server import EngineProcess, EngineSpec, engine_options
from megatron_pmd.errors import ConfigError, EngineError, MissingPackage
from megatron_pmd.processes import tree_bytes
from tests.engine.live_engine import (
    ADMIN_KEY,
    KEY,
    PROMPTS,
    START_SECONDS,
    bucket,
    control,
    engine,
    folder,
    generate,
    largest_difference,
    models,
    spec_for,
    starting,
    update,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU engine is for machines without CUDA"),
]

FIXTURES = (folder, models, starting, engine, control, bucket)


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
    assert wrong.log is not None and not wrong.log.parent.exists()  # nothing was written, let alone started


def test_a_version_that_keeps_its_options_elsewhere_is_refused_by_its_place(tmp_path, monkeypatch):
    place = SimpleNamespace(submodule_search_locations=[str(tmp_path / "sglang")])
    monkeypatch.setattr(installed_options.importlib.util, "find_spec", lambda name: place)
    with pytest.raises(MissingPackage, match=r"sglang does not declare its options in srt/arg_groups/fields"):
        installed_options.server_options.__wrapped__()


def test_an_option_that_follows_a_setting_of_ours_is_refused_by_that_setting(folder):
    taken = spec_for(folder, folder, rollout=Rollout(max_total_tokens=64, sglang={"tp_size": 8}))
    with pytest.raises(ConfigError, match=r"sglang\.tp_size is set by rollout\.tensor_parallel"):
        engine_options(taken)


def test_a_cpu_engine_needs_the_size_of_its_cache(folder):
    with pytest.raises(ConfigError, match=r"rollout\.max_total_tokens must be set"):
        engine_options(spec_for(folder, folder, rollout=Rollout()))


@pytest.mark.parametrize("trust", [False, True])
def test_code_from_the_model_folder_runs_only_if_the_recipe_says_so(folder, trust):
    spec = spec_for(folder, folder)
    model = spec.model.model_copy(update={"trust_remote_code": True}) if trust else spec.model
    assert engine_options(dataclasses.replace(spec, model=model))["trust_remote_code"] is trust
    named = Rollout(max_total_tokens=64, sglang={"trust_remote_code": True})
    with pytest.raises(ConfigError, match=r"trust_remote_code is set by model\.trust_remote_code"):
        engine_options(spec_for(folder, folder, rollout=named))


def test_fp8_tells_the_engine_what_keeps_its_precision_and_is_refused_on_a_cpu(folder, models):
    spec = spec_for(folder / "model-0", folder, rollout=Rollout(max_total_tokens=64, fp8=True))
    with pytest.raises(ConfigError, match=r"rollout\.fp8 needs CUDA"):
        engine_options(spec)
    overrides = json.loads(engine_options(dataclasses.replace(spec, cpu=False))["json_model_override_args"])
    kept = set(overrides["quantization_config"]["modules_to_not_convert"])
    assert {"lm_head", "model.embed_tokens", "model.norm"} <= kept
    assert overrides["quantization_config"]["weight_block_size"] == [128, 128]
    assert not any(name.endswith(("_proj", ".q_proj")) for name in kept)


def test_a_call_to_nobody_names_engine_call_and_port(folder):
    spec = spec_for(folder, folder)
    with EngineControl(spec, 5) as control:
        assert not control.responds(5)
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
        "from megatron_pmd.engine.server import free_port\n"
        "from megatron_pmd.engine.sglang_server import EngineProcess, EngineSpec\n"
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
        supervisor = psutil.Process(int(trainer.stdout.readline()))
        deadline = time.monotonic() + START_SECONDS
        # supervisor > server > scheduler, detokenizer
        while len(family := [supervisor, *supervisor.children(recursive=True)]) < 4:
            assert time.monotonic() < deadline, (tmp_path / "engine.log").read_text()
            time.sleep(0.05)
    finally:
        trainer.send_signal(signal.SIGKILL)
        trainer.wait()
    assert not survivors(family, seconds=5)


# With the engine.


def test_a_new_engine_serves_no_version(control):
    assert control.responds(30) and control.generates(30)
    assert control.weight_version() is None


UPDATES = (
    "/update_weights_from_tensor", "/update_weights_from_distributed", "/update_weights_from_disk",
    "/begin_weight_update", "/end_weight_update", "/update_weight_version", "/init_weights_update_group",
)  # fmt: skip
CHANGES = (
    *UPDATES,
    "/release_memory_occupation",
    "/resume_memory_occupation",
    "/flush_cache",
    "/abort_request",
)


@pytest.mark.parametrize("path", [*CHANGES, "/generate", "/load_lora_adapter_from_tensors"])
def test_a_call_without_a_key_is_refused(engine, path):
    assert httpx.post(engine.url + path, json={}, trust_env=False).status_code == 401
    wrong = {"Authorization": f"Bearer {KEY}x"}
    assert httpx.post(engine.url + path, json={}, headers=wrong, trust_env=False).status_code == 401


@pytest.mark.parametrize("path", CHANGES)
def test_the_key_of_those_who_generate_does_not_change_an_engine(engine, path):
    headers = {"Authorization": f"Bearer {KEY}"}
    assert httpx.post(engine.url + path, json={}, headers=headers, trust_env=False).status_code == 401


def test_no_key_is_on_a_command_line_or_in_the_log_and_the_file_is_private(engine):
    supervisor = psutil.Process(engine.pid)
    words = [" ".join(p.cmdline()) for p in [supervisor, *supervisor.children(recursive=True)]]
    assert not any(key in text for key in (KEY, ADMIN_KEY) for text in [*words, engine.log.read_text()])
    options = engine.log.with_name("engine-3.log.yaml")
    assert (options.stat().st_mode & 0o777) == 0o600 and ADMIN_KEY in options.read_text()


def test_the_engine_listens_on_loopback_alone(engine):
    """torch's store, by itself, listens on all addresses: engine/contained/."""
    supervisor = psutil.Process(engine.pid)
    family = [supervisor, *supervisor.children(recursive=True)]
    listening = [c.laddr for p in family for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    assert engine.spec.port in {address.port for address in listening}
    assert len(listening) >= 3, "the server, the store, gloo"
    assert {address.ip for address in listening} == {"127.0.0.1"}, listening


def test_the_engine_leaves_no_file_outside_its_own_folder(engine):
    """SGLang has its sockets in /tmp and its load in /dev/shm; test_server.py shows that the folder goes."""
    family = [psutil.Process(engine.pid), *psutil.Process(engine.pid).children(recursive=True)]
    folder = next(p.environ()["TMPDIR"] for p in family[1:] if "TMPDIR" in p.environ())
    assert Path(folder).name.startswith("megatron-pmd-engine-")
    sockets = {c.laddr for p in family for c in p.net_connections("unix") if c.laddr}
    assert sockets and all(path.startswith(folder) for path in sockets), sockets
    mapped = {m.path for p in family for m in p.memory_maps() if "sglang" in Path(m.path).name}
    assert not [path for path in mapped if path.startswith("/dev/shm")], mapped
    assert list(Path(folder).glob("loads-*"))


def test_the_engine_forks_its_processes_and_sglang_would_not(engine):
    """engine/cpu/sglang_cpu_plugin.py. A spawned process would have `multiprocessing` in its command."""
    source = installed_options.sglang_source() / "entrypoints" / "engine.py"
    assert 'mp.set_start_method("spawn", force=True)' in source.read_text(), "the stand-in is needed no more"
    family = psutil.Process(engine.pid).children(recursive=True)
    words = [" ".join(process.cmdline()) for process in family]
    assert len(words) == 3 and not any("multiprocessing" in line for line in words), words


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


def test_a_seed_draws_the_same_tokens_alone_and_among_others(control, engine, bucket, models):
    """A draw could differ where rounding moves a boundary over it: in fp32 none of these 96 does."""
    update(control, bucket, models[1], 9)
    together = [answer["output_ids"] for answer in generate(engine.spec.url, sampling_seed=7)]
    alone = [
        generate(engine.spec.url, prompts=[prompt], sampling_seed=7)[0]["output_ids"] for prompt in PROMPTS
    ]
    assert together == alone
    others = [generate(engine.spec.url, sampling_seed=8), *(generate(engine.spec.url) for _ in range(2))]
    for answers in others:
        assert together != [answer["output_ids"] for answer in answers]


def test_a_stop_token_ends_the_response_and_is_its_last_token(control, engine, bucket, models):
    update(control, bucket, models[0], version=6)
    free = generate(engine.url, temperature=0.0)
    stop = free[0]["output_ids"][3]
    stopped = generate(engine.url, temperature=0.0, stop_token_ids=[stop], ignore_eos=False)[0]
    expected = free[0]["output_ids"][: free[0]["output_ids"].index(stop) + 1]
    assert stopped["output_ids"] == expected
    assert stopped["meta_info"]["finish_reason"]["type"] == "stop"
    assert len(stopped["meta_info"]["output_token_logprobs"]) == len(expected)


def test_the_engine_takes_a_models_words_apart_for_agents(engine):
    """Asked as rollout/agents/model_output.py asks; the engine has no tokenizer."""
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    headers = {"Authorization": f"Bearer {KEY}"}
    for text, rest, calls in (
        (f"So.\n{call}", "So.", [("add", {"a": 1})]),
        ("So.", "So.", []),
        ("<tool_call>\n{broken\n</tool_call>", "", []),
    ):
        body = {"text": text, "tools": tools, "tool_call_parser": "qwen25"}
        found = httpx.post(engine.url + "/parse_function_call", json=body, headers=headers).json()
        assert [(c["name"], json.loads(c["parameters"])) for c in found["calls"]] == calls
        assert found["normal_text"].strip() == rest
    body = {"text": "<think>hm</think>yes", "reasoning_parser": "qwen3"}
    found = httpx.post(engine.url + "/separate_reasoning", json=body, headers=headers).json()
    assert found == {"reasoning_text": "hm", "text": "yes"}


def test_resident_memory_counts_the_whole_tree(engine):
    assert tree_bytes(engine.pid) > 500e6  # the supervisor alone has 10 MB; the scheduler has torch


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
        cached = [
            sum(answer["meta_info"]["cached_tokens"] for answer in generate(router.url, cache_key=key))
            for key in ("7", "7", "8")
        ]
        assert cached[0] == cached[2] == 0 < cached[1], "the engine is told whose cache a request may use"
        for key in ("", "another", ADMIN_KEY):
            stranger = httpx.post(
                router.url + "/generate", json={"input_ids": [1]}, timeout=60, trust_env=False,
                headers={"Authorization": f"Bearer {key}"} if key else {},
            )  # fmt: skip
            assert stranger.status_code == 401, key
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
