"""A short supervised stage in the same actor: a policy made from nothing needs something to improve on."""

from __future__ import annotations

from typing import Any

import torch

from megatron_pmd.actor.actor import Actor
from megatron_pmd.actor.parallel import Control
from megatron_pmd.algorithm.losses import sft
from megatron_pmd.config import RunConfig
from megatron_pmd.data.problems import Problem
from megatron_pmd.data.prompts import PromptSource
from megatron_pmd.observe.journal import Journal
from megatron_pmd.rollout.samples import RolloutBatch, Sample


def warm_start(
    actor: Actor,
    control: Control,
    config: RunConfig,
    train: PromptSource | None,
    tokenizer: Any,
    journal: Journal | None,
) -> None:
    """Next-token training on the problems' own answers. Collective; only the driver has train and journal.

    The optimizer's moments are forgotten at the end: policy mirror descent starts its own.
    """
    settings = config.warm_start
    assert settings is not None, "called only when the recipe asks for it"
    for step in range(settings.steps):
        batch = control.from_driver(
            _demonstrations(train.take(settings.problems_per_step), tokenizer) if train else None
        )
        microbatches = actor.microbatches(batch, torch.arange(len(batch)).numpy())
        no_anchor = torch.zeros(len(batch.tokens))
        report = actor.update(batch, microbatches, no_anchor, sft, settings.learning_rate)
        reports = control.gather(report)
        if reports is not None and journal is not None:
            loss = sum(r.loss_sum for r in reports) / sum(r.loss_count for r in reports)
            journal.log("warm_start", {"step": step, "loss": loss, "gradient_norm": report.gradient_norm})
    actor.reset_optimizer()


def _demonstrations(problems: list[Problem], tokenizer: Any) -> RolloutBatch:
    samples = []
    for group, problem in enumerate(problems):
        response = [*tokenizer.encode(problem.answer, add_special_tokens=False), tokenizer.eos_token_id]
        samples.append(
            Sample(
                group=group,
                number=0,
                problem=problem.index,
                prompt="",
                response=problem.answer,
                answer=problem.answer,
                prompt_tokens=list(problem.tokens),
                response_tokens=response,
                engine_log_probs=[0.0] * len(response),
                finish_reason="stop",
                weight_version=0,
                seed=0,
            )
        )
    return RolloutBatch.pack(samples)
