"""Settings of the policy being trained: its model, its layout over ranks, its optimizer."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from megatron_pmd.config.frozen import Frozen
from megatron_pmd.errors import LayoutError

Precision = Literal["fp32", "bf16"]


class Model(Frozen):
    path: str
    """Hugging Face folder: config.json, tokenizer, safetensors."""
    prepare: str | None = None
    """`module:function` called with the path, once, when the folder does not exist yet; makes the model."""
    precision: Precision = "bf16"
    """Parameters and compute of actor and engines. The optimizer always keeps fp32 main parameters."""


class Layout(Frozen):
    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1
    expert: PositiveInt = 1
    expert_tensor: PositiveInt | None = None
    """Tensor-parallel size inside an expert; None: 1 with expert parallelism, else `tensor`."""
    data: PositiveInt = 1
    """Data-parallel replicas of the dense layers; the experts' replicas follow from it."""

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline * self.data

    @property
    def experts_tensor(self) -> int:
        return self.expert_tensor or (1 if self.expert > 1 else self.tensor)

    @model_validator(mode="after")
    def _divides(self) -> Self:
        per_stage = self.tensor * self.data
        if per_stage % (self.expert * self.experts_tensor):
            raise LayoutError(
                f"layout: tensor={self.tensor} x data={self.data} ({per_stage} ranks a pipeline stage) "
                f"cannot hold expert={self.expert} x expert_tensor={self.experts_tensor}; "
                f"choose them so that they divide {per_stage}"
            )
        if self.expert == 1 and self.experts_tensor != self.tensor:
            raise LayoutError(
                f"layout: expert_tensor={self.experts_tensor} without expert parallelism must be "
                f"tensor={self.tensor}: megatron-core would not sum the experts' gradients over the "
                "tensor-parallel ranks"
            )
        return self


class Optimizer(Frozen):
    learning_rate: PositiveFloat
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps of linear warm-up from 0; constant afterwards."""
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    epsilon: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    gradient_clip: PositiveFloat = 1.0
    """Global gradient norm is clipped to this."""


class Actor(Frozen):
    threads_per_rank: PositiveInt = 1
    """CPU only: OpenMP threads of each actor rank."""
    recompute: Literal["none", "full"] = "none"
    """`full`: every layer's activations are recomputed in the backward pass."""
    log_prob_chunk_tokens: PositiveInt = 1024
    """Tokens whose vocabulary-wide fp32 logits exist at one time."""
    timeout_seconds: PositiveFloat = 600.0
    """Deadline of every collective between actor ranks; a rank that misses it stops the run."""
    megatron: dict[str, Any] = {}
    """Further fields of megatron-core's TransformerConfig, by their own names."""
