"""What an actor's precision computes at one place and in two steps: see test_numbers.py and test_lora.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.fp8_utils import is_float8tensor

from megatron_pmd.actor import model
from megatron_pmd.actor.packing import pack_microbatch
from megatron_pmd.config import RunConfig
from tests.actor.actor_programs import Trial
from tests.actor.lora_programs import measure, random_adapters, trained
from tests.actor.tiny_models import STEPS
from tests.gpu_emulated.programs import routed, to_host


def numbers(
    still: dict[str, tuple[RunConfig, list[list[int]], int]],
    moving: dict[str, RunConfig],
    not_kept: dict[str, RunConfig],
) -> tuple[dict[str, Any], ...]:
    """What one_place and two_steps return, by case; the last ones without model._keep_unrounded."""
    moved = {name: to_host(two_steps(config)) for name, config in moving.items()}
    keep = model._keep_unrounded
    model._keep_unrounded = lambda bridge, chunks: None
    try:
        begun_elsewhere = {name: to_host(two_steps(config)) for name, config in not_kept.items()}
    finally:
        model._keep_unrounded = keep
    return {name: to_host(one_place(*case)) for name, case in still.items()}, moved, begun_elsewhere


def one_place(config: RunConfig, microbatches: list[list[int]], steps: int) -> dict[str, Any]:
    """Of steps that move nothing: loss and whole gradient of the last one and the log-probs after it; and the
    packed rows of the micro-batches."""
    trial, result = routed(config), dict[str, Any]()
    with trial.gradient_before_clipping(result):
        for _ in range(steps):
            loss, count, _ = trial.step_of(microbatches, 0.0)
    report = trial.actor.log_probs(trial.batch, microbatches)
    rows = rows_of(trial, microbatches)
    return result | {"loss": loss / count, "log_probs": report.log_probs, "rows": rows}


def rows_of(trial: Trial, microbatches: list[list[int]]) -> list[dict[str, Any]]:
    """What the actor packs of each micro-batch."""
    return [vars(pack_microbatch(trial.batch, samples, trial.actor._row, "cpu")) for samples in microbatches]


def two_steps(config: RunConfig) -> dict[str, list[Any]]:
    """By parameter: what the model holds before, and after each of two steps; the optimizer's fp32 parameter
    and moments after each; the gradients before clipping. And the norms. FP8 comes back as its values."""
    trial = Trial(config)
    parameters = dict(trial.actor.chunks[0].named_parameters())
    result: dict[str, list[Any]] = {"model": [], "optimizer": [], "gradients": [], "norms": []}

    def values(parameter: torch.Tensor) -> torch.Tensor:
        if is_float8tensor(parameter):
            return parameter.dequantize(dtype=torch.float32)  # type: ignore[call-arg]
        return parameter.float().clone()

    def keep_model() -> None:
        result["model"].append({n: values(p.detach()).cpu() for n, p in parameters.items()})

    def keep_gradients() -> Any:
        result["gradients"].append({n: p.main_grad.cpu().clone() for n, p in parameters.items()})
        return step()

    step = trial.actor.optimizer.step
    trial.actor.optimizer.step = keep_gradients
    keep_model()
    for samples in STEPS[:2]:
        result["norms"].append(trial.step(samples)[2])
        keep_model()
        (part,) = trial.actor.optimizer.chained_optimizers
        states = {n: part._get_main_param_and_optimizer_states(p) for n, p in parameters.items()}
        result["optimizer"].append(
            {n: {key: value.cpu().clone() for key, value in state.items()} for n, state in states.items()}
        )
    return result


def adapters(cases: dict[Any, RunConfig], folder: Path) -> tuple[dict[Any, Any], str]:
    """By case: lora_programs.measure of a model with random adapters, the same for all settings; these as
    peft's folder; and the packed rows of the first step.

    And what a further step of the last one says where Megatron-Bridge may give adapters of experts to
    Transformer Engine.
    """
    results: dict[Any, Any] = {}
    for case, config in cases.items():
        trial = routed(config)
        torch.manual_seed(1)
        for parameter in trained(trial):
            parameter.data.normal_(std=0.1)
        result = random_adapters(trial, Path(config.model.path), folder / ", ".join(case))
        result["rows"] = rows_of(trial, trial.actor.microbatches(trial.batch, np.array(STEPS[0])))
        results[case] = to_host(result | measure(trial))
    from megatron.bridge.peft import utils

    utils.HAVE_TE_PYTORCH_GROUPED_LINEAR_AUTOGRAD = True
    try:
        trial.step(STEPS[0])
    except ValueError as error:
        return results, str(error)
    return results, "works"
