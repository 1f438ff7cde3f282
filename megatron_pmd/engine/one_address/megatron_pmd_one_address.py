"""Plugin of SGLang (entry point group sglang.srt.plugins): where the ranks of an engine meet.

torch.distributed.rendezvous opens torch's store, which listens on all addresses of the machine, for
`tcp://127.0.0.1:port` too. Whoever reaches it can point the engine's ranks at himself, and they unpickle what
they receive.
"""

from __future__ import annotations


def register() -> None:
    import torch.distributed
    import torch.distributed.rendezvous

    from megatron_pmd.store import OneAddressStore

    # the name that rendezvous.py looks up, and the one that SGLang imports
    torch.distributed.rendezvous.TCPStore = OneAddressStore
    torch.distributed.TCPStore = OneAddressStore
