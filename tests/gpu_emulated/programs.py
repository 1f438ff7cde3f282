"""What the tests run on ranks with an emulated device each: see tests/gpu_emulated/launch.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.fp8_utils import is_float8tensor

from megatron_pmd.actor.packing import pack_microbatch
from megatron_pmd.batch import RolloutBatch
from megatron_pmd.config import RunConfig
from tests.actor.actor_programs import Trial, train_one
from tests.actor.tiny_models import STEPS, TEMPERATURE, with_routing


def to_host(value: Any) -> Any:
    """The same with every tensor on the CPU, for a reader that has no device."""
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {name: to_host(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(to_host(each) for each in value)
    if hasattr(value, "__dict__"):
        vars(value).update({name: to_host(each) for name, each in vars(value).items()})
    return value


def train(cases: dict[str, tuple[RunConfig, Path]]) -> dict[str, Any]:
    """actor_programs.train_one's results, by case."""
    return {name: to_host(train_one(config, folder)) for name, (config, folder) in cases.items()}


def routed(config: RunConfig) -> Trial:
    """A trial whose experts are those of a recorded routing: a nearly undecided router decides nothing."""
    trial = Trial(config)
    if config.actor.experts.replay_routing:
        reference = torch.load(Path(config.model.path) / "reference.pt", weights_only=False)
        trial.batch = RolloutBatch.pack(with_routing(reference.samples), TEMPERATURE)
    return trial


def step_and_resume(cases: dict[str, tuple[RunConfig, Path]]) -> dict[str, Any]:
    """By case: log-probs, two steps, a checkpoint, the third step, and the third again after loading it."""
    results = {}
    for name, (config, folder) in cases.items():
        trial = routed(config)
        report = trial.actor.log_probs(trial.batch, trial.actor.microbatches(trial.batch, np.arange(16)))
        result: dict[str, Any] = {"log_probs": report.log_probs.cpu(), "loaded_weights": trial.weights()}
        with_gradient = not (config.actor.fp8 and config.actor.fp8.parameter_gather)
        if with_gradient:
            with trial.gradient_before_clipping(result):
                first = trial.step(STEPS[0])
        else:
            first = trial.step(STEPS[0])
        result["steps"] = [first, trial.step(STEPS[1])]
        result["weights"] = trial.weights()
        result["checkpoint"] = trial.actor.save(folder, 2, {"iteration": 2})
        result["third"] = [trial.step(STEPS[2]), trial.weights()]
        trial.actor.publish_checkpoint(wait=True)
        trial.actor.load(result["checkpoint"])
        result["third_resumed"] = [trial.step(STEPS[2]), trial.weights()]
        results[name] = to_host(result)
    return results


def resume(cases: dict[str, tuple[RunConfig, Path]]) -> dict[str, Any]:
    """By case: the third step after loading another layout's checkpoint, and the weights that it gives."""
    results = {}
    for name, (config, checkpoint) in cases.items():
        trial = routed(config)
        trial.actor.load(checkpoint)
        results[name] = to_host([trial.step(STEPS[2]), trial.weights()])
    return results


def numbers(
    still: dict[str, tuple[RunConfig, list[list[int]], int]], moving: dict[str, RunConfig]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What one_place and two_steps return, by case."""
    return (
        {name: to_host(one_place(*case)) for name, case in still.items()},
        {name: to_host(two_steps(config)) for name, config in moving.items()},
    )


def one_place(config: RunConfig, microbatches: list[list[int]], steps: int) -> dict[str, Any]:
    """Of steps that move nothing: loss and whole gradient of the last one and the log-probs after it; and the
    packed rows of the micro-batches."""
    trial, result = routed(config), dict[str, Any]()
    with trial.gradient_before_clipping(result):
        for _ in range(steps):
            loss, count, _ = trial.step_of(microbatches, 0.0)
    report = trial.actor.log_probs(trial.batch, microbatches)
    packed = [pack_microbatch(trial.batch, samples, trial.actor._row, "cpu") for samples in microbatches]
    return result | {
        "loss": loss / count, "log_probs": report.log_probs, "rows": [vars(row) for row in packed],
    }  # fmt: skip


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
