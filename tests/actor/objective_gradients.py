"""Gradients of every objective on the real actor, by Hugging Face name: what programs.py runs on the
ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_pmd.actor.actor import Actor, Examples
from megatron_pmd.algorithm.losses import Constants, Loss, loss_of, next_token
from megatron_pmd.algorithm.mismatch import WEIGHTS
from megatron_pmd.config.algorithm import read_objective


def _loss(name: str, mismatch: str = "none", **settings: Any) -> Loss:
    objective = read_objective({"name": name, **settings})
    return loss_of(objective, Constants(max_response_tokens=30), WEIGHTS[objective.counts][mismatch])


OBJECTIVES: dict[str, Loss] = {
    "pmd": _loss("pmd"),
    "pmd, max_response": _loss("pmd", normaliser="max_response"),
    "pmd, none, regression, sequence_tis": _loss(
        "pmd", "sequence_tis", normaliser="none", scaling="regression"
    ),
    "pmd_token": _loss("pmd_token", log_ratio_low=-1.0, log_ratio_high=1.0),
    "reinforce": _loss("reinforce", normaliser="none"),
    "grpo, token_tis": _loss("grpo", "token_tis", kl_coefficient=0.1),
    "gspo": _loss("gspo", clip_low=0.2, clip_high=0.2),
    "cispo": _loss("cispo"),
    "distillation": _loss("distillation"),
    "distillation, sequence": _loss("distillation", "sequence_tis", form="sequence", normaliser="none"),
    "sft": _loss("sft"),
}
WITH_EXAMPLES = "pmd, with examples"
EXAMPLE_WEIGHT = 0.7
SAMPLED = 12
"""Of the sixteen samples; the others are the supervised examples of WITH_EXAMPLES."""

RATES, STUDIED = [4e-3] * 25 + [1e-3] * 10, 4
"""Learning rates of a student's steps, and on how many of the samples it takes them."""

Gradients = dict[str, tuple[float, dict[str, torch.Tensor]]]


def distances(trial: Any) -> list[float]:
    """Mean |log π_θ − log π_T| of the counted tokens before and after some steps of distillation, nats.

    On the same responses all the time: as they are sampled by neither, this is as far off-policy as it gets.
    """
    actor, batch = trial.actor, trial.batch
    microbatches = actor.microbatches(batch, np.arange(STUDIED))
    anchor = actor.log_probs(batch, microbatches).log_probs
    for rate in RATES:
        actor.update(batch, microbatches, anchor, OBJECTIVES["distillation"], rate)
    now = actor.log_probs(batch, microbatches).log_probs
    counted = torch.from_numpy(batch.tokens.counted) & ~now.isnan()
    teacher = torch.from_numpy(batch.tokens.teacher_log_probs)
    return [float((log_probs - teacher)[counted].abs().mean()) for log_probs in (anchor, now)]


def all_gradients(trial: Any) -> Gradients:
    """Mean loss and whole gradient of each objective over the same twelve samples; {} but on rank 0."""
    actor, results = trial.actor, {}
    samples = np.arange(SAMPLED)
    for name, objective in OBJECTIVES.items():
        results[name] = _gradient(trial, objective, samples, None)
    examples = np.arange(SAMPLED, 16)
    policys, trial.batch.temperature = trial.batch.temperature, 1.0
    results["sft of the examples"] = _gradient(trial, next_token, examples, None)
    trial.batch.temperature = policys
    trial.batch.examples = 16 - SAMPLED
    first, last = trial.batch.tokens.offsets[SAMPLED], trial.batch.tokens.offsets[16]
    tokens = int(trial.batch.tokens.counted[first:last].sum())
    beside = Examples(actor.microbatches(trial.batch, examples), EXAMPLE_WEIGHT * SAMPLED / tokens)
    results[WITH_EXAMPLES] = _gradient(trial, OBJECTIVES["pmd"], samples, beside)
    return results if trial.control.is_driver else {}


def _gradient(
    trial: Any, objective: Loss, samples: np.ndarray, examples: Examples | None
) -> tuple[float, dict[str, torch.Tensor]]:
    actor: Actor = trial.actor
    microbatches = actor.microbatches(trial.batch, samples)
    report = actor.update(trial.batch, microbatches, trial.anchor, objective, 0.0, examples)
    sums = trial.control.all_gather((report.loss_sum, report.loss_count))
    loss = sum(s for s, _ in sums) / sum(c for _, c in sums)
    return loss, whole_gradient(actor)


def gather_shards(actor: Actor) -> None:
    """Collective: every replica's gradient buffers get the whole of the reduced gradient."""
    for chunk in actor.chunks:
        for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]:
            for bucket in buffer.buckets:
                # the distributed optimizer's reduce-scatter leaves each rank its own shard of the sum
                group = buffer.data_parallel_group
                shards = list(bucket.grad_data.chunk(group.size()))
                dist.all_gather(shards, shards[group.rank()].clone(), group=group)


def whole_gradient(
    actor: Actor, export: Callable[[], Iterable[tuple[str, torch.Tensor]]] | None = None
) -> dict[str, torch.Tensor]:
    """The gradient that lies reduced in the ranks' buffers, whole, by the export's names. Collective.

    export: of what is trained; None: actor.export, by Hugging Face name. The gradient passes through it in
    the weights' place; they are put back. Buffers of routers come as they are.
    """
    gather_shards(actor)
    parameters = [p for chunk in actor.chunks for p in chunk.parameters() if p.requires_grad]
    weights = [parameter.detach().clone() for parameter in parameters]
    for parameter in parameters:
        parameter.data.copy_(parameter.main_grad)
    gradient = {name: tensor.detach().clone() for name, tensor in (export or actor.export)()}
    for parameter, weight in zip(parameters, weights, strict=True):
        parameter.data.copy_(weight)
    return gradient
