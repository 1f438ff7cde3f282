"""Random models of a hundred thousand weights, as Hugging Face folders, and a rollout for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_pmd import config as c
from megatron_pmd.batch import NOT_SAMPLED, Sample, Segment

VOCABULARY = 512
TEMPERATURE = 0.8
TAUS = (0.5, 0.2, 1.5, 0.5)
"""Of the four groups: sources of a mixture have each their own."""
# Adam's step divides by √v + ε: with the usual ε a gradient that is zero but for rounding (a key's bias has
# one) would move its weight by a whole learning rate in a random direction, and no two programs would agree.
OPTIMIZER = c.Optimizer(
    learning_rate=2e-4, epsilon=1e-4, weight_decay=0.1, gradient_clip=5.0, beta1=0.9, beta2=0.95
)
MUON_RATES = [3e-4, 1e-4]
"""Of its first two steps: others than the configured, which the schedule sets for both of its optimizers."""
MUON = OPTIMIZER.model_copy(update={"name": "muon"})
STEPS = [list(range(16)), list(range(7, -1, -1)), list(range(16))]
"""The samples of three optimizer steps."""
WEIGHT_TOLERANCE = 1e-6
"""Three steps move a weight by up to 6e-4; fp32 then differs from the float64 reference by 2e-7."""

COMMON: dict[str, Any] = dict(
    vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=128, max_position_embeddings=128, rms_norm_eps=1e-6, initializer_range=0.1,
    dtype="float32",
)  # fmt: skip
QWEN3 = dict(head_dim=16, rope_theta=1e6)
LATENT: dict[str, Any] = dict(
    num_key_value_heads=4, moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
    topk_group=1, first_k_dense_replace=1, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8,
    v_head_dim=12, head_dim=8, routed_scaling_factor=2.5, norm_topk_prob=True, num_nextn_predict_layers=0,
)  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", dict(rope_theta=5e5, tie_word_embeddings=False)),
    "llama3": (
        "Llama",
        dict(
            tie_word_embeddings=False,
            rope_parameters=dict(
                rope_type="llama3", rope_theta=1e4, factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=8192,
            ),
        ),
    ),
    "qwen2": ("Qwen2", dict(rope_theta=1e6, tie_word_embeddings=True)),
    "qwen3": ("Qwen3", dict(QWEN3, tie_word_embeddings=True)),
    "qwen3moe": (
        "Qwen3Moe",
        dict(
            QWEN3, tie_word_embeddings=False, moe_intermediate_size=32, num_experts=4,
            num_experts_per_tok=2, norm_topk_prob=True, decoder_sparse_step=1,
        ),
    ),
    # Moonlight-16B-A3B's shape
    "moonlight": ("DeepseekV3", dict(LATENT, q_lora_rank=None, n_shared_experts=2, rope_theta=5e4)),
    # DeepSeek-V3's, and with one group Kimi-K2's
    "deepseek": (
        "DeepseekV3",
        dict(
            LATENT, q_lora_rank=32, n_group=2, topk_group=1, n_shared_experts=1,
            rope_parameters=dict(
                rope_type="yarn", rope_theta=1e4, factor=40.0, beta_fast=32, beta_slow=1, mscale=1.0,
                mscale_all_dim=0.8, original_max_position_embeddings=16,
            ),
        ),
    ),
}  # fmt: skip


def write_model(folder: Path, family: str, **changes: Any) -> None:
    """A model with random weights; norms and biases are random too, so that a lost one shows."""
    name, settings = FAMILIES[family]
    write(folder, name, {**settings, **changes})


def write(folder: Path, name: str, settings: dict[str, Any]) -> None:
    """As write_model; name: what transformers calls the family's configuration."""
    import transformers

    kind = getattr(transformers, f"{name}Config")
    # of two epsilons in a config.json Megatron-Bridge reads this one; Nemotron's has another name
    common = {key: value for key, value in COMMON.items() if key != "rms_norm_eps" or hasattr(kind, key)}
    config = kind(**{**common, **settings})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim == 1 or key.endswith("_bias"):
                # gpt-oss clamps what lies behind this one to 7 at most
                parameter.add_(torch.randn_like(parameter) * (4.0 if "gate_up" in key else 0.1))
            assert parameter.std() > 0, key
        for key, buffer in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.05)
    model.save_pretrained(folder)


def rollout() -> list[Sample]:
    """Four groups of four samples, 3 to 19 prompt tokens and 1 to 29 response tokens.

    In every third one a token of an earlier weight version and an inserted one do not count in the loss.
    """
    rng = np.random.default_rng(0)

    def tokens(low: int, high: int) -> np.ndarray:
        return rng.integers(0, VOCABULARY - 12, rng.integers(low, high))

    samples = [
        Sample(
            group=i // 4, number=i % 4, problem=i // 4, prompt="", response="", answer="",
            prompt_tokens=tokens(3, 20), response_tokens=tokens(1, 30), engine_log_probs=np.empty(0),
            finish_reason="stop", weight_version=2, seed=0, reward=0.0, advantage=float(rng.normal()),
            tau=TAUS[i // 4],
        )
        for i in range(16)
    ]  # fmt: skip
    for sample in samples[::3]:
        uncounted = [Segment(1, 1, counted=False), Segment(1, NOT_SAMPLED, counted=False)]
        rest = len(sample.response_tokens) - len(uncounted)
        if rest > 0:
            sample.segments = [*uncounted, Segment(rest, 2)]
    assert sum(len(sample.segments) > 1 for sample in samples) >= 4
    return samples


def with_routing(samples: list[Sample], layers: int = 4) -> list[Sample]:
    """The samples as if an engine had sent each token to two of four experts at random, in every layer."""
    rng = np.random.default_rng(4)
    for sample in samples:
        tokens = len(sample.prompt_tokens) + len(sample.response_tokens) - 1
        chosen = rng.random((tokens, layers, 4)).argsort(-1)[..., :2].astype(np.uint16)
        sample.routed_experts = chosen.reshape(tokens, -1)
    return samples


def config_for(model: Path, layout: dict[str, int] | None = None, **changes: Any) -> c.RunConfig:
    """A run of the model with the optimizer and temperature above; `changes` replace whole parts."""
    return c.RunConfig(
        name="test",
        iterations=1,
        model=c.Model(path=str(model), precision=changes.pop("precision", "fp32")),
        layout=c.Layout(**layout or {}),
        batch=c.Batch(
            prompts_per_rollout=4, samples_per_prompt=4, prompts_per_step=4, max_tokens_per_microbatch=100,
            max_prompt_tokens=20, max_response_tokens=30,
        ),
        optimizer=changes.pop("optimizer", OPTIMIZER),
        # chunks shorter than a micro-batch's responses, so that their seams are tested
        actor=c.Actor(log_prob_chunk_tokens=16, **changes.pop("actor", {})),
        rollout=changes.pop("rollout", c.Rollout(temperature=TEMPERATURE)),
        data=c.Data(train=c.ReasoningGymSource(task="chain_sum", size=3)),
        reward=c.Reward(name="exact"),
        **changes,
    )  # fmt: skip
