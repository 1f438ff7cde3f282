"""An engine over two nodes, which here are two ranks: see tests/actor/launch.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from megatron_pmd.actor.actor import Actor
from megatron_pmd.actor.parallel import initialize
from megatron_pmd.config import Rollout, Sync
from megatron_pmd.distributed import Control
from megatron_pmd.errors import EngineError
from megatron_pmd.observe.console import Console
from megatron_pmd.training.live_engines import LiveEngines
from tests.actor.tiny_models import config_for
from tests.engine.live_engine import generate
from tests.weight_sync.faulty_transport import FaultyTransport


def engine_over_two_nodes(path: Path, folder: Path) -> dict[str, Any]:
    """What it answers; what a bucket damaged on the second node, and the death of that part, lead to."""
    config = config_for(path, dict(tensor=2)).model_copy(
        update={
            "rollout": Rollout(max_total_tokens=1024, tensor_parallel=2),
            "sync": Sync(timeout_seconds=60, verify="full"),
        }
    )
    initialize(config.layout, seed=0, timeout_seconds=300)
    control = Control(300)
    control.node = control.rank
    engines = LiveEngines(config, control, folder, None, None, Console(), cpu=True)
    own = engines.fleet.own
    assert own is not None and own.process.log is not None
    result: dict[str, Any] = {"serves": engines.fleet.serves, "log": own.process.log.name}

    def answers() -> list[dict[str, Any]]:
        return generate(engines.router.url, key=engines.fleet.keys.api or "", max_new_tokens=8)

    try:
        actor = Actor(config, control)
        engines.load(actor, 1)
        engines.resume()
        result["answers"] = control.on_driver(answers)

        engines.release()
        result["refused"] = _with_damage(engines, actor)

        if control.node == 1:
            own.process.stop()
        engines.load(actor, 3)
        engines.resume()
        result["answers of another"] = control.on_driver(answers)
    finally:
        engines.close()
    result["processes left"] = [" ".join(p.cmdline()) for p in psutil.Process().children(recursive=True)]
    return result


def _with_damage(engines: LiveEngines, actor: Actor) -> str:
    """What a sync ends with, in which the second node's bucket changes after it was described."""
    transport = engines.weight_push.transport

    def damage(bucket: Any, descriptions: Sequence[dict[str, Any]]) -> None:
        if engines.fleet.leads:
            with open(descriptions[1]["path"], "r+b") as file:
                file.write(bytes(range(1, 65)))

    engines.weight_push.transport = FaultyTransport(transport, damage, at_bucket=1)
    try:
        engines.load(actor, 2)
    except EngineError as error:
        return str(error)
    finally:
        engines.weight_push.transport = transport
    return ""
