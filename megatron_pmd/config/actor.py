"""Settings of the policy being trained: its model, its layout over ranks, its optimizer."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from megatron_pmd.config.frozen import Frozen
from megatron_pmd.errors import ConfigError, LayoutError

Precision = Literal["fp32", "bf16"]
Fp8Recipe = Literal["delayed", "tensorwise", "blockwise", "mxfp8"]
RecomputedModule = Literal["core_attn", "mlp", "moe", "moe_act", "shared_experts", "mla_up_proj"]


class Model(Frozen):
    path: str
    """Hugging Face folder: config.json, tokenizer, safetensors."""
    prepare: str | None = None
    """`module:function` called with the path, once, when the folder does not exist yet; makes the model."""
    trust_remote_code: bool = False
    """Run Python that comes with the model folder, in actor ranks and engines, to read its configuration and
    tokenizer."""
    precision: Precision = "bf16"
    """Parameters and compute of actor and engines. The optimizer always keeps fp32 main parameters."""


class Layout(Frozen):
    tensor: PositiveInt = 1
    """Also shards the activations between tensor-parallel layers (sequence parallelism)."""
    context: PositiveInt = 1
    """Ranks that share out the tokens of every sequence."""
    pipeline: PositiveInt = 1
    virtual_pipeline: PositiveInt = 1
    """Chunks of layers a pipeline stage holds; more than 1 interleaves them, which shortens the bubble."""
    expert: PositiveInt = 1
    expert_tensor: PositiveInt | None = None
    """Tensor-parallel size inside an expert; None: 1 with expert parallelism, else `tensor`."""
    data: PositiveInt = 1
    """Data-parallel replicas of the dense layers; the experts' replicas follow from it."""

    @property
    def ranks_per_stage(self) -> int:
        return self.tensor * self.context * self.data

    @property
    def ranks(self) -> int:
        return self.ranks_per_stage * self.pipeline

    @property
    def sequence_multiple(self) -> int:
        """Sequences are padded to a multiple of this: each context rank holds two of 2·context chunks."""
        return 2 * self.context if self.context > 1 else 1

    @property
    def experts_tensor(self) -> int:
        return self.expert_tensor or (1 if self.expert > 1 else self.tensor)

    @property
    def hosts_gather_states(self) -> bool:
        """Whether a checkpoint's optimizer states pass from host to host, not from device to device.

        megatron-core gathers a bucket at a time. Without a pipeline one has some 40 million parameters.
        Behind a pipeline's first stage it is the whole stage: 4 bytes a parameter of it, and of a rank's
        share in it, would come to a device that the optimizer has not left.
        """
        return self.pipeline > 1

    def check_model(
        self,
        model: str,
        *,
        heads: int,
        vocabulary: int,
        key_value_heads: int | None,
        experts: int | None,
        layers: tuple[int, str, int] | None = None,
    ) -> None:
        """Raise LayoutError naming the first thing of the model that the layout does not divide.

        key_value_heads  None with latent attention, which has none
        experts          None or 0 for a dense model
        layers           (how many, setting that divides them, its value), where they are dealt out evenly
        """
        # the vocabulary is not padded: a row more would be a token that no tokenizer has
        rules = [
            ("attention heads", heads, "tensor", self.tensor),
            ("rows of the vocabulary", vocabulary, "tensor", self.tensor),
        ]
        if layers is not None:
            rules.append(("layers", *layers))
        if key_value_heads is not None:
            rules.append(("key-value heads", key_value_heads, "tensor", self.tensor))
        if experts:
            rules.append(("experts", experts, "expert", self.expert))
        elif self.expert > 1:
            raise LayoutError(f"layout.expert={self.expert}, but {model} has no experts")
        for what, count, key, size in rules:
            if count % size:
                raise LayoutError(f"layout.{key}={size} does not divide the {count} {what} of {model}")

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise LayoutError(
                f"layout: virtual_pipeline={self.virtual_pipeline} interleaves the stages of a pipeline; "
                "with pipeline=1 there is one stage"
            )
        if self.ranks_per_stage % (self.expert * self.experts_tensor):
            raise LayoutError(
                f"layout: tensor={self.tensor} x context={self.context} x data={self.data} "
                f"({self.ranks_per_stage} ranks a pipeline stage) cannot hold expert={self.expert} x "
                f"expert_tensor={self.experts_tensor}; choose them so that they divide {self.ranks_per_stage}"
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
    reset_every_iteration: bool = False
    """Forget the moments before each iteration's first step (Kimi K1.5); the learning rate's schedule goes
    on."""
    moments: Precision = "fp32"
    """Needs CUDA and Transformer Engine unless fp32. `bf16` halves Adam's moments in memory (megatron-core's
    precision-aware optimizer)."""
    offload: float = Field(0.0, ge=0, le=1)
    """Needs CUDA unless 0. Share of the optimizer's states, and of its arithmetic, that stays on the host;
    there each rank uses its share of the node's cores."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.offload and self.moments != "fp32":
            raise ConfigError(
                f"optimizer.moments={self.moments} with optimizer.offload={self.offload:g}: the Adam "
                "on the host keeps fp32 moments; choose one of the two"
            )
        return self


class Fp8(Frozen):
    """FP8 matrix multiplications through Transformer Engine; needs CUDA. Attention, embedding, output layer,
    router and norms stay in bf16 or above."""

    recipe: Fp8Recipe
    """How tensors are scaled: `delayed` (history of maxima), `tensorwise` (current maximum), `blockwise`
    (1x128 and 128x128; Hopper), `mxfp8` (1x32; Blackwell)."""
    parameter_gather: bool = False
    """Parameters are held in FP8 and gathered so from the data-parallel ranks."""
    first_layers_bf16: NonNegativeInt = 0
    """Layers at the start that compute in bf16."""
    last_layers_bf16: NonNegativeInt = 0

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.recipe == "delayed" and (self.first_layers_bf16 or self.last_layers_bf16):
            raise ConfigError(
                "actor.fp8: recipe=delayed cannot keep first or last layers in bf16: the maxima of all "
                "layers are reduced at once; use tensorwise, blockwise or mxfp8"
            )
        return self


class Experts(Frozen):
    """Of a mixture of experts; a model without experts refuses what is not the default."""

    dispatcher: Literal["alltoall", "deepep"] = "alltoall"
    """How tokens reach their experts' ranks. `deepep` needs CUDA, DeepEP and layout.expert > 1."""
    replay_routing: bool = False
    """The engines record which experts each token went to, and the actor sends it to the same: in the anchor
    and update passes. 2 bytes a token, layer and chosen expert."""
    bias_update_rate: NonNegativeFloat = 0.0
    """Balancing without auxiliary loss (DeepSeek-V3): after each optimizer step the bias of an expert
    that got fewer tokens than the mean rises by this, of one that got more falls. 0: they stay as loaded."""


class Actor(Frozen):
    threads_per_rank: PositiveInt = 1
    """CPU only: OpenMP threads of each actor rank."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations that the backward pass computes again: of `recompute_modules`, or of whole layers."""
    recompute_modules: list[RecomputedModule] = []
    """With `selective`: which, in megatron-core's words. `moe_act` and `mla_up_proj` need CUDA."""
    recompute_layers: PositiveInt | None = None
    """With `full`: only the first so many layers of each pipeline stage's chunk; null: all."""
    fp8: Fp8 | None = None
    experts: Experts = Experts()
    log_prob_chunk_tokens: PositiveInt = 1024
    """Tokens whose vocabulary-wide fp32 logits exist at one time."""
    timeout_seconds: PositiveFloat = 600.0
    """Deadline of every collective between actor ranks; a rank that misses it stops the run."""
    megatron: dict[str, Any] = {}
    """Further fields of megatron-core's TransformerConfig, by their own names."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if (self.recompute == "selective") != bool(self.recompute_modules):
            raise ConfigError(
                f"actor.recompute={self.recompute} with actor.recompute_modules={self.recompute_modules}: "
                "`selective`, and only that, recomputes the modules named"
            )
        if self.recompute_layers and self.recompute != "full":
            raise ConfigError(
                f"actor.recompute_layers={self.recompute_layers} counts whole layers; actor.recompute is "
                f"{self.recompute}, not full"
            )
        if self.fp8 and self.fp8.recipe == "delayed" and "moe_act" in self.recompute_modules:
            raise ConfigError(
                "actor.recompute_modules: moe_act cannot be recomputed under actor.fp8.recipe=delayed: the "
                "second forward pass would add to the history of maxima"
            )
        return self
