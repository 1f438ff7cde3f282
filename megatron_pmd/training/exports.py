"""The policy as a Hugging Face folder, on the way and at the end of a run. Collective."""

from __future__ import annotations

from pathlib import Path

from megatron_pmd.convert.live import write_policy
from megatron_pmd.convert.peft_folder import write_adapters
from megatron_pmd.training.trainer import Trainer


def is_due(run: Trainer, completed: int) -> bool:
    """After so many iterations; the last one's export comes with the end of the run."""
    every = run.config.checkpoint.hf_export_every
    final = run.config.checkpoint.hf_export and completed == run.config.iterations
    return every is not None and completed % every == 0 and not final


def is_missing(run: Trainer) -> bool:
    """Whether a resumed run stands where one was due: its checkpoint is written before the export."""
    completed = run.state.completed
    if not run.state.resumed or not is_due(run, completed):
        return False
    return run.control.from_driver(not all(folder.exists() for folder in _folders(run, completed)))


def write(run: Trainer, completed: int) -> None:
    """Write the policy after so many iterations as a Hugging Face folder; its adapters as one of peft's."""
    folder, *others = _folders(run, completed)
    tensors, names = run.actor.export(), run.actor.shapes.keys()
    model = Path(run.config.model.path)
    untrained = write_policy(tensors, names, model, folder, run.control)
    if untrained:
        run.log.say(
            f"{folder}: {untrained} tensors, of layers that predict further tokens, are not trained: they "
            f"are those of {model}"
        )
    if lora := run.config.actor.lora:
        [adapters] = others
        if lost := write_adapters(run.actor.export_adapters(), lora, model, adapters, run.control):
            run.log.say(f"{adapters}: {lost}")


def _folders(run: Trainer, completed: int) -> list[Path]:
    """That an export makes, each complete or not at all."""
    kinds = ["hf", *(["adapters"] if run.config.actor.lora else [])]
    return [run.folder / kind / f"iteration-{completed}" for kind in kinds]
