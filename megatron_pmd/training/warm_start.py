"""A short supervised stage in the same actor: a policy made from nothing needs something to improve on."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from megatron_pmd.actor.actor import Actor
from megatron_pmd.algorithm.losses import sft
from megatron_pmd.batch import RolloutBatch
from megatron_pmd.config import RunConfig
from megatron_pmd.data.demonstrations import demonstrations
from megatron_pmd.data.prompts import PromptSource
from megatron_pmd.distributed import Control
from megatron_pmd.observe.journal import Journal
from megatron_pmd.training.shares import distribute


def warm_start(
    actor: Actor,
    control: Control,
    config: RunConfig,
    train: PromptSource | None,
    tokenizer: Any,
    journal: Journal | None,
) -> None:
    """Next-token training on the problems' own answers, at temperature 1 whatever the rollouts' is.

    Collective; only the driver has train and journal.

    The optimizer's moments are forgotten at the end: policy mirror descent starts its own.
    """
    settings = config.warm_start
    assert settings is not None, "called only when the recipe asks for it"
    for step in range(settings.steps):
        samples = demonstrations(train.take(settings.problems_per_step), tokenizer) if train else []
        batch = distribute(
            RolloutBatch.describe(samples, temperature=1.0) if train else None,
            samples,
            lambda batch: actor.share(batch, [np.arange(len(batch))]),
            control,
        )
        microbatches = actor.microbatches(batch, np.arange(len(batch)))
        no_anchor = torch.zeros(len(batch.tokens))
        report = actor.update(batch, microbatches, no_anchor, sft, settings.learning_rate)
        reports = control.gather(report)
        if reports is not None and journal is not None:
            loss = sum(r.loss_sum for r in reports) / sum(r.loss_count for r in reports)
            journal.log("warm_start", {"step": step, "loss": loss, "gradient_norm": report.gradient_norm})
    actor.reset_optimizer()
