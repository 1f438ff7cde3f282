"""A mixture of experts made from nothing learns sums: two expert-parallel ranks, one engine, a few minutes on two cores."""

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
    WarmStart,
)

ONE_DIGIT_SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_moe_cpu() -> RunConfig:
    """Qwen3-MoE of 3.6 million parameters on reasoning-gym's chain_sum, fp32, after a short supervised warm start."""
    return RunConfig(
        name="tiny_moe_cpu",
        iterations=20,
        model=Model(path="models/tiny-moe", prepare="recipes.tiny_moe_cpu:make_model", precision="fp32"),
        layout=Layout(data=2, expert=2),
        batch=Batch(
            prompts_per_rollout=64,
            samples_per_prompt=16,
            prompts_per_step=16,
            max_tokens_per_microbatch=4096,
            max_prompt_tokens=48,
            max_response_tokens=8,
        ),
        algorithm=Algorithm(baseline="mean", tau=0.1, normaliser="response"),
        optimizer=Optimizer(learning_rate=3e-4),
        actor=Actor(threads_per_rank=1),
        rollout=Rollout(ranks_per_engine=2, max_total_tokens=16384, max_running_requests=128),
        sync=Sync(bucket_megabytes=32),
        data=Data(
            train=ReasoningGymSource(task="chain_sum", size=4000, seed=1, parameters=ONE_DIGIT_SUMS),
            evaluation=ReasoningGymSource(task="chain_sum", size=128, seed=2, parameters=ONE_DIGIT_SUMS),
        ),
        reward=Reward(name="reasoning_gym", workers=1),
        evaluation=Evaluation(prompts=128, samples_per_prompt=2),
        checkpoint=Checkpoint(every=10),
        warm_start=WarmStart(steps=60, learning_rate=1e-3, problems_per_step=64),
    )


def make_model(folder: Path) -> None:
    """Random weights of seed 0, and a tokenizer of characters and of the words in the task's question."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

    special = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    question = "State the final answer to the following arithmetic problem: 1 + 2 - 3 ="
    trainer = trainers.BpeTrainer(
        vocab_size=384, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([question] * 2, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    fast.chat_template = CHAT_TEMPLATE
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=384,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=256,
        moe_intermediate_size=256,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.eos_token_id,
        bos_token_id=None,
        dtype="float32",
    )
    Qwen3MoeForCausalLM(config).float().save_pretrained(folder)
    fast.save_pretrained(folder)
