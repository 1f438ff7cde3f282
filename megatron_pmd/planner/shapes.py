"""A model's shape and its parameters, from the fields of a Hugging Face config.json. Imports no torch.

The shapes of the recipes' models are data, models.json: a login node has neither the weights nor the hub.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_pmd.config import RunConfig
from megatron_pmd.errors import ModelError, UncountedModel
from megatron_pmd.files import read_object

MODELS = Path(__file__).with_name("models.json")

FAMILIES = (
    "gemma", "gemma2", "gemma3_text", "llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "deepseek_v3",
    "kimi_k2", "nemotron", "gpt_oss", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text",
)  # fmt: skip
WITH_LINEAR_ATTENTION = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
"""Those of some layers whose attention is linear, and of the others gated."""


@dataclass(frozen=True)
class Attention:
    """Parameters of one layer's attention by how tensor parallelism treats them, and what it caches."""

    split: int
    """Parameters that tensor parallelism divides."""
    replicated: int
    """Parameters that every tensor-parallel rank holds: norms, down-projections of latent attention."""
    cached_values: int
    """Numbers the KV cache keeps for one token in this layer, over all heads; 0 for linear attention."""
    cache_heads: int
    """Into how many parts those can be divided among ranks: key-value heads; 1 for latent attention."""
    query_values: int
    """Width of the attention's output before its last projection: heads x value width."""
    score_width: int
    """heads x (query-key width + value width): operations of one token with one other are twice this."""
    heads: int
    key_value_heads: int | None
    """None for latent attention, whose heads share one."""
    linears: dict[str, tuple[int, int]]
    """Widths of input and output of the linear layers that can have an adapter, by megatron-core's names."""
    split_vectors: int
    """Of `split`, what is no matrix: biases, sinks."""
    replicated_vectors: int
    """Of `replicated`: norms."""


@dataclass(frozen=True)
class FeedForward:
    """Widths of the feed-forward parts, and who has experts."""

    dense_intermediate: int
    """Width in layers without experts."""
    dense_layers: int
    """The first so many layers have no experts."""
    experts: int
    experts_per_token: int
    expert_intermediate: int
    shared_intermediate: int
    """Width of the experts that see every token, together."""
    matrices: int = 3
    """Of each part: gate, up and down, or 2 without a gate."""
    expert_biases: int = 0
    """Parameters of one expert's biases."""
    router_biases: int = 0
    gated_shared: bool = False
    """The shared experts' output has a gate, a row of the hidden width."""


@dataclass(frozen=True)
class Norms:
    """Those of the hidden width; norms of queries and keys are the attention's."""

    each: int
    """Parameters of one: the weight, and the bias of a LayerNorm."""
    in_layer: int = 2
    """4 where others stand behind attention and feed-forward."""


@dataclass(frozen=True)
class Embeddings:
    """The model's two ends."""

    vocabulary: int
    tied: bool
    """Whether both ends are one matrix."""


@dataclass(frozen=True)
class LinearLayers:
    """Layers whose attention has a state in place of a cache."""

    numbers: frozenset[int]
    attention: Attention


@dataclass(frozen=True)
class Shape:
    """What of a model decides its memory and its arithmetic."""

    name: str
    source: str
    embeddings: Embeddings
    hidden: int
    layers: int
    attention: Attention
    feed_forward: FeedForward
    norms: Norms
    context_limit: int
    """Positions the model was made for."""
    linear: LinearLayers | None = None
    """`attention` is that of the others."""

    @property
    def vocabulary(self) -> int:
        return self.embeddings.vocabulary

    def attention_of(self, layer: int) -> Attention:
        linear = self.linear
        return linear.attention if linear is not None and layer in linear.numbers else self.attention

    @property
    def caching_layers(self) -> int:
        """Layers with a KV cache."""
        return self.layers - (len(self.linear.numbers) if self.linear else 0)

    def feed_forward_of(self, layer: int) -> tuple[int, int, int]:
        """(split, replicated, routed experts') parameters of one layer's feed-forward part."""
        part = self.feed_forward
        each = part.matrices * self.hidden
        if layer < part.dense_layers:
            return each * part.dense_intermediate, 0, 0
        router = self.hidden * part.experts + part.router_biases
        router += self.hidden if part.gated_shared else 0
        return each * part.shared_intermediate, router, self.routed

    def adapters(self, layer: int, rank: int, targets: list[str]) -> tuple[int, int]:
        """(dense, routed experts') parameters of a layer's adapters; tensor parallelism divides them all."""
        part = self.feed_forward
        linears = self.attention_of(layer).linears
        dense = sum(sum(widths) for name, widths in linears.items() if name in targets)
        width = part.dense_intermediate if layer < part.dense_layers else part.shared_intermediate

        def both(width: int) -> int:
            """Of gate and up, one linear layer, and of the one behind them."""
            first, second = self.hidden + (part.matrices - 1) * width, width + self.hidden
            return ("linear_fc1" in targets) * first + ("linear_fc2" in targets) * second

        experts = part.experts if layer >= part.dense_layers else 0
        return rank * (dense + (both(width) if width else 0)), rank * experts * both(part.expert_intermediate)

    def targets(self, config: RunConfig) -> list[str]:
        """Lora.targets_in of this model."""
        assert config.actor.lora is not None
        return config.actor.lora.targets_in(
            self.name,
            config.layout,
            latent=self.attention.key_value_heads is None,
            compressed_queries="linear_q_up_proj" in self.attention.linears,
            experts=self.feed_forward.experts,
            post_norms=self.norms.in_layer > 2,
            biased_experts=self.feed_forward.expert_biases > 0,
        )

    @property
    def routed(self) -> int:
        """Parameters of one layer's routed experts."""
        part = self.feed_forward
        return part.experts * part.matrices * self.hidden * part.expert_intermediate + self.routed_vectors

    @property
    def routed_vectors(self) -> int:
        """Of `routed`, what is no matrix: biases."""
        return self.feed_forward.experts * self.feed_forward.expert_biases

    def replicated_vectors(self, layer: int) -> int:
        """Parameters of a layer that every tensor-parallel rank holds, and that are no matrix."""
        router = self.feed_forward.router_biases if layer >= self.feed_forward.dense_layers else 0
        return self.attention_of(layer).replicated_vectors + router + self.norms.in_layer * self.norms.each

    @property
    def ends(self) -> int:
        """Parameters of the embedding and of the output layer, once where they are tied."""
        return self.embedding * (1 if self.embeddings.tied else 2)

    @property
    def embedding(self) -> int:
        return self.vocabulary * self.hidden

    def layer(self, number: int) -> tuple[int, int, int]:
        """(split, replicated, routed experts') parameters of a whole layer, its norms included."""
        split, replicated, routed = self.feed_forward_of(number)
        attention = self.attention_of(number)
        return (
            split + attention.split,
            replicated + attention.replicated + self.norms.in_layer * self.norms.each,
            routed,
        )

    @property
    def total(self) -> int:
        """Parameters as a checkpoint has them: tied embeddings once, no expert-bias buffers."""
        ends = self.ends + self.norms.each
        return ends + sum(sum(self.layer(number)) for number in range(self.layers))

    @property
    def outside_matrices(self) -> int:
        """Parameters that Muon leaves to Adam: embeddings, output layer, norms and biases."""
        ends = self.ends + self.norms.each
        sparse = self.layers - self.feed_forward.dense_layers
        vectors = sum(self.replicated_vectors(layer) for layer in range(self.layers))
        vectors += sum(self.attention_of(layer).split_vectors for layer in range(self.layers))
        return ends + vectors + sparse * self.routed_vectors

    @property
    def active(self) -> int:
        """Parameters that one token passes: all but the experts it is not routed to."""
        part = self.feed_forward
        if not part.experts:
            return self.total
        idle = self.routed * (part.experts - part.experts_per_token) // part.experts
        return self.total - idle * (self.layers - part.dense_layers)


def shape_of(path: str) -> Shape:
    """The shape of the model at model.path: its config.json where the folder exists, else from models.json.

    Raises ModelError for a model that is neither there nor known, or of a family this module cannot count.
    """
    file, name = Path(path) / "config.json", Path(path).name
    if (described := read_object(file)) is not None:
        return from_config(name, str(file), described)
    known = json.loads(MODELS.read_text())
    if name not in known:
        raise ModelError(
            f"{path}: no such model folder, and no known shape is called {name} "
            f"(there are: {', '.join(known)}); "
            "put the model's config.json there"
        )
    return from_config(name, known[name]["source"], known[name]["config"])


def from_config(name: str, source: str, config: dict[str, Any]) -> Shape:
    """Read the fields of a Hugging Face config.json. Raises UncountedModel for another family."""
    family = config.get("model_type")
    if family not in FAMILIES:
        raise UncountedModel(f"{source}: cannot count a model of type {family}; known: {', '.join(FAMILIES)}")
    latent = family in ("deepseek_v3", "kimi_k2")
    # transformers 5 writes num_local_experts where the published files of Qwen say num_experts
    names = ("n_routed_experts", "num_experts", "num_local_experts")
    experts = next((config[name] for name in names if config.get(name)), 0)
    if not latent and (config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1):
        raise ModelError(f"{source}: layers without experts between layers with experts cannot be counted")
    width = config.get("moe_intermediate_size") or config["intermediate_size"]
    shared = config.get("shared_expert_intermediate_size") if family in WITH_LINEAR_ATTENTION else None
    biased, hidden, layers = family == "gpt_oss", config["hidden_size"], config["num_hidden_layers"]
    linear = _linear_layers(config) if family in WITH_LINEAR_ATTENTION else frozenset()
    return Shape(
        name=name,
        source=source,
        # published files of Gemma leave tie_word_embeddings out
        embeddings=Embeddings(
            config["vocab_size"], config.get("tie_word_embeddings", family.startswith("gemma"))
        ),
        hidden=hidden,
        layers=layers,
        attention=_latent_attention(config) if latent else _grouped_attention(family, config),
        feed_forward=FeedForward(
            # Qwen3.5-MoE has no dense layer, and says no width of one
            dense_intermediate=config.get("intermediate_size", 0) if experts else config["intermediate_size"],
            dense_layers=config.get("first_k_dense_replace", 0) if experts else layers,
            experts=experts,
            experts_per_token=config.get("num_experts_per_tok", 0) if experts else 0,
            expert_intermediate=width if experts else 0,
            shared_intermediate=shared or (config.get("n_shared_experts") or 0) * width,
            matrices=2 if family == "nemotron" else 3,
            expert_biases=2 * width + hidden if biased else 0,
            router_biases=experts if biased else 0,
            gated_shared=bool(shared),
        ),
        norms=Norms(
            each=2 * hidden if family == "nemotron" else hidden,
            in_layer=4 if family in ("gemma2", "gemma3_text") else 2,
        ),
        context_limit=config.get("max_position_embeddings", 0),
        linear=LinearLayers(linear, _linear_attention(config)) if linear else None,
    )


def _linear_layers(config: dict[str, Any]) -> frozenset[int]:
    """By layer_types, which transformers writes, or by what the published files have in their place."""
    every, layers = config.get("full_attention_interval", 4), range(config["num_hidden_layers"])
    kinds = config.get("layer_types") or [
        "linear_attention" if (layer + 1) % every else "full_attention" for layer in layers
    ]
    return frozenset(layer for layer in layers if kinds[layer] == "linear_attention")


def _grouped_attention(family: str, config: dict[str, Any]) -> Attention:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    groups = config.get("num_key_value_heads") or heads
    width = config.get("head_dim") or hidden // heads
    # of a gated output the gate comes out of the same matrix as the queries
    queries = heads * (2 if family in WITH_LINEAR_ATTENTION else 1)
    projections = hidden * width * (queries + 2 * groups) + heads * width * hidden
    biases = width * (heads + 2 * groups) if family == "qwen2" or config.get("attention_bias") else 0
    if config.get("attention_bias") and family != "qwen2":
        biases += hidden  # the output projection has one too
    biases += heads if family == "gpt_oss" else 0  # a sink each
    norms = 2 * width if family.startswith(("gemma3", "qwen3")) else 0
    return Attention(
        split=projections + biases,
        replicated=norms,
        cached_values=2 * groups * width,
        cache_heads=groups,
        query_values=heads * width,
        score_width=2 * heads * width,
        heads=heads,
        key_value_heads=groups,
        linears={
            "linear_qkv": (hidden, width * (queries + 2 * groups)),
            "linear_proj": (heads * width, hidden),
        },
        split_vectors=biases,
        replicated_vectors=norms,
    )


def _linear_attention(config: dict[str, Any]) -> Attention:
    """A gated delta net: megatron-core's in_proj makes queries, keys, values, gate and two numbers a head."""
    hidden, heads = config["hidden_size"], config["linear_num_value_heads"]
    keys = config["linear_num_key_heads"] * config["linear_key_head_dim"]
    values = heads * config["linear_value_head_dim"]
    mixed = 2 * keys + values
    vectors = (
        2 * heads + mixed * config["linear_conv_kernel_dim"]
    )  # A_log, dt_bias; a filter for each channel
    return Attention(
        split=hidden * (mixed + values + 2 * heads) + values * hidden + vectors,
        replicated=config["linear_value_head_dim"],
        cached_values=0,
        cache_heads=1,
        query_values=values,
        score_width=mixed + values,
        heads=heads,
        key_value_heads=config["linear_num_key_heads"],
        linears={},
        split_vectors=vectors,
        replicated_vectors=config["linear_value_head_dim"],
    )


def _latent_attention(config: dict[str, Any]) -> Attention:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    key = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
    latent, compressed = config["kv_lora_rank"], config.get("q_lora_rank")
    down = hidden * (latent + config["qk_rope_head_dim"])
    up_width = heads * (config["qk_nope_head_dim"] + config["v_head_dim"])
    up = latent * up_width
    out = heads * config["v_head_dim"] * hidden
    if compressed:
        query_split, query_replicated = compressed * heads * key, hidden * compressed + compressed
    else:
        query_split, query_replicated = hidden * heads * key, 0
    return Attention(
        split=query_split + up + out,
        replicated=query_replicated + down + latent,
        cached_values=latent + config["qk_rope_head_dim"],
        cache_heads=1,
        query_values=heads * config["v_head_dim"],
        score_width=heads * (key + config["v_head_dim"]),
        heads=heads,
        key_value_heads=None,
        linears={
            "linear_q_up_proj" if compressed else "linear_q_proj": (compressed or hidden, heads * key),
            "linear_kv_up_proj": (latent, up_width),
            "linear_proj": (heads * config["v_head_dim"], hidden),
        },
        split_vectors=0,
        replicated_vectors=latent + (compressed or 0),
    )
