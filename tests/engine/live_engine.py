"""A real SGLang engine on the CPU for the tests of a module (its start takes 10-45 s), and how to ask it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import httpx
import pytest
import torch

from megatron_pmd.config import Model, Rollout
from megatron_pmd.engine.control import EngineControl
from megatron_pmd.engine.keys import Keys
from megatron_pmd.engine.server import free_port
from megatron_pmd.engine.sglang_server import EngineProcess, EngineSpec
from megatron_pmd.weight_sync.bucket import SharedBucket
from tests.weight_sync.filling import fill

KEY, ADMIN_KEY = "a-key-nobody-else-has", "another-for-what-changes-the-engine"
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
    engine = EngineProcess(spec_for(folder / "model-0", folder, keys=Keys(KEY, ADMIN_KEY)))
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


def update(control: EngineControl, bucket: SharedBucket, model, version: int) -> None:
    """The whole exchange of one iteration, in the order that a GPU needs."""
    control.release(["kv_cache"])
    control.release(["weights"])
    control.resume(["weights"])
    control.begin_update()
    control.load_bucket([fill(bucket, model.state_dict())])
    control.end_update(version)
    control.resume(["kv_cache"])
    control.flush_cache()


def generate(
    url: str,
    key: str = KEY,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    cache_key: str | None = None,
    **sampling,
) -> list[dict]:
    """cache_key: only requests of the same one share cached prefixes."""
    sampling = {"max_new_tokens": 24, "temperature": 1.0, "ignore_eos": True} | sampling
    request = {"input_ids": prompts, "sampling_params": sampling, "return_logprob": True}
    request |= {"extra_key": cache_key} if cache_key else {}
    reply = httpx.post(
        url + "/generate",
        json=request,
        headers={"Authorization": f"Bearer {key}"},
        timeout=180,
        trust_env=False,
    )
    assert reply.status_code == 200, reply.text
    return reply.json()


def running_requests(url: str, key: str = KEY) -> int:
    """Responses that the engine is decoding."""
    headers = {"Authorization": f"Bearer {key}"}
    loads = httpx.get(url + "/v1/loads", headers=headers, timeout=10, trust_env=False).json()["loads"]
    return sum(load["num_running_reqs"] for load in loads)


@torch.no_grad()
def log_probs(model, prompt: Sequence[int], tokens: Sequence[int], temperature: float = 1.0) -> torch.Tensor:
    """Of the tokens behind the prompt, by transformers' fp32 forward: [tokens]."""
    logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits / temperature, -1).gather(1, torch.tensor(tokens)[:, None])[:, 0]


def largest_difference(model, answers: list[dict], temperature: float = 1.0) -> float:
    """Largest |log-prob of the engine − log-prob of transformers' fp32 forward| over all sampled tokens."""
    worst = 0.0
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        theirs = torch.tensor([entry[0] for entry in answer["meta_info"]["output_token_logprobs"]])
        ours = log_probs(model, prompt, answer["output_ids"], temperature)
        worst = max(worst, (theirs - ours).abs().max().item())
    return worst
