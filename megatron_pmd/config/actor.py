"""Settings of the policy being trained: its model, its precision, its optimizer."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from megatron_pmd.config.frozen import Frozen
from megatron_pmd.config.layout import Layout
from megatron_pmd.errors import ConfigError, LayoutError

Precision = Literal["fp32", "bf16"]
Fp8Recipe = Literal["delayed", "tensorwise", "blockwise", "mxfp8"]
RecomputedModule = Literal["core_attn", "mlp", "moe", "moe_act", "shared_experts", "mla_up_proj"]
LoraTarget = Literal[
    "linear_qkv", "linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "linear_proj", "linear_fc1",
    "linear_fc2",
]  # fmt: skip


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


class Optimizer(Frozen):
    name: Literal["adam", "muon"] = "adam"
    """`muon` updates the matrices of attention, dense layers and experts by Muon, as Kimi K2 was trained, and
    embeddings, output layer, norms and biases by Adam; both at `learning_rate`."""
    learning_rate: PositiveFloat
    warmup_steps: NonNegativeInt = 0
    """Optimizer steps of linear warm-up from 0; constant afterwards."""
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    epsilon: PositiveFloat = 1e-8
    """This and the betas are Adam's, beside Muon too."""
    momentum: float = Field(0.95, ge=0, lt=1)
    """Of `muon`."""
    qk_clip_threshold: PositiveFloat | None = None
    """Needs CUDA unless null, and `muon`. After each step the query and key weights of a head whose largest
    attention score was above this are scaled down to it (QK-clip; 100 in Kimi K2's training)."""
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
        if self.name == "muon":
            for key, given in (("moments", self.moments != "fp32"), ("offload", self.offload)):
                if given:
                    raise ConfigError(
                        f"optimizer.{key}={getattr(self, key)} with optimizer.name=muon: megatron-core has "
                        f"that for Adam alone; leave optimizer.{key} at its default, or set "
                        "optimizer.name=adam"
                    )
        for key in ("momentum", "qk_clip_threshold"):
            if self.name == "adam" and getattr(self, key) != type(self).model_fields[key].default:
                raise ConfigError(
                    f"optimizer.{key}={getattr(self, key)} is a setting of optimizer.name=muon; "
                    "the name is adam"
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


class Lora(Frozen):
    """Low-rank adapters (LoRA, arXiv 2106.09685): the model's weights stay as loaded, and a target's output
    gets `alpha / rank · B A x` added, of which A and B are trained."""

    rank: PositiveInt
    """Columns of B and rows of A; layout.tensor divides it."""
    alpha: PositiveInt
    targets: list[LoraTarget] = []
    """Linear layers that get an adapter, in megatron-core's words; empty: all of these that the model has.
    `linear_fc1` and `linear_fc2` are those of dense layers, of shared experts, and of every expert, each with
    an adapter of its own."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Of the adapters' inputs, in update passes."""

    def targets_in(
        self,
        model: str,
        layout: Layout,
        *,
        latent: bool,
        compressed_queries: bool,
        experts: int | None,
        post_norms: bool,
        biased_experts: bool,
    ) -> list[str]:
        """The linear layers of a model that get an adapter.

        latent: it has latent attention; compressed_queries: also of queries. experts: None or 0 for none.
        post_norms: norms stand behind its attention and feed-forward. biased_experts: experts with biases.

        Raises ConfigError for a target that the model lacks or whose adapter would stand in the wrong place,
        LayoutError for a layout under which adapters would be trained wrongly.
        """
        queries = ["linear_q_up_proj" if compressed_queries else "linear_q_proj", "linear_kv_up_proj"]
        there = [*(queries if latent else ["linear_qkv"]), "linear_proj", "linear_fc1", "linear_fc2"]
        for target in self.targets:
            if target not in there:
                raise ConfigError(f"actor.lora.targets: {model} has no {target}; it has {', '.join(there)}")
        if self.rank % layout.tensor:
            raise LayoutError(f"layout.tensor={layout.tensor} does not divide actor.lora.rank={self.rank}")
        chosen = [name for name in there if name in (self.targets or there)]
        # Megatron-Bridge 0.6.2 has linear and norm in one module, whose output an adapter's is added to
        if post_norms and (before := {"linear_proj", "linear_fc2"} & {*chosen}):
            raise ConfigError(
                f"actor.lora.targets: {model} has a norm behind {' and '.join(sorted(before))}, "
                "and an adapter would be added behind the norm; name linear_qkv, linear_fc1 or both"
            )
        # of those, gpt-oss's, a layer's lie in one transposed tensor, to which Megatron-Bridge 0.6.2
        # (peft_bridge.py, _merge_grouped_export_adapter_weights) adds what is not transposed
        if biased_experts and (inside := {"linear_fc1", "linear_fc2"} & {*chosen}):
            raise ConfigError(
                "actor.lora.targets: Megatron-Bridge cannot merge adapters of "
                f"{' and '.join(sorted(inside))} into the experts of {model}; name linear_qkv, linear_proj "
                "or both"
            )
        # Megatron-Bridge 0.6.2, peft/utils.py, GroupedExpertLinearAdapter: it gathers by torch's all_gather,
        # which no gradient passes, and does not sum the parts of A x that row-parallel ranks compute
        if experts and layout.experts_tensor > 1 and {"linear_fc1", "linear_fc2"} & {*chosen}:
            raise LayoutError(
                f"layout: {layout.experts_tensor} tensor-parallel ranks inside an expert cannot train its "
                "adapters; set layout.expert > 1 and layout.expert_tensor=1, or name layers of attention "
                "alone in actor.lora.targets"
            )
        return chosen


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
    lora: Lora | None = None
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
        if self.lora and self.fp8 and self.fp8.parameter_gather:
            raise ConfigError(
                "actor.lora with actor.fp8.parameter_gather: frozen weights are gathered from nobody; leave "
                "parameter_gather off, and the base is held in bf16 and multiplied in FP8"
            )
        if self.lora and self.fp8 and self.fp8.recipe == "delayed":
            raise ConfigError(
                "actor.lora with actor.fp8.recipe=delayed: a checkpoint holds adapters alone, and the base's "
                "history of maxima would be lost; use tensorwise, blockwise or mxfp8"
            )
        if self.lora and self.experts.bias_update_rate:
            raise ConfigError(
                f"actor.lora with actor.experts.bias_update_rate={self.experts.bias_update_rate:g}: the "
                "routers' biases belong to the base, which stays as loaded; set it to 0"
            )
        return self
