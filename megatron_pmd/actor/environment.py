"""What megatron-core and Transformer Engine find when they are imported: variables, and DeepEP.

Imported before them, so nothing here imports megatron-core or a neighbour that does.
"""

from __future__ import annotations

import os

import torch

from megatron_pmd.config import RunConfig
from megatron_pmd.errors import ConfigError, MissingPackage


def prepare_imports(config: RunConfig) -> None:
    """To be called before megatron-core or Transformer Engine is imported.

    ConfigError where the environment says otherwise than the configuration needs; MissingPackage where
    actor.experts.dispatcher=deepep and DeepEP is not installed.
    """
    set_variables(config)
    if config.actor.experts.dispatcher == "deepep":
        complete_deepep()


def set_variables(config: RunConfig) -> None:
    """Set what Transformer Engine and NCCL read from the environment; ConfigError where it says otherwise.

    CUDA_DEVICE_MAX_CONNECTIONS=1 keeps the order of communication and compute on devices before Blackwell, on
    which tensor and context parallelism rely. NVTE_FP8_BLOCK_SCALING_FP32_SCALES=1 lets blocks have the fp32
    scales that SGLang's blockwise kernels use; without it Transformer Engine rounds them to powers of two.
    NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE=1 lets a run with delayed scaling be resumed: the history of its
    scales is a pickle in the run's own checkpoint, which Transformer Engine otherwise refuses to load.
    """
    wanted = {}
    if torch.cuda.get_device_capability()[0] < 10 and config.layout.tensor * config.layout.context > 1:
        wanted["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    if config.actor.fp8 and config.actor.fp8.recipe == "blockwise":
        wanted["NVTE_FP8_BLOCK_SCALING_FP32_SCALES"] = "1"
    if config.actor.fp8 and config.actor.fp8.recipe == "delayed":
        wanted["NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"] = "1"
    for name, value in wanted.items():
        if os.environ.setdefault(name, value) != value:
            raise ConfigError(
                f"{name}={os.environ[name]} in the environment; this configuration needs {value}"
            )


def complete_deepep() -> None:
    """Give DeepEP the name by which megatron-core looks for it.

    megatron/core/transformer/moe/fused_a2a.py imports EventOverlap from deep_ep.utils. sgl-deep-ep
    0.1.2.post1 exports it from deep_ep alone; megatron-core then takes DeepEP for not installed.
    """
    try:
        import deep_ep
        import deep_ep.utils
    except ModuleNotFoundError as absent:
        raise MissingPackage(
            "actor.experts.dispatcher=deepep: DeepEP (module deep_ep) is not installed here; install "
            "sgl-deep-ep at the version of constraints/stack.txt, or leave the setting out"
        ) from absent
    deep_ep.utils.EventOverlap = deep_ep.EventOverlap
