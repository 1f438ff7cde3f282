"""A mixture of experts made from nothing learns to spell backward: two expert-parallel ranks, one engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_pmd.config import (
    Actor,
    Algorithm,
    Batch,
    Checkpoint,
    Data,
    Evaluation,
    Experts,
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
from megatron_pmd.objectives.pmd import Pmd

SHORT_WORDS = {"min_word_len": 3, "max_word_len": 6}
TEMPERATURE = 2.0
"""Of the policy, in training and evaluation: so hot, it errs enough to learn, though it has been taught."""
QUESTION = "Spell this word backward (example: sun -> nus): "
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_moe_cpu() -> RunConfig:
    """Qwen3-MoE of 3.4 million parameters on reasoning-gym's spell_backward, fp32, a short supervised start.

    One wrong letter makes a response wrong: the answer must be exact.
    """
    return RunConfig(
        name="tiny_moe_cpu",
        iterations=40,
        model=Model(path="models/tiny-moe", prepare="recipes.tiny_moe_cpu:make_model", precision="fp32"),
        layout=Layout(data=2, expert=2),
        batch=Batch(
            prompts_per_rollout=64,
            samples_per_prompt=16,
            prompts_per_step=8,
            max_tokens_per_microbatch=4096,
            max_prompt_tokens=16,
            max_response_tokens=8,
        ),
        algorithm=Algorithm(objective=Pmd(normaliser="response"), baseline="mean", tau=0.1),
        optimizer=Optimizer(learning_rate=2e-4),
        # a router that is nearly undecided would else send a token elsewhere than in the engine, and the
        # check after a sync, which takes no such difference in fp32, would stop the run
        actor=Actor(threads_per_rank=1, experts=Experts(replay_routing=True)),
        rollout=Rollout(
            ranks_per_engine=2, temperature=TEMPERATURE, max_total_tokens=16384, max_running_requests=128
        ),
        sync=Sync(bucket_megabytes=32),
        data=Data(
            train=ReasoningGymSource(task="spell_backward", size=1500, seed=1, parameters=SHORT_WORDS),
            evaluation=ReasoningGymSource(task="spell_backward", size=128, seed=2, parameters=SHORT_WORDS),
        ),
        reward=Reward(name="exact", workers=1),
        evaluation=Evaluation(prompts=128, samples_per_prompt=4, temperature=TEMPERATURE),
        checkpoint=Checkpoint(every=25),
        warm_start=WarmStart(steps=300, learning_rate=2e-3, problems_per_step=64),
    )


def make_model(folder: Path) -> None:
    """Random weights of seed 0, and the tokenizer of make_tokenizer."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=128,
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
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        dtype="float32",
    )
    Qwen3MoeForCausalLM(config).float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_tokenizer() -> Any:
    """transformers' tokenizer of single characters, with one token for the task's question."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    characters = [chr(code) for code in range(32, 127)]
    vocabulary = {token: i for i, token in enumerate([*special, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(special)
    # one token: the prompt's letters are what matters
    tokenizer.add_tokens([AddedToken(QUESTION, normalized=False)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast
