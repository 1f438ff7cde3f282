"""What a plan assumes of the machines: data-sheet figures, and the shares of them that programs reach."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_pmd.config import RunConfig
from megatron_pmd.engine.placement import ranks_of_node


@dataclass(frozen=True)
class Device:
    """One accelerator. Peak figures are the maker's, dense, without sparsity."""

    name: str
    memory_bytes: int
    bf16_flops: float
    fp8_flops: float
    memory_bytes_per_second: float
    host_bytes_per_second: float
    """Between device and pinned host memory, one direction."""


# H100 SXM5 data sheet (NVIDIA, 2023); memory as nvidia-smi reports it, 81,559 MiB; PCIe 5 x16: about 50 GB/s
H100 = Device("H100", 81_559 * 2**20, 989e12, 1979e12, 3.35e12, 50e9)
# H200 SXM data sheet (NVIDIA, 2024); 143,771 MiB
H200 = Device("H200", 143_771 * 2**20, 989e12, 1979e12, 4.8e12, 50e9)
# one core of a server processor: an order of magnitude
CPU = Device("CPU core", 0, 5e10, 5e10, 1e10, 1e10)

DEVICES = {"h100": H100, "h200": H200, "cpu": CPU}


@dataclass(frozen=True)
class Machines:
    """The nodes a run gets."""

    device: Device
    devices_per_node: int
    host_memory_bytes: int
    """Of one node."""
    storage_bytes_per_second: float
    """Written to the shared folder by one node."""

    @property
    def shares_host_memory(self) -> bool:
        """Whether actors and engines live in the node's own memory: there is no accelerator."""
        return self.device.memory_bytes == 0

    def ranks_per_node(self, config: RunConfig) -> int:
        """Of a run: a node's other devices are those of separate engines. Raises LayoutError if none fits."""
        if self.shares_host_memory:
            return min(self.devices_per_node, config.layout.ranks)
        return ranks_of_node(config, self.devices_per_node)

    def rank_nodes(self, config: RunConfig) -> int:
        """That hold a run's ranks."""
        return -(-config.layout.ranks // self.ranks_per_node(config))

    def nodes(self, config: RunConfig) -> int:
        """That hold a run."""
        return self.rank_nodes(config) + config.layout.engine_nodes


@dataclass(frozen=True)
class Assumptions:
    """Everything the plan takes for granted; printed with it."""

    train_efficiency: float = 0.35
    """Share of peak FLOP/s in the update: an assumption, not a measurement."""
    forward_efficiency: float = 0.40
    decode_bandwidth_share: float = 0.6
    """Of memory bandwidth, while decoding."""
    decode_overhead_seconds: float = 0.004
    """For each decoding step: launches, sampling, scheduling."""
    response_share: float = 0.5
    """Mean response as a share of batch.max_response_tokens."""
    sync_bytes_per_second: float = 10e9
    """At which all of the weights pass from actors to engines, gathering included."""
    cuda_context_bytes: float = 0.6e9
    """Of one process: the context and the kernels of its libraries; a rank and its engine have one each."""
    communicator_bytes: float = 0.3e9
    """NCCL's buffers of one process group on one device; none is released.

    NCCL 2.30: a channel's ring keeps 10 MiB (its three protocols' 0.5, 4.7 and 4 MiB, in pages of 2 MiB) of
    what comes from one neighbour, and 2 MiB towards the other, or 10 MiB if that is on another node. 16
    channels, as between nodes of 8 H100, are 0.2 to 0.34 GB. Its source: computeBuffSizes in src/init.cc,
    p2pRecvSetup in src/transport/p2p.cc, sendProxyConnect in src/transport/net.cc, ncclTopoPostset in
    src/graph/connect.cc.
    """
    fragment_bytes: float = 1.5e9
    """Of an actor rank: what is free inside blocks that torch's allocator cannot return."""
    expert_imbalance: float = 1.5
    """Tokens of the busiest expert-parallel rank over their mean."""
    process_host_bytes: float = 8e9
    """Host memory of one actor rank and its share of an engine, without what is offloaded."""
    cpu_process_bytes: float = 2.2e9
    """The same without CUDA's libraries."""
    core_copy_bytes_per_second: float = 1e9
    """Written by one core into memory that is new to its process: most of it is the kernel's work."""
    cores_per_rank: int = 4
    """That copy at this speed, of a node with accelerators: what a rank's 16 cores reached, roughly, beside
    an H200 (docs/gpu.md); without accelerators a rank has one."""
    safety: float = 0.95
    """Of a memory, the share a plan may fill."""
