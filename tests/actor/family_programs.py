"""What tests/actor/test_families.py runs on actor ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from megatron_pmd.actor.actor import Actor
from megatron_pmd.actor.model import load_bridge, open_bridge, provider_for
from megatron_pmd.actor.parallel import holds_logits
from megatron_pmd.batch import RolloutBatch
from megatron_pmd.errors import ConfigError, PmdError
from megatron_pmd.weight_sync.shards import ShardExport
from tests.actor.actor_programs import Trial, start
from tests.actor.tiny_models import MUON, STEPS, TEMPERATURE, config_for, with_routing
from tests.planner.measured import measure


def families(cases: dict[str, tuple[Path, dict[str, int]]]) -> dict[str, Any]:
    """See as_loaded and by_muon; by case."""
    return {name: as_loaded(path, layout) | by_muon(path, layout) for name, (path, layout) in cases.items()}


def as_loaded(path: Path, layout: dict[str, int]) -> dict[str, Any]:
    """Log-probs, the loaded tensors exported again and as engines get them, loss and whole gradient of one
    step."""
    trial = Trial(config_for(path, layout))
    microbatches = trial.actor.microbatches(trial.batch, np.arange(16))
    shards = ShardExport(trial.actor.bridge, trial.actor.chunks, trial.control, trial.actor.shapes)
    result: dict[str, Any] = {
        "shards": {region: shard.tensor().detach().clone() for region, shard in shards.shards.items()},
        "irregular": [region.name for region in shards.irregular],
        "log_probs": trial.actor.log_probs(trial.batch, microbatches).log_probs,
        "holds_logits": holds_logits(),
        "exported": trial.weights(),
    }
    with trial.gradient_before_clipping(result):
        result["step"] = trial.step(STEPS[0])
    return result


def by_muon(path: Path, layout: dict[str, int]) -> dict[str, Any]:
    """A step of Muon. Of a mixture, log-probs and that step with the experts of with_routing; where Muon is
    refused, what it says, and a step of Adam with them."""
    experts = "num_experts_per_tok" in json.loads((path / "config.json").read_text())
    actor = {"experts": {"replay_routing": True}} if experts else {}
    result: dict[str, Any] = {}
    try:
        trial = Trial(config_for(path, layout, optimizer=MUON, actor=dict(actor)))
    except ConfigError as error:
        result["muon"] = str(error)
        trial = Trial(config_for(path, layout, actor=dict(actor)))
    if experts:
        layers = trial.actor.routing_width // 2
        trial.batch = RolloutBatch.pack(with_routing(trial.samples, layers), TEMPERATURE)
        microbatches = trial.actor.microbatches(trial.batch, np.arange(16))
        result["replayed"] = trial.actor.log_probs(trial.batch, microbatches).log_probs
    step: dict[str, Any] = {}
    with trial.gradient_before_clipping(step):
        result["second_step"] = trial.step(STEPS[0])
    if "muon" not in result:
        result["muon"] = step | {"weights": trial.weights(), "states": measure(trial.actor)["optimizer"]}
    return result


def refusals(
    folders: dict[str, Path],
    layouts: dict[str, tuple[Path, dict[str, int]]],
    quantized: dict[str, Path],
    unread: dict[str, Path],
) -> dict[str, Any]:
    """What opening each folder says, what building a model under each layout says, and the known classes;
    what reading the weights of those in `unread` says; and what the actor holds of those in `quantized`."""
    from megatron.bridge import AutoBridge

    said = {name: _said(lambda folder=folder: open_bridge(folder)) for name, folder in folders.items()}
    for name, (path, layout) in layouts.items():
        config = config_for(path, layout)
        said[name] = _said(lambda path=path, config=config: provider_for(load_bridge(path), config))
    control = start(config_for(quantized["kimi_k2"]).layout)
    held = {kind: dict(Actor(config_for(path), control).export()) for kind, path in quantized.items()}
    for name, path in unread.items():
        said[name] = _said(lambda path=path: Actor(config_for(path), control))
    return {"said": said, "known": AutoBridge.list_supported_models(), "read": held}


def _said(call: Any) -> tuple[str, str]:
    try:
        call()
    except PmdError as error:
        return type(error).__name__, str(error)
    return "no error", ""
