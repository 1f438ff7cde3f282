"""The run as one tree of frozen, validated models. Imports no torch: a login node can plan and launch."""

from megatron_pmd.config.actor import Actor, Experts, Fp8, Layout, Model, Optimizer, Precision
from megatron_pmd.config.data import Data, Evaluation, FileSource, ReasoningGymSource, Reward, Source
from megatron_pmd.config.frozen import Frozen
from megatron_pmd.config.reading import build, known_keys, load, override
from megatron_pmd.config.rollout import Rollout, Sync
from megatron_pmd.config.run import (
    Algorithm,
    Baseline,
    Batch,
    Checkpoint,
    Normaliser,
    RunConfig,
    StopAfter,
    WarmStart,
)

__all__ = [
    "Actor",
    "Algorithm",
    "Baseline",
    "Batch",
    "Checkpoint",
    "Data",
    "Evaluation",
    "Experts",
    "FileSource",
    "Fp8",
    "Frozen",
    "Layout",
    "Model",
    "Normaliser",
    "Optimizer",
    "Precision",
    "ReasoningGymSource",
    "Reward",
    "Rollout",
    "RunConfig",
    "Source",
    "StopAfter",
    "Sync",
    "WarmStart",
    "build",
    "known_keys",
    "load",
    "override",
]
