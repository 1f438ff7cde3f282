"""What tests/actor/test_lora.py runs on actor ranks: see tests/actor/launch.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing

from megatron_pmd.actor.parallel import holds_logits
from megatron_pmd.convert.peft_folder import write_adapters
from megatron_pmd.weight_sync.shards import ShardExport
from tests.actor.actor_programs import Trial, message_of, start
from tests.actor.objective_gradients import gather_shards
from tests.actor.tiny_models import STEPS, config_for

LORA: dict[str, Any] = dict(rank=4, alpha=6)


def lora_trial(path: Path, layout: dict[str, int] | None = None, **lora: Any) -> Trial:
    return Trial(config_for(path, layout, actor={"lora": LORA | lora}))


def begin(paths: list[Path], folder: Path) -> dict[str, Any]:
    """Of each model, in one process: adapters with a random B, as a checkpoint and as peft's folder; then
    measure(), and a step before and after a checkpoint was loaded."""
    results = {}
    for path in paths:
        trial, own = lora_trial(path), folder / path.name
        fresh = trial.actor.log_probs(trial.batch, [list(range(16))]).log_probs
        torch.manual_seed(1)
        for name, parameter in trial.actor.chunks[0].named_parameters():
            if name.endswith("adapter.linear_out.weight"):
                parameter.data.normal_(std=0.1)
        trial.actor.optimizer.reload_model_params()
        saved = trial.save(own, 1)
        lora = trial.actor.config.actor.lora
        write_adapters(trial.actor.export_adapters(), lora, path, own / "adapters", trial.control)
        merged = trial.weights()
        result = measure(trial)
        result |= {"fresh": fresh, "saved": saved, "adapters": own / "adapters", "merged": merged}
        result["keys"] = sorted(dist_checkpointing.load_tensors_metadata(str(saved)))
        later = trial.save(own, 2)
        result["third"] = [trial.step(STEPS[2]), adapters_of(trial)]
        trial.actor.load(later)
        result["third_resumed"] = [trial.step(STEPS[2]), adapters_of(trial)]
        results[path.name] = result
    return results


def layouts(cases: dict[str, tuple[Path, dict[str, int], Path]]) -> dict[str, Any]:
    """measure() of each model under a layout, with the adapters of one process's checkpoint."""
    results = {}
    for name, (path, layout, saved) in cases.items():
        trial = lora_trial(path, layout)
        trial.actor.load(saved)
        results[name] = measure(trial)
    return results


def measure(trial: Trial) -> dict[str, Any]:
    """Log-probs, the gradient of the first step, and what two steps leave."""
    actor, driver = trial.actor, trial.control.is_driver
    parameters = [p for chunk in actor.chunks for p in chunk.parameters()]
    base = [p.detach().clone() for p in parameters if not p.requires_grad]
    report = actor.log_probs(trial.batch, actor.microbatches(trial.batch, np.arange(16)))
    result: dict[str, Any] = {
        "log_probs": report.log_probs if holds_logits() else torch.full_like(report.log_probs, torch.nan),
        "trained": sum(p.numel() for p in parameters if p.requires_grad),
        "gradients": sum(buffer.numel_unpadded for buffer in _buffers(actor)),
        "shards": shard_errors(trial),
    }
    step = actor.optimizer.step

    def noted() -> Any:
        result["gradient"] = gradient_of(actor) if driver else gradient_of(actor) and {}
        return step()

    actor.optimizer.step = noted
    first = trial.step(STEPS[0])
    actor.optimizer.step = step
    result["steps"] = [first, trial.step(STEPS[1])]
    result["weights"] = adapters_of(trial)
    after = [p.detach() for p in parameters if not p.requires_grad]
    result["base is as loaded"] = all(map(torch.equal, base, after))
    return result


def _buffers(actor: Any) -> list[Any]:
    return [b for chunk in actor.chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]


def adapters_of(trial: Trial) -> dict[str, torch.Tensor]:
    """By peft's names, whole, on rank 0; collective."""
    tensors = {name: tensor.detach().clone() for name, tensor in trial.actor.export_adapters()}
    return tensors if trial.control.is_driver else {}


def gradient_of(actor: Any) -> dict[str, torch.Tensor]:
    """The adapters' whole gradient by peft's names: it passes through the export, in their place."""
    gather_shards(actor)
    trained = [p for chunk in actor.chunks for p in chunk.parameters() if p.requires_grad]
    weights = [p.detach().clone() for p in trained]
    for parameter in trained:
        parameter.data.copy_(parameter.main_grad)
    gradient = {name: tensor.detach().clone() for name, tensor in actor.export_adapters()}
    for parameter, weight in zip(trained, weights, strict=True):
        parameter.data.copy_(weight)
    return gradient


def shard_errors(trial: Trial) -> float:
    """The largest difference between what the engines would get of this rank and the bridge's own merged
    export."""
    actor = trial.actor
    export = ShardExport(actor.bridge, actor.chunks, trial.control, actor.shapes)
    export.begin()
    assert not export.irregular
    merged = dict(actor.export())
    errors = [0.0]
    for region, shard in export.shards.items():
        held = merged[region.name]
        if region.shape:
            held = held.narrow(region.dim, region.start, region.length)
        errors.append(float((shard.tensor().reshape(held.shape) - held).abs().max()))
    return max(errors)


def refusals(cases: dict[str, tuple[Path, Path, dict[str, Any]]]) -> dict[str, tuple[str, str]]:
    """(model, checkpoint, settings of the adapters) -> the error of loading the checkpoint."""
    start(lora_trial(next(iter(cases.values()))[0]).actor.config.layout)
    found = {}
    for name, (path, saved, lora) in cases.items():
        trial = lora_trial(path, **lora) if lora else Trial(config_for(path))
        found[name] = message_of(lambda trial=trial, saved=saved: trial.actor.load(saved))
    return found
