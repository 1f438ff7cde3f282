"""An objective by its name in the configuration, evaluated on one micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from megatron_pmd.algorithm.losses import Constants, LossInput, LossTerms, terms
from megatron_pmd.algorithm.mismatch import Weight
from megatron_pmd.config import Objective
from megatron_pmd.config.algorithm import read_objective


def made(name: str, **settings: Any) -> Objective:
    return read_objective({"name": name, **settings})


def evaluated(
    name: str,
    x: LossInput,
    *,
    tau: float | Sequence[float] = 1.0,
    max_response_tokens: int = 1,
    mismatch: Weight | None = None,
    **settings: Any,
) -> LossTerms:
    """tau: of all sequences, or [sequences]. settings: the objective's own, as under algorithm.objective."""
    x = replace(x, tau=torch.tensor(tau, dtype=torch.float64).expand(x.sequences))
    return terms(made(name, **settings), x, Constants(max_response_tokens), mismatch)
