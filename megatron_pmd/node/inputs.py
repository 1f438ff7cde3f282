"""The user's files, looked at in the first second of a start, before anything is written."""

from __future__ import annotations

from pathlib import Path

from megatron_pmd import plugins
from megatron_pmd.config import REWARDS, RunConfig
from megatron_pmd.data.sources import check_source
from megatron_pmd.data.tokenizer import check_model_folder
from megatron_pmd.errors import DataError, ModelError


def check_inputs(config: RunConfig, replay: Path | None) -> None:
    """Raise what a start would else meet a minute later.

    DataError for a file of problems that is not there or whose first problem cannot be read, ConfigError for
    code of the user's that is not found, ModelError for a folder that is no model's, MissingPackage or
    ConfigError where programs are to be graded and this node, the driver's, cannot make a sandbox. Nothing of
    the user's is run here: the ranks' driver does that.
    """
    if replay is not None and not replay.exists():
        raise DataError(f"--replay {replay}: no such file or folder")
    for source in config.all_sources:
        check_source(source)
    names = {config.reward.name, *(reward.name for reward in config.rewards)}
    for name in names:
        plugins.find(REWARDS.reference(name, what="reward.name"), what="reward.name")
    if "code" in names and replay is None:
        from megatron_pmd.rewards.sandbox import Sandbox, first_sandbox

        with first_sandbox():
            Sandbox(memory_bytes=0).close()
    if config.rollout.function is not None:
        plugins.find(config.rollout.function, what="rollout.function")
    if config.rollout.agent is not None:
        plugins.find(config.rollout.agent.function, what="rollout.agent.function")
    if (prepare := model_to_make(config)) is not None:
        plugins.find(prepare, what="model.prepare")
    else:
        check_model_folder(Path(config.model.path))


def model_to_make(config: RunConfig) -> str | None:
    """model.prepare where the model's folder is not there; None where it is. ModelError if neither is."""
    path = Path(config.model.path)
    if path.exists():
        return None
    if config.model.prepare is None:
        raise ModelError(f"{path}: no such model folder; give model.path, or model.prepare to make one")
    return config.model.prepare
