"""Plugin of SGLang (entry point group sglang.srt.plugins): SGLang itself loads it in each of its processes.

Stand-ins, each with the place in SGLang 0.5.23 that it answers.
"""

import multiprocessing


def register():
    return_routed_experts_from_host_memory()
    fork_processes()
    name_the_cpu_as_device()


def return_routed_experts_from_host_memory():
    """SGLang keeps routed experts in host memory, allocated by ALLOC_MEMORY_FUNCS["cpu"] of
    mem_cache/pool_host/common.py, which has CUDA register it whatever the device is.
    """
    import torch
    from sglang.srt.mem_cache.pool_host.common import ALLOC_MEMORY_FUNCS

    def unregistered(dims, dtype, device, pin_memory, allocator, registration_granularity_bytes=None):
        return torch.empty(dims, dtype=dtype, device=device)

    ALLOC_MEMORY_FUNCS["cpu"] = unregistered


def fork_processes():
    """An engine's server process forks its scheduler and its detokenizer, with all that it has imported.

    `_set_envs_and_config` of entrypoints/engine.py asks for `spawn`, which CUDA needs: each process then
    imports torch, transformers and SGLang again. That is 17 of the 30 s of processor time that a start takes,
    and half of an engine's memory.
    """
    set_start_method = multiprocessing.set_start_method

    def fork(method, force=False):
        set_start_method("fork" if method == "spawn" else method, force=force)

    multiprocessing.set_start_method = fork


def name_the_cpu_as_device():
    """`torch.get_device_module()` of a CUDA build is torch.cuda also where there is no device.

    weight_updater.py synchronises it when memory is released, and the engine dies.
    """
    import torch

    module_of = torch.get_device_module
    torch.get_device_module = lambda device=None: torch.cpu if device is None else module_of(device)
