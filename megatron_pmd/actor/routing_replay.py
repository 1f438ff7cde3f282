"""Experts that the engines chose, replayed in the actor: megatron-core's RouterReplay, fed by micro-batch.

An engine and the actor compute router logits that differ by rounding; where two experts are close, they
choose different ones, and log π_t of such a token differs from the engine's by more than rounding. Replaying
the engine's choice leaves the router its gradient: the weights of the chosen experts are the actor's own.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from megatron.core.utils import get_model_config


class RoutingReplay:
    """The routers of this rank's chunks of the model, and what they are to choose."""

    def __init__(self, chunks: list[Any]) -> None:
        settings = get_model_config(chunks[0])
        whole = settings.recompute_granularity == "full"
        self._recomputes = whole or "moe" in (settings.recompute_modules or [])
        # RouterReplay's own list of instances has those of every model that the process ever built
        self._routers: dict[int, list[tuple[int, RouterReplay]]] = {
            id(chunk): [
                (router.layer_number - 1, router.router_replay)
                for router in chunk.modules()
                if isinstance(router, TopKRouter)
            ]
            for chunk in chunks
        }

    def begin(self, chunk: Any, experts: torch.Tensor) -> None:
        """Before a chunk's forward pass: its routers choose `experts` [row on this rank, layers, top-k].

        Layers without experts have their places, too, as in what SGLang records
        (sglang/srt/state_capturer/routed_experts.py).
        Sequence parallelism gives each tensor-parallel rank an equal run of the row's tokens.
        """
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        own = experts.chunk(ranks)[parallel_state.get_tensor_model_parallel_rank()]
        for layer, router in self._routers[id(chunk)]:
            router.set_target_indices(own[:, layer])
            router.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)

    def end(self, chunk: Any) -> None:
        """After it: what runs a router from now on is a backward pass that recomputes activations.

        Where there is none, nothing is kept for it: RouterReplay would hold the experts of all micro-batches
        on the device, for each token of a rank's part of the rollout.
        """
        if not (self._recomputes and torch.is_grad_enabled()):
            self.clear(chunk)
            return
        for _, router in self._routers[id(chunk)]:
            router.set_router_replay_action(RouterReplayAction.REPLAY_BACKWARD)

    def clear(self, chunk: Any) -> None:
        """After all micro-batches: layers that are not recomputed have not taken what was kept for them."""
        for _, router in self._routers[id(chunk)]:
            router.clear_indices()
            router.clear_router_replay_action()
