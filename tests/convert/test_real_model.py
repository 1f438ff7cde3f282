"""SmolLM2-135M, the demo's model: there and back changes no byte, and SGLang serves what comes out."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
import torch

from megatron_pmd.config import Model, Rollout
from megatron_pmd.engine.server import free_port
from megatron_pmd.engine.sglang_server import EngineProcess, EngineSpec
from recipes.smollm2_135m_cpu import make_model
from tests.convert.command_line import convert, tensors

pytestmark = pytest.mark.slow

QUESTIONS = ["What is 3 + 4?", "Name the capital of France.", "Why is the sky blue?"]
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the model as the demo makes it, its Megatron checkpoint, and what that converts to."""
    folder = tmp_path_factory.mktemp("smollm2")
    make_model(folder / "model")
    for words in (
        ("hf-to-megatron", folder / "model", "--out", folder / "megatron", "--verify"),
        ("megatron-to-hf", folder / "megatron", "--out", folder / "hf"),
    ):
        done = convert(*words)
        assert done.returncode == 0, done.stderr
    return folder


def prompts(model: Path) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return [list(tokenizer.apply_chat_template(c, add_generation_prompt=True)["input_ids"]) for c in chats]


@torch.no_grad()
def greedy(model: Path) -> list[list[int]]:
    """New tokens of each prompt, in fp32."""
    from transformers import AutoModelForCausalLM

    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return [
        policy.generate(torch.tensor([p]), do_sample=False, max_new_tokens=NEW_TOKENS)[0, len(p) :].tolist()
        for p in prompts(model)
    ]


def test_every_tensor_of_a_real_model_comes_back_bit_for_bit(folder):
    before, after = tensors(folder / "model"), tensors(folder / "hf")
    assert before.keys() == after.keys() and len(before) == 272
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name


def test_its_tokenizer_comes_with_it(folder):
    assert prompts(folder / "hf") == prompts(folder / "model")


def test_greedy_text_is_the_same_in_transformers_and_in_sglang(folder):
    expected = greedy(folder / "model")
    assert greedy(folder / "hf") == expected
    engine = EngineProcess(
        EngineSpec(
            number=0, model=Model(path=str(folder / "hf"), precision="fp32"), port=free_port(), seed=0,
            rollout=Rollout(max_total_tokens=2048, max_running_requests=4, threads_per_engine=2),
            log=folder / "logs/engine-0.log", cpu=True, load_model_weights=True,
        )
    )  # fmt: skip
    try:
        engine.wait_ready(180)
        request = {"temperature": 0, "max_new_tokens": NEW_TOKENS}
        answers = httpx.post(
            f"{engine.spec.url}/generate",
            json={"input_ids": prompts(folder / "hf"), "sampling_params": request},
            timeout=120, trust_env=False,
        ).json()  # fmt: skip
    finally:
        engine.stop()
    end = {token for answer in expected for token in answer[-1:] if len(answer) < NEW_TOKENS}
    for answer, tokens in zip(answers, expected, strict=True):
        assert [t for t in answer["output_ids"] if t not in end] == [t for t in tokens if t not in end]
