"""The policy: a GPTModel of megatron-core made from a Hugging Face folder, with its weights."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.module import Float16Module
from transformers import AutoConfig

from megatron_pmd.actor import families, latent_attention, lora, muon, settings
from megatron_pmd.actor.cpu import bridge_import
from megatron_pmd.config import RunConfig
from megatron_pmd.data.tokenizer import check_model_folder
from megatron_pmd.errors import ConfigError, LayoutError, ModelError
from megatron_pmd.fp8 import BLOCK, SCALE_SUFFIX, is_scale
from megatron_pmd.hugging_face import StoredTensor, TensorFiles, shards_of

LLAMA3_ROPE = dict(low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
OF_LLAMA3 = ("llama", "exaone4")

LAYER = re.compile(r"model\.layers\.(\d+)\.")
MTP = "mtp."
"""How names of the layer that predicts further tokens begin in folders of Qwen and K-EXAONE."""
DEEPSEEK_V3 = ("deepseek_v3", "kimi_k2")
UNROUNDED = "get_high_precision_init_val"
"""The method of Transformer Engine's FP8 parameters that gives what they were before they were rounded."""
YARN_ROPE = {
    "factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "original_max_position_embeddings",
}  # fmt: skip
GPT_OSS_ROPE = dict(
    rope_type="yarn", factor=32.0, beta_fast=32.0, beta_slow=1.0, truncate=False,
    original_max_position_embeddings=4096,
)  # fmt: skip


def load_bridge(path: Path, *, trust_remote_code: bool = False) -> Any:
    """Megatron-Bridge's AutoBridge for a Hugging Face folder.

    Raises ModelError for a folder that is not a complete model, a family that the bridge does not know, or
    rotary settings that it would read wrongly.
    """
    check_files(path)
    bridge = open_bridge(path, trust_remote_code=trust_remote_code)
    check_rope(path, bridge.hf_pretrained.config)
    return bridge


def open_bridge(path: Path, *, trust_remote_code: bool = False) -> Any:
    """AutoBridge of a folder with a config.json: enough to map weights; to run the model see load_bridge.

    Raises ModelError for a family that the bridge does not know, naming those it does, and for one that
    families.py refuses.
    """
    families.know_kimi()
    if torch.cuda.is_available():
        importlib.import_module("megatron.bridge")
    else:
        bridge_import.import_bridge()
    from megatron.bridge import AutoBridge
    from megatron.bridge.models.conversion.param_mapping import AutoMapping

    AutoMapping.register_module_type("PackedAttention", "column")  # its sinks, one a head
    try:
        bridge = AutoBridge.from_hf_pretrained(str(path), trust_remote_code=trust_remote_code)
    except ValueError as error:
        known = ", ".join(AutoBridge.list_supported_models())
        raise ModelError(
            f"{path}: Megatron-Bridge cannot map this model: {error}\nIt knows {known}"
        ) from None
    families.check_family(path, bridge)
    config = bridge.hf_pretrained.config
    if config.model_type in DEEPSEEK_V3 and not hasattr(config, "scoring_func"):
        # transformers' DeepseekV3 scores by sigmoid always, and does not write it; the bridge assumes softmax
        config.scoring_func = "sigmoid"
    rope = getattr(config, "rope_parameters", None) or {}
    if "partial_rotary_factor" in rope:
        # transformers computes with this one; the bridge reads the other, which may be a default of its own
        config.partial_rotary_factor = rope["partial_rotary_factor"]
    if getattr(config, "num_nextn_predict_layers", None):
        # no part of the policy, of which the bridge of GLM-4.7-Flash would export tensors all the same
        config.num_nextn_predict_layers = 0
    return bridge


def check_rope(path: Path, config: Any) -> None:
    """ModelError for rotary settings that do not arrive in megatron-core.

    Of llama3's four numbers Megatron-Bridge passes on one, `factor`, and megatron-core fixes the others to
    those of Llama 3.1 to 3.3; gpt-oss's are all fixed; other types are dropped by some of its families. All
    would give wrong logits, silently.
    """
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if config.model_type == "gemma3_text":
        # the bridge reads the base of both kinds of layers, and the factor of `linear` for those that see all
        kinds = {layers: own.get("rope_type") for layers, own in rope.items() if isinstance(own, dict)}
        if kinds in [dict(sliding_attention="default", full_attention=one) for one in ("default", "linear")]:
            return
    kind = rope.get("rope_type", "default")
    fixed = [rope.get(key) for key in LLAMA3_ROPE]
    llama3 = config.model_type in OF_LLAMA3 and kind == "llama3" and fixed == list(LLAMA3_ROPE.values())
    yarn = config.model_type in (*DEEPSEEK_V3, "deepseek_v2") and kind == "yarn" and rope.keys() >= YARN_ROPE
    default = kind == "default"
    if config.model_type == "gpt_oss":
        default, yarn = False, {k: v for k, v in rope.items() if k != "rope_theta"} == GPT_OSS_ROPE
    if "rope_theta" not in rope or not (default or llama3 or yarn):
        raise ModelError(
            f"{path}: rope_parameters {rope} of config.json would be read wrongly by Megatron-Bridge; "
            f"what works is rope_type `default`, for Llama and EXAONE 4.0 `llama3` with {LLAMA3_ROPE}, for "
            f"the DeepSeek families `yarn` with {', '.join(sorted(YARN_ROPE))}, and for gpt-oss "
            f"{GPT_OSS_ROPE} alone"
        )


def check_files(path: Path) -> None:
    """Raises ModelError for a folder without configuration or weights, or without a file of its index."""
    check_model_folder(path)
    if not shards_of(path)[0]:
        raise ModelError(f"{path}: no *.safetensors; the folder has a configuration but no weights")


def shapes_of(files: Mapping[str, StoredTensor]) -> dict[str, list[int]]:
    """By name, of every tensor that these of a Hugging Face folder stand for."""
    return {name: tensor.shape for name, tensor in files.items() if not is_scale(name, files)}


def provider_of_family(bridge: Any) -> Any:
    """The bridge's TransformerConfig for this model, as it computes what transformers does on packed rows."""
    provider = bridge.to_megatron_provider(load_weights=False)
    model = bridge.hf_pretrained.config
    if model.model_type in families.POST_NORMS:
        from megatron_pmd.actor import post_norms

        post_norms.configure(Path(model.name_or_path), provider, model)
    # Megatron-Bridge names flash-attn for Gemma, which need not be there: the environment would then forbid
    # Transformer Engine every other kernel
    provider.attention_backend = AttnBackend.auto
    # a folder may ask for some; π_t and its gradients are those of the policy that engines sample from
    provider.attention_dropout = provider.hidden_dropout = 0.0
    return provider


def _check_context(path: Path, provider: Any) -> None:
    """LayoutError where Transformer Engine (context_parallel.py) does not send keys from rank to rank."""
    if provider.window_size is not None or provider.softmax_type != "vanilla":
        raise LayoutError(
            f"layout.context > 1: {path} has layers whose attention sees a window or has sinks, which "
            "Transformer Engine does not compute over several ranks; use context=1"
        )


def provider_for(bridge: Any, config: RunConfig) -> Any:
    """provider_of_family, with our layout, precision and the recipe's settings."""
    provider, model = provider_of_family(bridge), bridge.hf_pretrained.config
    unknown = [name for name in config.actor.megatron if not hasattr(provider, name)]
    if unknown:
        raise ConfigError(f"actor.megatron.{unknown[0]} is not a field of megatron-core's TransformerConfig")
    fields = settings.transformer_fields(config)
    for name, value in fields.items():
        setattr(provider, name, value)
    settings.check_model(provider, config)
    families.check_layout(Path(config.model.path), model, config.layout)
    if torch.cuda.is_available() and config.layout.context > 1:
        _check_context(Path(config.model.path), provider)
    # Without the fused kernel the host waits in every layer for the lengths of a packed row. For latent
    # attention there is one for yarn alone (TransformerConfig refuses it otherwise).
    if "apply_rope_fusion" not in fields:
        provider.apply_rope_fusion = not provider.multi_latent_attention or provider.rope_type == "yarn"
    if not torch.cuda.is_available():
        from megatron_pmd.actor.cpu.modules import block_spec

        provider.transformer_layer_spec = partial(block_spec, of_family=provider.transformer_layer_spec)
    elif provider.multi_latent_attention:
        layers = partial(latent_attention.block_spec, of_family=provider.transformer_layer_spec)
        provider.transformer_layer_spec = layers
    elif model.model_type in families.POST_NORMS:
        from megatron_pmd.actor import post_norms

        layer = partial(post_norms.layer_spec, of_family=provider.transformer_layer_spec)
        provider.transformer_layer_spec = layer
    provider.finalize()
    provider.finalize_model_grads_func = finalize_model_grads
    return provider


def build(bridge: Any, config: RunConfig) -> list[DistributedDataParallel]:
    """This rank's part of the policy, with the folder's weights, wrapped for data parallelism.

    One module, or as many as an interleaved pipeline gives a stage. Raises ModelError naming a tensor that is
    missing or has the wrong shape.
    """
    provider = provider_for(bridge, config)
    # Gemma's asks it which stage it is
    provider._pg_collection = ProcessGroupCollection.use_mpu_process_groups()
    virtual = config.layout.virtual_pipeline
    chunks = [
        provider.provide(
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
            vp_stage=stage if virtual > 1 else None,
        )
        for stage in range(virtual)
    ]
    for chunk in chunks:
        _mark_sinks(chunk)
    load_weights(bridge, chunks, Path(config.model.path))
    if torch.cuda.is_available():
        for chunk in chunks:
            chunk.cuda()
    if config.actor.lora:
        lora.add_adapters(chunks, provider, config)
    ddp = DistributedDataParallelConfig(**settings.data_parallel_fields(config))
    wrapped = []
    for chunk in chunks:
        biases = {name: bias.clone() for name, bias in expert_biases(chunk).items()}
        module = Float16Module(provider, chunk) if provider.bf16 else chunk
        for name, bias in expert_biases(chunk).items():
            bias.data = biases[name]  # rounded to bf16 by Float16Module; they decide between experts in fp32
        layout = muon.layout(module, ddp) if config.optimizer.name == "muon" else None
        wrapped.append(DistributedDataParallel(provider, ddp, module, full_param_layout=layout))
    # gradients that are reduced during the backward pass wait for that of the last micro-batch
    waits = [chunk.no_sync for chunk in wrapped]
    provider.no_sync_func = waits if virtual > 1 else waits[0]
    return wrapped


def _mark_sinks(chunk: torch.nn.Module) -> None:
    """Attention's sinks are those of a rank's own heads. Transformer Engine does not say so
    (attention/dot_product_attention): one rank's alone would count in the gradient's norm and in digests."""
    for name, parameter in chunk.named_parameters():
        if name.endswith(".softmax_offset"):
            set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=0, stride=1)


def expert_biases(chunk: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The routers' biases (balancing without auxiliary loss): buffers, which no optimizer knows."""
    return {name: bias for name, bias in chunk.named_buffers() if name.endswith(".expert_bias")}


def predicts_further_tokens(name: str, layers: int, further: int = sys.maxsize) -> bool:
    """Whether a folder's tensor is of a layer that predicts further tokens.

    layers: of the policy. further: how many layers behind them may be such.
    """
    found = LAYER.match(name)
    return name.startswith(MTP) or (found is not None and layers <= int(found[1]) < layers + further)


def tensors_of_policy(path: Path, layers: int) -> dict[str, list[int]]:
    """Name and shape of every tensor of a folder, but for those of layers that predict further tokens.

    Raises ModelError for a truncated file, or one that the index names and the folder lacks.
    """
    shapes = shapes_of(TensorFiles(path).tensors)
    return {name: shape for name, shape in shapes.items() if not predicts_further_tokens(name, layers)}


def load_weights(bridge: Any, chunks: list[torch.nn.Module], path: Path) -> None:
    """Copy the folder's tensors into the modules, after checking that every one it needs is there."""
    files = TensorFiles(path).tensors
    needed: set[str] = set()
    for task in bridge.get_conversion_tasks(chunks):
        names = task.mapping.hf_param
        needed.update(names.values() if isinstance(names, dict) else [names])
    missing = sorted(needed - files.keys())
    if missing:
        raise ModelError(f"{path}: tensor {missing[0]} is missing ({len(missing)} missing in all)")
    check_fp8(path, files, bridge.hf_pretrained.config)
    trust = bool(getattr(bridge.hf_pretrained, "trust_remote_code", False))
    check_shapes(path, shapes_of(files), trust=trust)
    quantized = any(hasattr(p, UNROUNDED) for chunk in chunks for p in chunk.parameters())
    if not quantized:
        bridge.load_hf_weights(chunks)
        return
    exported, bridge.export_weight_dtype = bridge.export_weight_dtype, "fp8"  # it then keeps what it reads
    bridge.load_hf_weights(chunks)
    bridge.export_weight_dtype = exported
    _keep_unrounded(bridge, chunks)


def _keep_unrounded(bridge: Any, chunks: list[torch.nn.Module]) -> None:
    """Have the optimizer's fp32 parameters begin as the weights that were read.

    megatron-core takes them from what Transformer Engine keeps of each FP8 parameter before it is rounded
    (optimizer/distrib_optimizer.py). That is what the module began with: random numbers, with which the
    first step would overwrite the model.
    """
    read = bridge.unquantized_state_dict
    for i, chunk in enumerate(chunks):
        weights = read["model" if len(chunks) == 1 else f"model{i}"]
        for name, parameter in chunk.named_parameters():
            if hasattr(parameter, UNROUNDED):
                getattr(parameter, UNROUNDED)().copy_(weights[name])
    bridge.unquantized_state_dict = None


def check_fp8(path: Path, files: dict[str, StoredTensor], config: Any) -> None:
    """Raises ModelError for FP8 that Megatron-Bridge does not turn into bf16 as it reads the folder."""
    quantized = [name for name, tensor in files.items() if tensor.dtype == "F8_E4M3"]
    if not quantized:
        return
    without = [name for name in quantized if name + SCALE_SUFFIX not in files]
    size = (getattr(config, "quantization_config", None) or {}).get("weight_block_size")
    if without or size != [BLOCK, BLOCK]:
        raise ModelError(
            f"{path}: {(without or quantized)[0]} is FP8, with weight_block_size={size} in config.json; "
            f"FP8 is read in blocks of {BLOCK} x {BLOCK}, each with its scale in a tensor *{SCALE_SUFFIX}"
        )
    if config.model_type not in families.READ_FROM_FP8:
        raise ModelError(
            f"{path}: {quantized[0]} is FP8, from which {', '.join(sorted(families.READ_FROM_FP8))} are "
            f"trained directly. Write a bf16 folder, and set model.path to it: megatron-pmd convert "
            f"hf-to-megatron {path} --out CHECKPOINT, then megatron-pmd convert megatron-to-hf CHECKPOINT "
            "--dtype bf16 --out FOLDER"
        )


def check_shapes(path: Path, present: dict[str, list[int]], *, trust: bool = False) -> None:
    """Raises ModelError naming a tensor whose shape is not the one that config.json asks for."""
    from transformers import AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path, trust_remote_code=trust)
    with torch.device("meta"):
        expected = AutoModelForCausalLM.from_config(config, trust_remote_code=trust).state_dict()
    width = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    experts = {
        "gate_proj": [width, config.hidden_size],
        "up_proj": [width, config.hidden_size],
        "down_proj": [config.hidden_size, width],
    }
    for name, shape in present.items():
        if name in expected:
            right = list(expected[name].shape)
        # transformers 5 keeps a layer's experts in one tensor, files have one each; for `mtp` there are both
        elif ".mlp.experts." in name and not name.startswith(MTP):
            right = experts[name.split(".")[-2]]
        else:
            continue
        if list(shape) != right:
            raise ModelError(f"{path}: tensor {name} has shape {shape}, config.json asks for {right}")
