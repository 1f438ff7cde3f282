"""Gradients of every objective on the real actor, by Hugging Face name: what programs.py runs on the
ranks."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_pmd.actor.actor import Actor, Examples
from megatron_pmd.algorithm import losses
from megatron_pmd.algorithm.mismatch import SEQUENCE_WEIGHTS, TOKEN_WEIGHTS

TAU = 0.5
OBJECTIVES: dict[str, losses.Objective] = {
    "pmd": functools.partial(losses.pmd, tau=TAU),
    "pmd, max_response": functools.partial(
        losses.pmd, tau=TAU, normaliser="max_response", max_response_tokens=30
    ),
    "pmd, none, regression, sequence_tis": functools.partial(
        losses.pmd,
        tau=TAU,
        normaliser="none",
        scaling="regression",
        mismatch=SEQUENCE_WEIGHTS["sequence_tis"],
    ),
    "pmd_token": functools.partial(losses.pmd_token, tau=TAU, log_ratio_low=-1.0, log_ratio_high=1.0),
    "reinforce": losses.reinforce,
    "grpo, token_tis": functools.partial(
        losses.grpo, kl_coefficient=0.1, mismatch=TOKEN_WEIGHTS["token_tis"]
    ),
    "gspo": functools.partial(losses.gspo, clip_low=0.2, clip_high=0.2),
    "cispo": losses.cispo,
    "sft": losses.sft,
}
WITH_EXAMPLES = "pmd, with examples"
EXAMPLE_WEIGHT = 0.7
SAMPLED = 12
"""Of the sixteen samples; the others are the supervised examples of WITH_EXAMPLES."""

Gradients = dict[str, tuple[float, dict[str, torch.Tensor]]]


def all_gradients(trial: Any) -> Gradients:
    """Mean loss and whole gradient of each objective over the same twelve samples; {} but on rank 0."""
    actor, results = trial.actor, {}
    samples = np.arange(SAMPLED)
    for name, objective in OBJECTIVES.items():
        results[name] = _gradient(trial, objective, samples, None)
    examples = np.arange(SAMPLED, 16)
    results["sft of the examples"] = _gradient(trial, losses.sft, examples, None)
    trial.batch.examples = 16 - SAMPLED
    first, last = trial.batch.offsets[SAMPLED], trial.batch.offsets[16]
    tokens = int(trial.batch.counted[first:last].sum())
    beside = Examples(actor.microbatches(trial.batch, examples), EXAMPLE_WEIGHT * SAMPLED / tokens)
    results[WITH_EXAMPLES] = _gradient(trial, OBJECTIVES["pmd"], samples, beside)
    return results if trial.control.is_driver else {}


def _gradient(
    trial: Any, objective: losses.Objective, samples: np.ndarray, examples: Examples | None
) -> tuple[float, dict[str, torch.Tensor]]:
    actor: Actor = trial.actor
    microbatches = actor.microbatches(trial.batch, samples)
    report = actor.update(trial.batch, microbatches, trial.anchor, objective, 0.0, examples)
    sums = trial.control.all_gather((report.loss_sum, report.loss_count))
    loss = sum(s for s, _ in sums) / sum(c for _, c in sums)
    return loss, whole_gradient(actor)


def whole_gradient(actor: Actor) -> dict[str, torch.Tensor]:
    """The gradient that lies reduced in the ranks' buffers, whole, by Hugging Face name. Collective.

    It passes through the export, in the weights' place; they are put back. Buffers of routers come as they
    are.
    """
    for chunk in actor.chunks:
        for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
            for bucket in buffer.buckets:
                # the distributed optimizer's reduce-scatter leaves each rank its own shard of the sum
                group = buffer.data_parallel_group
                shards = list(bucket.grad_data.chunk(group.size()))
                dist.all_gather(shards, shards[group.rank()].clone(), group=group)
    parameters = [parameter for chunk in actor.chunks for parameter in chunk.parameters()]
    weights = [parameter.detach().clone() for parameter in parameters]
    for parameter in parameters:
        parameter.data.copy_(parameter.main_grad)
    gradient = {name: tensor.detach().clone() for name, tensor in actor.export()}
    for parameter, weight in zip(parameters, weights, strict=True):
        parameter.data.copy_(weight)
    return gradient
