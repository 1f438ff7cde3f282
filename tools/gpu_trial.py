"""The model, the samples and the steps that gpu_check tries an actor on."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_pmd.config import RunConfig, build, override

COMPARED = {
    "query": "model.layers.0.self_attn.q_proj.weight",
    "an expert": "model.layers.0.mlp.experts.0.down_proj.weight",
    "last norm": "model.norm.weight",
    "output layer": "lm_head.weight",
}
"""The tensors whose gradients are compared, by what the table calls them."""


@dataclass(frozen=True)
class Shape:
    """How large a trial is."""

    tokens: int
    """Of the longest sample."""
    model: dict[str, Any]
    """Of a Qwen3-MoE. FP8 takes multiples of 16, and its blocks of 128."""
    bucket_bytes: int
    response_tokens: int
    """Of a response that an engine samples."""


SHAPES = {
    "small": Shape(
        24,
        dict(
            num_hidden_layers=4, hidden_size=128, intermediate_size=128, moe_intermediate_size=128,
            num_experts=4, num_experts_per_tok=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
            vocab_size=512,
        ),
        2**24,
        16,
    ),
    "large": Shape(
        512,
        dict(
            num_hidden_layers=2, hidden_size=4096, intermediate_size=4096, moe_intermediate_size=1536,
            num_experts=16, num_experts_per_tok=8, num_attention_heads=32, num_key_value_heads=4,
            head_dim=128, vocab_size=32_768,
        ),
        2**30,
        512,
    ),
}  # fmt: skip
"""Large is for a GPU, and of a realistic width; small is for what computes slowly."""


def shape_of(folder: Path) -> Shape:
    """What make_model has written there."""
    return SHAPES[(folder / "shape").read_text()]


def configuration(folder: Path) -> RunConfig:
    """One rank that trains the folder's model in bf16."""
    tokens = shape_of(folder).tokens
    return build(
        {
            "name": "gpu_check",
            "iterations": 1,
            "model": {"path": str(folder / "model"), "precision": "bf16"},
            "batch": {
                "prompts_per_rollout": 4,
                "samples_per_prompt": 4,
                "prompts_per_step": 4,
                "max_tokens_per_microbatch": 8 * tokens,
                "max_prompt_tokens": tokens // 2,
                "max_response_tokens": tokens // 2,
            },
            "optimizer": {"learning_rate": 1e-5},
            "data": {"train": {"kind": "reasoning_gym", "task": "chain_sum", "size": 1}},
            "reward": {"name": "exact"},
        }
    )


def make_model(folder: Path, shape: str, device: str) -> None:
    """Weights of seed 0, a tokenizer, and what transformers gives the samples: log-probabilities, gradients.

    The gradient is that of the step in Trial.steps: at the anchor a response's loss, (τ/2)(s − A/τ)²/|y|, has
    the gradient of −A s/|y|.
    """
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from recipes.tiny_moe_cpu import make_tokenizer

    (folder / "shape").write_text(shape)
    config = Qwen3MoeConfig(
        norm_topk_prob=True, tie_word_embeddings=False, dtype="bfloat16", **SHAPES[shape].model
    )
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    # loaded, for .to(bfloat16) has rounded the rotary frequencies too
    model = Qwen3MoeForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16).eval()
    model.to(device)
    result = []
    drawn = samples(configuration(folder), config.vocab_size)
    for sample in drawn:
        tokens = torch.from_numpy(sample.tokens)[None].long().to(model.device)
        logits = model(tokens).logits[0, len(sample.prompt_tokens) - 1 : -1].float()
        chosen = tokens[0, len(sample.prompt_tokens) :, None]
        log_probs = logits.log_softmax(-1).gather(1, chosen)[:, 0]
        (-sample.advantage * log_probs.mean() / len(drawn)).backward()
        result.append(log_probs.tolist())
    (folder / "reference.json").write_text(json.dumps(result))
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    # transformers has a layer's experts in one tensor
    gradients[COMPARED["an expert"]] = gradients["model.layers.0.mlp.experts.down_proj"][0]
    torch.save({name: gradients[name].cpu() for name in COMPARED.values()}, folder / "gradients.pt")


def samples(config: RunConfig, vocabulary: int) -> list[Any]:
    from megatron_pmd.batch import Sample

    rng = np.random.default_rng(0)
    longest = config.batch.max_response_tokens
    return [
        Sample(
            group=i // 4, number=i % 4, problem=0, prompt="", response="", answer="",
            prompt_tokens=rng.integers(0, vocabulary, rng.integers(2, longest)),
            response_tokens=(response := rng.integers(0, vocabulary, rng.integers(2, longest))),
            engine_log_probs=np.zeros(len(response)), finish_reason="stop", weight_version=0, seed=0,
            advantage=float(rng.normal()),
            tau=0.1,
        )
        for i in range(16)
    ]  # fmt: skip


class Trial:
    """One actor and its samples."""

    def __init__(self, folder: Path, *settings: str) -> None:
        import torch

        cuda = torch.cuda.is_available()
        config = override(configuration(folder), list(settings))
        if not cuda:
            from megatron_pmd.actor.cpu import standins

            standins.install()
        from megatron_pmd.actor.environment import prepare_imports

        if cuda:
            prepare_imports(config)  # before megatron-core imports Transformer Engine, as in the worker
        from megatron_pmd.actor.actor import Actor
        from megatron_pmd.actor.parallel import initialize
        from megatron_pmd.batch import RolloutBatch
        from megatron_pmd.distributed import Control

        single = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        os.environ.update(single)
        initialize(config.layout, seed=0, timeout_seconds=300)
        self.actor = Actor(config, Control(300))
        reference = json.loads((folder / "reference.json").read_text())
        vocabulary = json.loads((folder / "model" / "config.json").read_text())["vocab_size"]
        drawn = samples(config, vocabulary)
        for sample, log_probs in zip(drawn, reference, strict=True):
            sample.engine_log_probs = np.array(log_probs, np.float32)
        self.batch = RolloutBatch.pack(drawn, 1.0)
        self.loss_at_anchor = float(
            np.mean(
                [sample.advantage**2 / (2 * sample.tau * len(sample.response_tokens)) for sample in drawn]
            )
        )
        self.microbatches = self.actor.microbatches(self.batch, np.arange(16))
        self._anchor: Any = None

    def log_probs(self, microbatches: list[list[int]]) -> Any:
        return self.actor.log_probs(self.batch, microbatches)

    def step(self, learning_rate: float) -> Any:
        """One PMD step; the anchor is the policy before the first."""
        from megatron_pmd.algorithm.losses import Constants, loss_of
        from megatron_pmd.objectives.pmd import Pmd

        if self._anchor is None:
            self._anchor = self.log_probs(self.microbatches).log_probs
        loss = loss_of(Pmd(), Constants(max_response_tokens=32))
        return self.actor.update(self.batch, self.microbatches, self._anchor, loss, learning_rate)

    def steps(self, count: int) -> dict[str, float]:
        """PMD steps at learning rate 0: loss and gradient norm of the last, seconds of the median one.

        Of the last, since delayed scaling has no history in the first. At the anchor s = 0, and the loss is
        the mean of A²/2τ|y|; it is more or less where the passes with and without gradient round differently.
        """
        self._anchor = self.log_probs(self.microbatches).log_probs
        seconds, reports = [], []
        for _ in range(count):
            begin = time.monotonic()
            reports.append(self.step(0.0))
            seconds.append(time.monotonic() - begin)
        last = reports[-1]
        loss = last.loss_sum / last.loss_count
        return {
            "loss": loss,
            "loss off the closed form": loss / self.loss_at_anchor - 1,
            "gradient norm": last.gradient_norm,
            "seconds": float(np.median(seconds)),
        }
