"""Steps of Muon on actor ranks: see tests/actor/launch.py."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.utils import get_model_config

from megatron_pmd.actor.settings import optimizer_fields
from megatron_pmd.config import RunConfig
from tests.actor.actor_programs import Trial, message_of
from tests.actor.tiny_models import MUON, MUON_RATES, STEPS, config_for
from tests.planner.measured import measure

LOUD_HEAD = 1


def train(cases: dict[str, tuple[Path, dict[str, int], Path]], resumed: Collection[str]) -> dict[str, Any]:
    """Two steps, a checkpoint, a third step, and of some the third again after loading; by case."""
    return {
        name: train_one(config_for(path, layout, optimizer=MUON), folder, resume=name in resumed)
        for name, (path, layout, folder) in cases.items()
    }


def train_one(config: RunConfig, folder: Path, *, resume: bool) -> dict[str, Any]:
    trial = Trial(config)
    result: dict[str, Any] = {"loaded": trial.weights(), "steps": []}
    for samples, rate in zip(STEPS[:2], MUON_RATES, strict=True):
        step: dict[str, Any] = {}
        with trial.gradient_before_clipping(step):
            step["norm"] = trial.step(samples, rate)[2]
        result["steps"].append(step | {"weights": trial.weights()})
    return result | third_step(trial, folder, resume=resume) | {"bytes": measure(trial.actor)}


def third_step(trial: Trial, folder: Path, *, resume: bool) -> dict[str, Any]:
    result: dict[str, Any] = {"checkpoint": trial.save(folder)}
    result["third"] = [trial.step(STEPS[2]), trial.weights()]
    if not resume:
        return result
    trial.actor.load(result["checkpoint"])
    result["third_resumed"] = [trial.step(STEPS[2]), trial.weights()]
    return result


def resume(cases: list[tuple[Path, Path, dict[str, int]]]) -> list[Any]:
    """(model, checkpoint, layout to load under): the third step after loading, and the weights it gives."""
    results = []
    for path, saved, layout in cases:
        trial = Trial(config_for(path, layout, optimizer=MUON))
        trial.actor.load(saved)
        results.append((trial.step(STEPS[2]), trial.weights()))
    return results


def train_and_resume(
    cases: dict[str, tuple[Path, dict[str, int], Path]], saved: list[tuple[Path, Path, dict[str, int]]]
) -> tuple[dict[str, Any], list[Any]]:
    """See train and resume: one launch for both."""
    return train(cases, resumed=()), resume(saved)


def in_one_process(
    path: Path, latent: Path, grouped: Path, folder: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """See train_one and trials: one launch for both."""
    steps = train_one(config_for(path, optimizer=MUON), folder / "one", resume=True)
    return steps, trials(latent, grouped, path, steps["checkpoint"], folder / "bf16")


def trials(latent: Path, grouped: Path, dense: Path, saved: Path, folder: Path) -> dict[str, Any]:
    """What one process can tell beside the steps themselves; `saved` is a checkpoint of Muon's of `dense`."""
    adam = Trial(config_for(dense))
    fp32 = Trial(config_for(dense, optimizer=MUON))
    fields = OptimizerConfig(**optimizer_fields(fp32.actor.config))
    bf16 = Trial(config_for(latent, precision="bf16", optimizer=MUON))
    return {
        "another optimizer": message_of(lambda: adam.actor.load(saved)),
        "megatron-core's own in fp32": message_of(lambda: get_megatron_optimizer(fields, fp32.actor.chunks)),
        "bf16 step": bf16_step(bf16),
        "bf16": third_step(bf16, folder, resume=True),
        "clipped": clipped(bf16),
        "clipped groups": clipped(Trial(config_for(grouped, precision="bf16", optimizer=MUON))),
    }


def bf16_step(trial: Trial) -> dict[str, torch.Tensor]:
    """The fp32 copy of a matrix before and after a step, and the gradient as the optimizer gets it."""
    weight = trial.actor.chunks[0].module.module.decoder.layers[0].self_attention.linear_proj.weight
    before = weight.main_param.clone()
    norm = trial.step(STEPS[0], MUON.learning_rate)[2]
    gradient = weight.main_grad * min(1.0, MUON.gradient_clip / norm)
    return {"before": before, "gradient": gradient, "after": weight.main_param.clone()}


def clipped(trial: Trial) -> dict[str, Any]:
    """Weights before QK-clip, after it, and after a step that moves nothing.

    The largest scores are set here: on a GPU Transformer Engine's attention notes them.
    """
    chunk = trial.actor.chunks[0]
    settings = get_model_config(chunk)
    settings.qk_clip, settings.qk_clip_threshold = True, 100.0
    for layer in chunk.module.module.decoder.layers:
        layer.self_attention.core_attention.current_max_attn_logits = None
    scores = torch.full((settings.num_attention_heads,), 50.0)
    scores[LOUD_HEAD] = 400.0
    chunk.module.module.decoder.layers[0].self_attention.core_attention.current_max_attn_logits = scores
    optimizer = trial.actor.config.optimizer.model_copy(update={"qk_clip_threshold": 100.0})
    # the configuration refuses it on a CPU, whose attention notes no scores
    trial.actor.config = trial.actor.config.model_copy(update={"optimizer": optimizer})
    before = trial.weights()
    trial.step(STEPS[0], rate=0.0)
    after = trial.weights()
    trial.step(STEPS[0], rate=0.0)  # of which no scores are noted
    return {"before": before, "after": after, "kept": trial.weights()}
