"""What tests/actor/test_lora.py runs on actor ranks: see tests/actor/launch.py."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from megatron.core import dist_checkpointing

from megatron_pmd.actor.cpu import bridge_import
from megatron_pmd.actor.parallel import holds_logits
from megatron_pmd.actor.residency import FrozenWeights
from megatron_pmd.config import Lora
from megatron_pmd.convert.peft_folder import write_adapters
from megatron_pmd.weight_sync.shards import ShardExport
from tests.actor.actor_programs import Trial, message_of
from tests.actor.objective_gradients import whole_gradient
from tests.actor.tiny_models import STEPS, config_for

LORA: dict[str, Any] = dict(rank=4, alpha=6)


def lora_trial(path: Path, layout: dict[str, int] | None = None, **lora: Any) -> Trial:
    return Trial(config_for(path, layout, actor={"lora": LORA | lora}))


def begin(cases: dict[str, tuple[Path, list[str]]], folder: Path) -> dict[str, Any]:
    """Of each model with its targets, in one process: random_adapters(), a checkpoint, measure(), and a step
    before and after another checkpoint was loaded."""
    results = {}
    for name, (path, targets) in cases.items():
        trial, own = lora_trial(path, targets=targets), folder / name
        fresh = trial.actor.log_probs(trial.batch, [list(range(16))]).log_probs
        result: dict[str, Any] = {"fresh": fresh, **random_adapters(trial, path, own)}
        result["saved"] = trial.save(own, 1)
        result |= measure(trial)
        result["keys"] = sorted(dist_checkpointing.load_tensors_metadata(str(result["saved"])))
        result["saved after two steps"] = trial.save(own, 2)
        result["third"] = [trial.step(STEPS[2]), adapters_of(trial)]
        trial.actor.load(result["saved after two steps"])
        result["third_resumed"] = [trial.step(STEPS[2]), adapters_of(trial)]
        results[name] = result
    return results


def families(paths: dict[Path, list[str]], refused: dict[Path, list[str]], folder: Path) -> dict[str, Any]:
    """Of each model, in one process, with its targets: random_adapters(), a checkpoint, measure(); and what
    is said of the targets in `refused`."""
    results: dict[str, Any] = {
        path.name: message_of(partial(lora_trial, path, targets=targets)) for path, targets in refused.items()
    }
    found = {}
    for path, targets in paths.items():
        trial, own = lora_trial(path, targets=targets), folder / path.name
        found[path.name] = random_adapters(trial, path, own) | {"saved": trial.save(own)} | measure(trial)
    return {"refused": results, "measured": found}


def random_adapters(trial: Trial, path: Path, folder: Path) -> dict[str, Any]:
    """Give B random values; the adapters as peft's folder, and the merged weights."""
    torch.manual_seed(1)
    for name, parameter in trial.actor.chunks[0].named_parameters():
        if name.endswith("adapter.linear_out.weight"):
            parameter.data.normal_(std=0.1)
    trial.actor.optimizer.reload_model_params()
    lora = Lora(**LORA, dropout=0.1)  # of which nothing is seen outside training
    lost = write_adapters(trial.actor.export_adapters(), lora, path, folder / "adapters", trial.control)
    return {"adapters": folder / "adapters", "lost": lost, "merged": trial.weights()}


def layouts(
    cases: dict[str, tuple[Path, dict[str, int], list[str], list[Path]]], folder: Path | None = None
) -> dict[str, Any]:
    """Of each model under a layout, with its targets: measure() with the adapters of one process's first
    checkpoint, the third step from the other, if there is one, and what loading says beside another base.

    folder: for a checkpoint behind the two steps of measure(); None: without.
    """
    results = {}
    for name, (path, layout, targets, (saved, *later)) in cases.items():
        trial = lora_trial(path, layout, targets=targets)
        trial.actor.load(saved)
        results[name] = measure(trial)
        if folder is not None:
            results[name]["saved"] = trial.save(folder / name)
        for checkpoint in later:
            trial.actor.load(checkpoint)
            results[name]["third"] = [trial.step(STEPS[2]), adapters_of(trial)]
        results[name]["another base"] = message_of(partial(_on_another_base, trial, saved))
    return results


def go_on(cases: dict[str, tuple[Path, list[str], Path]]) -> dict[str, Any]:
    """Of each model with its targets, in one process: what it reads from a checkpoint, and the third step."""
    results = {}
    for name, (path, targets, saved) in cases.items():
        trial = lora_trial(path, targets=targets)
        trial.actor.load(saved)
        read = adapters_of(trial)
        results[name] = {"read": read, "third": [trial.step(STEPS[2]), adapters_of(trial)]}
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
        "gradients": sum(p.main_grad.numel() for p in parameters if hasattr(p, "main_grad")),
        "held": sum(p.numel() for p in parameters),
        "states": sum(p.numel() for group in actor.optimizer.param_groups for p in group["params"]),
    }
    result["shards"], result["irregular"] = shard_errors(trial)
    step = actor.optimizer.step

    def noted() -> Any:
        gradient = whole_gradient(actor, actor.export_adapters)
        result["gradient"] = gradient if driver else {}
        return step()

    actor.optimizer.step = noted
    first = trial.step(STEPS[0])
    actor.optimizer.step = step
    result["steps"] = [first, trial.step(STEPS[1])]
    result["weights"] = adapters_of(trial)
    after = [p.detach() for p in parameters if not p.requires_grad]
    result["base is as loaded"] = all(map(torch.equal, base, after))
    return result


def adapters_of(trial: Trial) -> dict[str, torch.Tensor]:
    """By peft's names, whole, on rank 0; collective."""
    tensors = {name: tensor.detach().clone() for name, tensor in trial.actor.export_adapters()}
    return tensors if trial.control.is_driver else {}


def shard_errors(trial: Trial) -> tuple[float, list[str]]:
    """The largest difference between what the engines would get of this rank and the bridge's own merged
    export; and the tensors that they get from that export."""
    actor = trial.actor
    export = ShardExport(actor.bridge, actor.chunks, trial.control, actor.shapes)
    export.begin()
    merged = dict(actor.export())
    errors = [0.0]
    for region, shard in export.shards.items():
        held = merged[region.name]
        if region.shape:
            held = held.narrow(region.dim, region.start, region.length)
        errors.append(float((shard.tensor().reshape(held.shape) - held).abs().max()))
    return max(errors), [region.name for region in export.irregular]


def variants(dense: Path, moe: Path, saved: Path, folder: Path) -> dict[str, Any]:
    """What one process does beside the above: see the tests. saved: a checkpoint of dense's adapters."""
    from megatron.bridge.peft import utils  # importable only once an actor has been built

    result: dict[str, Any] = {}
    recomputed: dict[str, dict[str, Any]] = {
        "none": {},
        "full": {"recompute": "full"},
        "selective": {"recompute": "selective", "recompute_modules": ["core_attn", "mlp"]},
    }
    for name, actor in recomputed.items():
        trial = Trial(config_for(dense, actor={"lora": LORA | {"targets": ["linear_fc2"]}, **actor}))
        torch.manual_seed(1)
        for parameter in trained(trial):
            parameter.data.normal_(std=0.1)
        result[f"recompute {name}"] = trial.step(STEPS[0])

    dropping = lora_trial(dense, dropout=0.5)
    dropping.actor.load(saved)
    once, twice = (dropping.actor.log_probs(dropping.batch, [list(range(16))]).log_probs for _ in range(2))
    result["anchors with dropout"] = [once, twice]
    result["losses with dropout"] = [dropping.step(STEPS[0], rate=0.0)[0] for _ in range(2)]

    alone = lora_trial(dense)
    alone.actor.load(saved)
    frozen, cpu = FrozenWeights(alone.actor.chunks), torch.device("cpu")
    steps = []
    for samples in STEPS[:2]:
        steps.append(alone.step(samples))
        frozen.leave(cpu)
        frozen.come_back(cpu)
    result["steps between which the base left"] = steps

    first = lora_trial(moe, targets=["linear_fc1"])
    result["linear_fc1 alone"] = random_adapters(first, moe, folder / "linear_fc1")
    result["linear_fc1 alone"]["log_probs"] = first.actor.log_probs(first.batch, [list(range(16))]).log_probs

    full = Trial(config_for(dense))
    result["errors"] = {
        "another alpha": message_of(lambda: lora_trial(dense, alpha=7).actor.load(saved)),
        "no adapters": message_of(lambda: full.actor.load(saved)),
        "adapters, of a model": message_of(lambda: alone.actor.load(full.save(folder))),
        "another base": message_of(lambda: _on_another_base(lora_trial(dense), saved)),
    }
    with (
        mock.patch.object(bridge_import, "classes_with_adapters"),
        mock.patch.object(utils, "HAVE_TE", False),
    ):
        result["unknown linear"] = message_of(lambda: lora_trial(moe))
    return result


def _on_another_base(trial: Trial, saved: Path) -> None:
    """Load the checkpoint where rank 0 alone holds a frozen weight that is not the saved run's."""
    if trial.control.is_driver:
        next(p for p in trial.actor.chunks[0].parameters() if not p.requires_grad).data[0] += 1
    trial.actor.load(saved)


def trained(trial: Trial) -> list[torch.nn.Parameter]:
    return [p for chunk in trial.actor.chunks for p in chunk.parameters() if p.requires_grad]
