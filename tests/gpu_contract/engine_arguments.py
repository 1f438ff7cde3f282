"""A recipe's engine options through SGLang's own parser, to the ServerArgs that an engine runs with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sglang.srt.arg_groups.overrides import resolving_view
from sglang.srt.server_args import ServerArgs, prepare_server_args

from megatron_pmd.config import RunConfig
from megatron_pmd.engine.installed_options import server_options
from megatron_pmd.engine.keys import NO_KEYS, Keys
from megatron_pmd.engine.server import write_arguments
from megatron_pmd.engine.sglang_server import EngineSpec, NodeSpan, engine_options
from tests.gpu_contract.pretended_device import DEVICES


def spec_of(config: RunConfig, folder: Path, *, keys: Keys = NO_KEYS, port: int = 30000) -> EngineSpec:
    """The recipe's first engine, of which this is the first node."""
    nodes = max(1, config.rollout.tensor_parallel // DEVICES)
    span = NodeSpan(nodes, 0, "127.0.0.1:29500") if nodes > 1 else NodeSpan()
    return EngineSpec(
        number=0, model=config.model, rollout=config.rollout, port=port, log=folder / "engine-0.log", seed=0,
        cpu=False, keys=keys, span=span, record_routing=config.actor.experts.replay_routing,
    )  # fmt: skip


def arguments_of(spec: EngineSpec) -> ServerArgs:
    """ServerArgs of `python -m sglang.launch_server --config FILE`, with every decision that SGLang makes."""
    assert spec.log is not None
    file = spec.log.with_suffix(".yaml")
    options = engine_options(spec)
    write_arguments(file, {server_options()[name]: value for name, value in options.items()})
    arguments = prepare_server_args(["--config", str(file)])
    arguments.resolve_once()
    return arguments


def decided(arguments: ServerArgs) -> Any:
    """The fields with what SGLang has decided; the record itself keeps what was asked for."""
    return resolving_view(arguments)
