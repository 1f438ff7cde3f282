"""A short supervised stage in the same actor: a policy made from nothing needs something to improve on."""

from __future__ import annotations

import numpy as np
import torch

from megatron_pmd.algorithm.losses import next_token
from megatron_pmd.batch import RolloutBatch, Sample
from megatron_pmd.data.demonstrations import demonstrations
from megatron_pmd.training.batch_shares import distribute
from megatron_pmd.training.trainer import Trainer


def warm_start(run: Trainer) -> None:
    """Next-token training on the problems' own answers, at temperature 1 whatever the rollouts' is.

    The optimizer's moments are forgotten at the end: policy mirror descent starts its own.
    """
    settings = run.config.warm_start
    assert settings is not None, "called only when the recipe asks for it"
    for step in range(settings.steps):
        described, samples = None, list[Sample]()
        if run.control.is_driver:
            samples = demonstrations(run.problems.train.take(settings.problems_per_step), run.tokenizer)
            described = RolloutBatch.describe(samples, temperature=1.0)
        batch = distribute(described, samples, run.actor.share_of_all, run.control, say=run.log.say)
        microbatches = run.actor.microbatches(batch, np.arange(len(batch)))
        no_anchor = torch.zeros(len(batch.tokens))
        report = run.actor.update(batch, microbatches, no_anchor, next_token, settings.learning_rate)
        reports = run.control.gather(report)
        if reports is not None:
            loss = sum(r.loss_sum for r in reports) / sum(r.loss_count for r in reports)
            values = {"step": step, "loss": loss, "gradient_norm": report.gradient_norm}
            run.log.log("warm_start", values)
    run.actor.reset_optimizer()
