"""Plugin of SGLang (entry point group sglang.srt.plugins): SGLang itself loads it in each of its processes.

To return routed experts SGLang 0.5.21 keeps them in host memory, allocated by ALLOC_MEMORY_FUNCS["cpu"] of
mem_cache/pool_host/common.py, which has CUDA register it whatever the device is.
"""


def register():
    import torch
    from sglang.srt.mem_cache.pool_host.common import ALLOC_MEMORY_FUNCS

    def unregistered(dims, dtype, device, pin_memory, allocator, registration_granularity_bytes=None):
        return torch.empty(dims, dtype=dtype, device=device)

    ALLOC_MEMORY_FUNCS["cpu"] = unregistered
