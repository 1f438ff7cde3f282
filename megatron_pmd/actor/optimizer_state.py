"""The optimizer's state between a checkpoint and megatron-core's optimizers."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer

# `fully_reshardable`: the optimizer's shards can be read under another number of data-parallel ranks
OPTIMIZER_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def own_memory(optimizer: Any) -> None:
    """Give tensors of the optimizer that are parts of larger ones memory of their own.

    The optimizer of which a share is on the host keeps what it is given: its shard of a moment, a view of the
    moment of the whole parameter, as read from the checkpoint.
    """
    for part in optimizer.chained_optimizers:
        for state in part.optimizer.state.values():
            for name, value in state.items():
                if torch.is_tensor(value) and value.untyped_storage().nbytes() > value.nbytes:
                    state[name] = value.clone()


def parts_by_device(optimizer: Any) -> list[Any]:
    """The host's and the device's part of megatron-core's optimizer of which a share is on the host."""
    return getattr(optimizer, "sub_optimizers", [])


def begin_states(optimizer: Any) -> None:
    """Zero moments where no step has been taken: megatron-core saves those that are there, and Transformer
    Engine's Adam makes them at its first step. A run may be told to save in its first rollout.

    Not by megatron-core's init_state_fn for Adam: it calls initialize_state with one argument too few.
    """
    # Muon's part is a chain of its own
    parts = [p for part in optimizer.chained_optimizers for p in getattr(part, "chained_optimizers", [part])]
    for part in parts:
        halves = parts_by_device(part.optimizer)
        for each in halves or [part.optimizer]:
            fresh = [p for group in each.param_groups for p in group["params"] if not each.state[p]]
            if isinstance(each, torch.optim.AdamW):
                begin_torchs(each, fresh)
            elif hasattr(each, "initialize_state"):
                for parameter in fresh:
                    # False: store_param_remainders, as optimizer_fields has it
                    each.initialize_state(parameter, False)
            elif fresh:
                part.init_state_fn(each, part.config)
        if halves:
            part.optimizer._sync_sub_optimizers_state_to_hdo()


def begin_torchs(adam: torch.optim.AdamW, fresh: list[torch.Tensor]) -> None:
    """The state that torch gives these parameters at their first step."""
    for parameter in fresh:
        adam.state[parameter].update(
            step=torch.tensor(0.0),
            exp_avg=torch.zeros_like(parameter),
            exp_avg_sq=torch.zeros_like(parameter),
        )


def own_step_counts(optimizer: Any) -> None:
    """Have each part of such an optimizer go on from the count of steps that a checkpoint has given it.

    What stands in the whole's groups is put over the parts' at each step (cpu_offloading/hybrid_optimizer.py,
    _sync_hdo_param_groups_to_sub_optimizers). There megatron-core leaves the checkpoint's count, so the
    device's part, which counts in its groups, would stay at it.
    """
    for part in optimizer.chained_optimizers:
        if parts_by_device(part.optimizer):
            for group in part.optimizer.param_groups:
                group.pop("step", None)


@torch.no_grad()
def quantize_anew(chunks: list[Any], optimizer: Any) -> None:
    """Make FP8 parameters of the fp32 ones, as an optimizer step does.

    A checkpoint holds them in bf16: what is quantised from that has other scales than what was saved.
    """
    for part in optimizer.chained_optimizers:
        if part.config.reuse_grad_buf_for_mxfp8_param_ag:
            part._copy_main_params_to_param_buffer()
        else:
            part._copy_main_params_to_model_params()
    for chunk in chunks:
        chunk.start_param_sync(force_sync=True)


def regrouped(saved: dict[Any, Any], optimizer: Any) -> dict[Any, Any]:
    """The optimizer's state as this layout's optimizers want it.

    Expert parallelism gives the experts an optimizer of their own. The moments find their way by parameter,
    but the groups' settings (Adam's numbers and its step count) come back under the number of the optimizer
    that saved them. Muon's, for dense and expert parameters, are groups of one optimizer: their settings are
    those of the configuration, and they have no count.
    """
    parts = optimizer.chained_optimizers
    for i, part in _layer_wise(optimizer):
        saved[i]["optimizer"]["param_groups"] = part.optimizer.state_dict()["param_groups"]
    if [_for_experts(part["param_groups"]) for part in _parts(saved)] == [
        _for_experts(part.param_groups) for part in parts
    ]:
        return saved
    # the settings of dense and expert parameters differ in nothing but weight decay
    groups = {group["wd_mult"]: group for group in groups_of(saved)}

    def fitted(state: dict[Any, Any], part: Any) -> dict[str, Any]:
        own = [
            {**groups[group["wd_mult"]], "is_expert_parallel": group["is_expert_parallel"]}
            for group in part.optimizer.param_groups
        ]
        return {
            "param_state": state["param_state"],
            "param_state_sharding_type": OPTIMIZER_FORMAT["distrib_optim_sharding_type"],
            "optimizer": {"param_groups": own},
        }

    if len(parts) == 1:
        return fitted(saved, parts[0])
    return {i: fitted(saved[i], part) for i, part in enumerate(parts)}


def name_of(optimizer: Any) -> str:
    """As optimizer.name has it."""
    return "muon" if _layer_wise(optimizer) else "adam"


def leave_out_own_groups(states: dict[Any, Any], optimizer: Any) -> None:
    """Of states to load into: the groups of this layout, which need not be as many as were saved."""
    for i, _ in _layer_wise(optimizer):
        del states[i]["optimizer"]["param_groups"]


def _layer_wise(optimizer: Any) -> list[tuple[int, Any]]:
    """Muon's optimizers, with their numbers."""
    parts = enumerate(optimizer.chained_optimizers)
    return [(i, part) for i, part in parts if isinstance(part, LayerWiseDistributedOptimizer)]


def _parts(states: dict[Any, Any]) -> list[dict[str, Any]]:
    """The settings of each of the optimizers, from their state as megatron-core writes it."""
    several = [states[key] for key in sorted(key for key in states if isinstance(key, int))]
    return [state["optimizer"] for state in (states, *several) if "optimizer" in state]


def _for_experts(groups: list[dict[str, Any]]) -> set[bool]:
    return {group["is_expert_parallel"] for group in groups}


def groups_of(states: dict[Any, Any]) -> list[dict[str, Any]]:
    return [group for part in _parts(states) for group in part.get("param_groups", ())]
