"""Plugin of SGLang (entry point group sglang.srt.plugins) for engines that record which experts tokens go to.

A request says `return_routed_experts`. sglang-router 0.3.2 passes on only the fields it knows, which this is
not: the engine would be asked for nothing. Here the engine takes it as said.

SGLang answers with int32, four times the bytes that the numbers of 256 experts need, through each of its
processes and over HTTP: 17 MB for 8,192 tokens of 48 layers and 8 experts. Here it is the smallest type.
"""

from __future__ import annotations

from typing import Any

REQUEST = "sglang.srt.managers.io_struct.GenerateReqInput.normalize_batch_and_arguments"
RECORD = "sglang.srt.state_capturer.routed_experts.RoutedExpertsCapturer.get_topk"


def register() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(REQUEST, ask_for_routing, HookType.BEFORE)
    HookRegistry.register(RECORD, narrowed, HookType.AFTER)


def ask_for_routing(request: Any) -> None:
    request.return_routed_experts = True


def narrowed(experts: Any, *_: Any, **__: Any) -> Any:
    """Numbers of experts in uint8, or int16, or as they are where one fits neither.

    rollout/engine_answer.py reads them, and refuses what is no expert's number.
    experts: int32 torch.Tensor [tokens, layers, top-k].
    """
    import torch

    if not experts.numel():
        return experts
    least, largest = experts.aminmax()
    for dtype in (torch.uint8, torch.int16):
        if least >= 0 and largest <= torch.iinfo(dtype).max:
            return experts.to(dtype)
    return experts
