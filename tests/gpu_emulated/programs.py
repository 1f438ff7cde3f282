"""What the tests run on ranks with an emulated device each: see tests/gpu_emulated/launch.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_pmd.batch import RolloutBatch
from megatron_pmd.config import RunConfig
from tests.actor import lora_programs
from tests.actor.actor_programs import OBJECTIVE, Trial, train_one
from tests.actor.tiny_models import STEPS, TEMPERATURE, with_routing
from tools.gpu_check import run_here


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


def train(cases: dict[str, tuple[RunConfig, Path]], watched: str | None = None) -> dict[str, Any]:
    """actor_programs.train_one's results, by case; of the watched one also what is left of losses."""
    results = {name: to_host(train_one(config, folder)) for name, (config, folder) in cases.items()}
    if watched in cases:
        results[watched]["left of losses"] = left_of_losses(cases[watched][0])
    return results


def left_of_losses(config: RunConfig) -> list[tuple[int, ...]]:
    """The shape that each loss of a step has after it, on the stage that computes them; () is its own."""
    trial, losses = Trial(config), list[torch.Tensor]()

    def noting(x: Any) -> Any:
        terms = OBJECTIVE(x)
        losses.append(terms.sum)
        return terms

    microbatches = trial.actor.microbatches(trial.batch, np.array(STEPS[0]))
    trial.actor.update(trial.batch, microbatches, trial.anchor, replace(OBJECTIVE, terms=noting), 0.0)
    return [tuple(loss.shape) for loss in losses]


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
    """By case: what another layout's checkpoint brings, the third step, and the weights that it gives."""
    results = {}
    for name, (config, checkpoint) in cases.items():
        trial = routed(config)
        trial.actor.load(checkpoint)
        loaded = trial.weights()
        results[name] = to_host([loaded, trial.step(STEPS[2]), trial.weights()])
    return results


def gpu_check(name: str, folder: Path) -> dict[str, Any]:
    """Status and figures of one of tools.gpu_check's checks."""
    return run_here(name, folder)


def go_on_twice(config: RunConfig, folder: Path) -> dict[str, Any]:
    """Two steps without and with loading a checkpoint before them, and all counts of a step after a reset."""
    trial = Trial(config)
    trial.step(STEPS[0])
    saved = trial.actor.save(folder, 1, {"iteration": 1})
    trial.actor.publish_checkpoint(wait=True)
    result: dict[str, Any] = {"third": [[trial.step(STEPS[1]), trial.step(STEPS[2])], trial.weights()]}
    trial.actor.load(saved)
    result["third_resumed"] = [[trial.step(STEPS[1]), trial.step(STEPS[2])], trial.weights()]
    trial.actor.reset_optimizer()
    trial.step(STEPS[0])
    (part,) = trial.actor.optimizer.chained_optimizers
    host = [state["step"] for each in part.optimizer.cpu_optimizers for state in each.state.values()]
    device = [group["step"] for group in part.optimizer.gpu_optimizer.param_groups]
    result["counts"] = [{float(step) for step in steps} for steps in (host, device)]
    return to_host(result)


def partition_dimensions(configs: dict[str, RunConfig]) -> dict[str, dict[str, int]]:
    """By optimizer, of latent attention's projections down: the dimension of which they are called parts."""
    return {
        name: {
            parameter: tensor.partition_dim
            for parameter, tensor in Trial(config).actor.chunks[0].named_parameters()
            if "down_proj.weight" in parameter
        }
        for name, config in configs.items()
    }


def begin_adapters(**arguments: Any) -> dict[str, Any]:
    """See lora_programs.begin."""
    return to_host(lora_programs.begin(**arguments))


def adapters_under_layouts(**arguments: Any) -> dict[str, Any]:
    """See lora_programs.layouts."""
    return to_host(lora_programs.layouts(**arguments))


def save_at_once(cases: dict[str, tuple[RunConfig, Path]]) -> dict[str, Any]:
    """By case: two steps without and with loading, before them, a checkpoint of before the first one."""
    results = {}
    for name, (config, folder) in cases.items():
        trial = Trial(config)
        saved = trial.actor.save(folder, 0, {"iteration": 0})
        trial.actor.publish_checkpoint(wait=True)
        result = {"third": [[trial.step(samples) for samples in STEPS[:2]], trial.weights()]}
        fresh = Trial(config)
        fresh.actor.load(saved)
        result["third_resumed"] = [[fresh.step(samples) for samples in STEPS[:2]], fresh.weights()]
        results[name] = to_host(result)
    return results
