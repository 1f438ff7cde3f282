"""Settings of the engines, and of the way the weights take to them."""

from __future__ import annotations

from typing import Any

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from megatron_pmd.config.algorithm import Schedule
from megatron_pmd.config.frozen import Frozen


class Rollout(Frozen):
    tensor_parallel: PositiveInt = 1
    """Tensor-parallel size of one engine."""
    ranks_per_engine: PositiveInt | None = None
    """Consecutive actor ranks that share one engine; None: tensor_parallel."""
    temperature: PositiveFloat = 1.0
    """Also divides the actor's logits: π is the policy at this temperature."""
    temperature_schedule: Schedule | None = None
    """Temperature over the iterations, from rollout.temperature."""
    top_p: float = Field(1.0, gt=0, le=1)
    max_running_requests: PositiveInt = 64
    """Requests decoded at one time, per engine."""
    max_total_tokens: PositiveInt | None = None
    """Size of each engine's KV cache; None: SGLang sizes it from free memory (not on a CPU: it takes all)."""
    threads_per_engine: PositiveInt = 1
    """CPU only: OpenMP threads of each engine."""
    start_timeout_seconds: PositiveFloat = 300.0
    request_timeout_seconds: PositiveFloat = 600.0
    """From sending a request to its last token, retries not counted."""
    retries: NonNegativeInt = 5
    """Times one request is sent again after an engine failed it."""
    sglang: dict[str, Any] = {}
    """Further fields of SGLang's ServerArgs, by their own names."""


class Sync(Frozen):
    bucket_megabytes: PositiveInt = 512
    """Weights move to the engines in flattened buckets of this size; two exist at a time."""
    timeout_seconds: PositiveFloat = 300.0
    """Deadline for each bucket, and for the engine's confirmation of the new version."""
    mean_log_prob_difference: PositiveFloat | None = None
    """Bound on mean |log π_actor − log π_engine| of the sampled tokens; None: 1e-5 (fp32), 1e-1 (bf16)."""
    max_log_prob_difference: PositiveFloat | None = None
    """Bound on the largest difference; None: 1e-3 (fp32), 5.0 (bf16)."""
