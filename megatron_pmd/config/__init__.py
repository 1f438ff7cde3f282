"""The run as one tree of frozen, validated models. Imports no torch: a login node can plan and launch."""

from megatron_pmd.config.actor import Actor, Experts, Fp8, Layout, Model, Optimizer, Precision
from megatron_pmd.config.algorithm import (
    Alarm,
    Alarms,
    Algorithm,
    Baseline,
    MismatchWeight,
    Normaliser,
    Objective,
    Ptx,
    Schedule,
)
from megatron_pmd.config.data import (
    Data,
    Evaluation,
    FileSource,
    LengthReward,
    ReasoningGymSource,
    RemoteReward,
    Reward,
    Sampling,
    Source,
)
from megatron_pmd.config.frozen import Frozen
from megatron_pmd.config.reading import build, known_keys, load, override
from megatron_pmd.config.rollout import GroupFilter, PartialRollouts, Repetition, Rollout, Sync
from megatron_pmd.config.run import (
    Batch,
    Checkpoint,
    RunConfig,
    StopAfter,
    WarmStart,
)

__all__ = [
    "Actor",
    "Alarm",
    "Alarms",
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
    "GroupFilter",
    "Layout",
    "LengthReward",
    "MismatchWeight",
    "Model",
    "Normaliser",
    "Objective",
    "Optimizer",
    "PartialRollouts",
    "Precision",
    "Ptx",
    "ReasoningGymSource",
    "RemoteReward",
    "Repetition",
    "Reward",
    "Rollout",
    "RunConfig",
    "Sampling",
    "Schedule",
    "Source",
    "StopAfter",
    "Sync",
    "WarmStart",
    "build",
    "known_keys",
    "load",
    "override",
]
