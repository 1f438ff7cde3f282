"""Stand-ins that let megatron-core 0.19.2 run on a CPU over gloo. Never installed where CUDA exists.

Each function answers one place in torch or megatron-core, named in its docstring;
tests/actor/test_standins.py leaves them out one at a time and fails when one is no longer needed.
rotate_at_once changes no result, only its time.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Collection
from typing import Any

import torch

CPU = torch.device("cpu")


def current_device() -> None:
    """megatron-core allocates with `device=torch.cuda.current_device()` in some sixty places."""
    torch.cuda.current_device = lambda: CPU


def cuda_literals() -> None:
    """Allocations with a literal device="cuda": pipeline_parallel/schedules.py, optimizer/clip_grads.py."""

    def redirected(function: Callable) -> Callable:
        @functools.wraps(function)
        def allocate(*args: Any, **kwargs: Any) -> torch.Tensor:
            if str(kwargs.get("device", "")).startswith("cuda"):
                kwargs["device"] = CPU
            return function(*args, **kwargs)

        return allocate

    # A device context knows torch's functions from its first use on: without this one, it would know only
    # those that stand in their place, and a model that is to be on the meta device would take real memory.
    with torch.device("meta"):
        torch.empty(0)
    for name in ("zeros", "ones", "empty", "full", "tensor", "arange", "empty_like", "zeros_like"):
        setattr(torch, name, redirected(getattr(torch, name)))


def pinned_memory() -> None:
    """models/common/embeddings/rope_utils.py pins an index under context parallelism: only CUDA can."""
    original = torch.tensor

    def pageable(*args: Any, **kwargs: Any) -> torch.Tensor:
        kwargs.pop("pin_memory", None)
        return original(*args, **kwargs)

    torch.tensor = functools.wraps(original)(pageable)


def move_to_cuda() -> None:
    """`tensor.cuda()` in megatron-core's data movement: a tensor on the CPU is where it should be."""
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self


def tensor_types() -> None:
    """optimizer.py and distrib_optimizer.py accept parameters by type name: 'torch.cuda.FloatTensor'."""
    original = torch.Tensor.type

    def type_name(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is not None:
            return original(self, dtype, *args, **kwargs)
        return original(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = type_name


def synchronisation() -> None:
    """torch.cuda.synchronize, empty_cache and set_device have nothing to wait for."""
    for name in ("synchronize", "empty_cache", "set_device"):
        # one function object a name: torch._dynamo's table of rules asserts on duplicates
        setattr(torch.cuda, name, functools.partial(lambda *args, **kwargs: None))


def random_state() -> None:
    """tensor_parallel/random.py tracks CUDA generator states; here the default generator plays that part."""
    from megatron.core.tensor_parallel import random as tracker

    torch.cuda.get_rng_state = lambda device="cuda": torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, device="cuda": torch.set_rng_state(state)
    torch.cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(int(seed))
    tracker._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    tracker._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()


class _Event:
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, *args: Any) -> None: ...
    def wait(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...


class _Stream:
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, stream: Any) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def record_event(self, event: Any = None) -> Any:
        return event or _Event()

    def synchronize(self) -> None: ...


def streams() -> None:
    """transformer/moe/token_dispatcher.py copies on a side stream; a CPU does everything in order."""
    default = _Stream()
    torch.cuda.Stream, torch.cuda.Event = _Stream, _Event
    torch.cuda.current_stream = lambda *args, **kwargs: default
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    torch.Tensor.record_stream = lambda self, stream: None


def latent_linear() -> None:
    """transformer/multi_latent_attention.py asks isinstance(…, TELinear), a mock without Transformer Engine.

    It also tells by this name which linear of a layer spec is whole on every tensor-parallel rank.
    """
    from megatron.core.transformer import multi_latent_attention

    from megatron_pmd.actor.cpu.modules import TELinear

    multi_latent_attention.TELinear = TELinear


def delta_net_kernels() -> None:
    """ssm/gated_delta_net/common.py needs kernels of flash-linear-attention, which CUDA alone has.

    Its own rule in torch (deterministic_mode) takes no packed rows.
    """
    from megatron.core.ssm.gated_delta_net import common, gdn

    from megatron_pmd.actor.cpu import linear_attention

    common.HAVE_FLA, common.l2norm = True, linear_attention.l2norm
    gdn.causal_conv1d = linear_attention.causal_conv1d
    gdn.chunk_gated_delta_rule = linear_attention.chunk_gated_delta_rule


def split_sizes() -> None:
    """moe_utils.maybe_move_tensor_to_cpu passes tensors on the CPU through; c10d wants plain numbers."""
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    def on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    moe_utils.maybe_move_tensor_to_cpu = token_dispatcher.maybe_move_tensor_to_cpu = on_host


def uneven_collectives() -> None:
    """tensor_parallel/mappings.py gathers and scatters unequal parts (expert_tensor > 1); gloo cannot."""
    from megatron.core.tensor_parallel import mappings

    even_gather, even_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather(
        part: torch.Tensor, group: Any, output_split_sizes: Any = None, use_global_buffer: bool = False
    ) -> Any:
        if output_split_sizes is None or group.size() == 1:
            return even_gather(part, group, output_split_sizes, use_global_buffer)
        sizes = [int(size) for size in output_split_sizes]
        longest = max([*sizes, 1])
        padded = part.new_zeros((longest, *part.shape[1:]))
        padded[: part.size(0)] = part
        gathered = part.new_empty((longest * len(sizes), *part.shape[1:]))
        torch.distributed.all_gather_into_tensor(gathered, padded, group=group)
        return torch.cat([gathered[i * longest : i * longest + size] for i, size in enumerate(sizes)])

    def scatter(
        whole: torch.Tensor, group: Any, input_split_sizes: Any = None, use_global_buffer: bool = False
    ) -> Any:
        if input_split_sizes is None or group.size() == 1:
            return even_scatter(whole, group, input_split_sizes, use_global_buffer)
        sizes = [int(size) for size in input_split_sizes]
        reduced = whole.contiguous().clone()
        torch.distributed.all_reduce(reduced, group=group)
        start = sum(sizes[: group.rank()])
        return reduced[start : start + sizes[group.rank()]].clone()

    mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim = gather, scatter


def adam_state() -> None:
    """optimizer/distrib_optimizer.py expects apex's or TE's Adam; torch's AdamW differs in three ways.

    It has no state before the first step, which state_dict() asserts on; it keeps `step` in the state, one
    tensor a parameter, where loading gives all parameters the *same* tensor, so that every step counts as
    many (a resumed run then trains wrongly, and nothing complains); and its `step` is not among the tensors
    that a checkpoint restores.
    """
    from megatron.core.optimizer import distrib_optimizer

    from megatron_pmd.actor.optimizer_state import begin_torchs

    cls = distrib_optimizer.DistributedOptimizer
    state_dict, load_state_dict = cls.state_dict, cls.load_state_dict
    set_states = cls._set_main_param_and_optimizer_states

    def with_state(self: Any) -> Any:
        own = self.optimizer
        begin_torchs(own, [p for group in own.param_groups for p in group["params"] if not own.state[p]])
        return state_dict(self)

    def own_step_each(self: Any, loaded: Any) -> None:
        load_state_dict(self, loaded)
        for state in self.optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()

    def keep_step(self: Any, parameter: Any, tensors: Any) -> None:
        group, order = self.model_param_group_index_map[parameter]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        if "step" in state and "step" not in tensors:
            tensors = {**tensors, "step": state["step"]}
        set_states(self, parameter, tensors)

    cls.state_dict, cls.load_state_dict = with_state, own_step_each
    cls._set_main_param_and_optimizer_states = keep_step


def rotate_at_once() -> None:
    """models/common/embeddings/rope_utils.py turns the sequences of a row one after the other.

    With the 64 short ones of a tiny model's row that is half of a step's time: a dozen operations for each
    sequence, layer, query and key, and a copy of the whole row's gradient for each on the way back. Where
    the angles are given for every place of the row, the same function turns them all at once. On CUDA it is
    not called: Transformer Engine has a kernel.
    """
    from megatron.core.models.common.embeddings import rope_utils

    rotate = rope_utils._apply_rotary_pos_emb_thd

    def at_once(
        rows: torch.Tensor, bounds: torch.Tensor, angles: torch.Tensor, *args: Any, **options: Any
    ) -> Any:
        starts = bounds[:-1].repeat_interleave(bounds.diff())
        places = torch.arange(len(starts)) - starts
        return rotate(rows, bounds, angles[places], *args, **options)

    rope_utils._apply_rotary_pos_emb_thd = at_once


STAND_INS: dict[str, Callable[[], None]] = {
    function.__name__: function
    for function in (
        current_device,
        cuda_literals,
        pinned_memory,
        move_to_cuda,
        tensor_types,
        synchronisation,
        random_state,
        streams,
        latent_linear,
        delta_net_kernels,
        split_sizes,
        uneven_collectives,
        adam_state,
    )
}


@functools.cache
def install(leave_out: Collection[str] = ()) -> None:
    """Install all stand-ins once; nothing happens where CUDA exists.

    leave_out: names to skip, for the test that each is still needed.
    """
    if torch.cuda.is_available():
        return
    # jit_fuser is torch.compile: without a compiler cache it would compile each fused function on every rank
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    for name, stand_in in STAND_INS.items():
        if name not in leave_out:
            stand_in()
    rotate_at_once()
