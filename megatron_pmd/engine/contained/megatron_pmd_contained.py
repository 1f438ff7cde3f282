"""Plugin of SGLang (entry point group sglang.srt.plugins): what an engine opens is its own.

Each with the place in SGLang 0.5.23 or torch 2.14 that it answers.
"""

from __future__ import annotations


def register() -> None:
    listen_on_one_address()
    keep_files_together()


def listen_on_one_address() -> None:
    """torch.distributed.rendezvous opens a store that listens on all addresses, for tcp://127.0.0.1 too.

    Whoever reaches it can point the engine's ranks at himself, and they unpickle what they receive.
    """
    import importlib

    import torch.distributed

    from megatron_pmd.store import OneAddressStore

    # import_module: torch.distributed.rendezvous is also a function, which hides the module
    importlib.import_module("torch.distributed.rendezvous").TCPStore = OneAddressStore
    torch.distributed.TCPStore = OneAddressStore  # the name that SGLang imports


def keep_files_together() -> None:
    """managers/load_snapshot.py keeps the load in /dev/shm/sglang_loads_*, and leaves it there when killed.

    In the engine's folder for temporary files, the supervisor removes it.
    """
    import tempfile

    from sglang.srt.managers import load_snapshot

    load_snapshot.shm_path_for = lambda instance: f"{tempfile.gettempdir()}/loads-{instance}"
