"""Plugin of SGLang (entry point group sglang.srt.plugins) for engines that record which experts tokens go to.

A request says `return_routed_experts`. sglang-router 0.3.2 passes on only the fields it knows, which this is
not: the engine would be asked for nothing. Here the engine takes it as said.
"""

from __future__ import annotations

from typing import Any

REQUEST = "sglang.srt.managers.io_struct.GenerateReqInput.normalize_batch_and_arguments"


def register() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(REQUEST, ask_for_routing, HookType.BEFORE)


def ask_for_routing(request: Any) -> None:
    request.return_routed_experts = True
