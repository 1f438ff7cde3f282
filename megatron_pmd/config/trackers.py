"""Settings of the programs that show a run's metrics beside its own files and report."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt

from megatron_pmd.config.frozen import Frozen


class Wandb(Frozen):
    project: str
    """Where the run appears, under its own name."""
    entity: str | None = None
    """User or team; None: the account's default."""
    mode: Literal["offline", "online"] = "offline"
    """`offline`: files in the run's folder, which `wandb sync` sends later. `online`: to the server at once;
    the key is the environment's (WANDB_API_KEY, or `wandb login`)."""


class Mlflow(Frozen):
    experiment: str
    """Where the run appears, under its own name."""
    uri: str | None = None
    """Of the tracking server, as `http://HOST:PORT`; None: files in the run's folder, for `mlflow server`."""


class Trackers(Frozen):
    """All are off unless they are set (docs/trackers.md). They may change at a resume."""

    tensorboard: bool = False
    """Write event files into the run's folder."""
    wandb: Wandb | None = None
    mlflow: Mlflow | None = None
    sampled_groups: PositiveInt = 4
    """Prompts of each rollout and evaluation whose responses the trackers show as a table."""
