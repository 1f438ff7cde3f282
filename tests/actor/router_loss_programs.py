"""Gradients of the routers' own losses, on actor ranks: see tests/actor/launch.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from megatron_pmd.algorithm.losses import Loss, LossInput, LossTerms
from tests.actor.actor_programs import Trial
from tests.actor.objective_gradients import whole_gradient
from tests.actor.tiny_models import config_for

SETTINGS = {
    "moe_router_load_balancing_type": "aux_loss",
    "moe_aux_loss_coeff": 0.5,
    "moe_z_loss_coeff": 0.25,
}
Rows = list[tuple[list[int], int]]
"""The samples of a row, and how many tokens of padding follow them."""


def _nothing(x: LossInput) -> LossTerms:
    """A loss without a gradient, so that what is left is the routers'."""
    return LossTerms(0.0 * x.log_probs.double().sum(), torch.tensor(x.sequences), {})


def _nothing_by_token(x: LossInput) -> LossTerms:
    return LossTerms(0.0 * x.log_probs.double().sum(), x.counted.sum(), {})


OBJECTIVES = {"sequences": Loss("sequences", _nothing), "tokens": Loss("tokens", _nothing_by_token)}


def router_losses(
    path: Path, layouts: dict[str, dict[str, int]]
) -> dict[str, tuple[Rows, dict[str, dict[str, torch.Tensor]]]]:
    """By layout: this replica's rows, and the whole gradient on rank 0 under each of OBJECTIVES."""
    results = {}
    for name, layout in layouts.items():
        config = config_for(path, layout, actor={"megatron": SETTINGS})
        unclipped = config.optimizer.model_copy(update={"gradient_clip": 1e9})
        trial = Trial(config.model_copy(update={"optimizer": unclipped}))
        microbatches = trial.actor.microbatches(trial.batch, np.arange(16))
        gradients = {}
        for counts, objective in OBJECTIVES.items():
            trial.actor.update(trial.batch, microbatches, trial.anchor, objective, 0.0)
            gradients[counts] = whole_gradient(trial.actor)
        rows = []
        for samples in microbatches:
            lengths = trial.batch.samples.lengths[samples]
            rows.append((samples, trial.actor._row.whole(lengths) - int(lengths.sum())))
        results[name] = rows, gradients if trial.control.is_driver else {}
    return results
