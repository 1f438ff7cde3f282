"""Plugin of SGLang (entry point group sglang.srt.plugins): SGLang itself loads it in each of its processes.

Stand-ins, each with the place in SGLang 0.5.23 that it answers.
"""

import hashlib
import multiprocessing
import random


def register():
    return_routed_experts_from_host_memory()
    fork_processes()
    name_the_cpu_as_device()
    sample_by_the_requests_seeds()


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


def sample_by_the_requests_seeds():
    """A request's `sampling_seed` decides its tokens.

    SGLang takes it (sampling/sampling_batch_info.py) under enable_deterministic_inference alone, which
    refuses the only attention that a CPU has; and its sampling by seeds (layers/sampler.py) hashes with a
    kernel of Triton's.
    """
    import torch
    from sglang.srt.layers import sampler
    from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

    from_schedule_batch = SamplingBatchInfo.from_schedule_batch.__func__

    def with_seeds(cls, batch, vocab_size):
        information = from_schedule_batch(cls, batch, vocab_size)
        seeds = [request.sampling_params.sampling_seed for request in batch.reqs]
        information.sampling_seed = torch.tensor(
            [random.getrandbits(31) if seed is None else seed for seed in seeds], dtype=torch.int64
        )
        return information

    SamplingBatchInfo.from_schedule_batch = classmethod(with_seeds)
    sampler.multinomial_with_seed = draw


def draw(log_probs, seeds, positions):
    """One index a row by inversion of its distribution: [rows, 1].

    log_probs  [rows, candidates] logarithms of weights that need not add up to 1
    seeds, positions  [rows]; the same two give the same number in [0, 1), whatever the other rows are
    """
    import torch

    pairs = zip(seeds.tolist(), positions.tolist(), strict=True)
    numbers = torch.tensor([[uniform(seed, position)] for seed, position in pairs], dtype=torch.float64)
    sums = log_probs.to(torch.float64).exp().cumsum(-1)
    # `right`: never a candidate of weight 0, whose sum is that of the one before
    found = torch.searchsorted(sums, numbers * sums[:, -1:], right=True)
    return found.clamp_(max=log_probs.shape[-1] - 1)


def uniform(seed, position):
    """A number in [0, 1) of 53 random bits."""
    digest = hashlib.blake2b(f"{seed}/{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53
