"""Steps of Muon on actor ranks: see tests/actor/launch.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_pmd.config import RunConfig
from tests.actor.actor_programs import Trial, message_of
from tests.actor.tiny_models import OPTIMIZER, STEPS, config_for

MUON = OPTIMIZER.model_copy(update={"name": "muon"})


def muon_config(path: Path, layout: dict[str, int], precision: str = "fp32") -> RunConfig:
    return config_for(path, layout, precision=precision).model_copy(update={"optimizer": MUON})


def train(cases: dict[str, tuple[Path, dict[str, int], Path]]) -> dict[str, Any]:
    """Two steps, a checkpoint, a third step, and the third again after loading; by case."""
    return {name: train_one(muon_config(path, layout), folder) for name, (path, layout, folder) in cases.items()}


def train_one(config: RunConfig, folder: Path) -> dict[str, Any]:
    trial = Trial(config)
    result: dict[str, Any] = {"loaded": trial.weights(), "steps": []}
    for samples in STEPS[:2]:
        step: dict[str, Any] = {}
        with trial.gradient_before_clipping(step):
            step["norm"] = trial.step(samples)[2]
        result["steps"].append(step | {"weights": trial.weights()})
    result["checkpoint"] = trial.save(folder)
    result["third"] = [trial.step(STEPS[2]), trial.weights()]
    trial.actor.load(result["checkpoint"])
    result["third_resumed"] = [trial.step(STEPS[2]), trial.weights()]
    return result


def resume(cases: list[tuple[Path, Path, dict[str, int]]]) -> list[Any]:
    """(model, checkpoint, layout to load under): the third step after loading, and the weights it gives."""
    results = []
    for path, saved, layout in cases:
        trial = Trial(muon_config(path, layout))
        trial.actor.load(saved)
        results.append((trial.step(STEPS[2]), trial.weights()))
    return results


def refused(path: Path, saved: Path) -> tuple[str, str]:
    """What loading says of a checkpoint of another optimizer."""
    trial = Trial(config_for(path))
    return message_of(lambda: trial.actor.load(saved))
