"""torch's key-value store on one address of this machine: by itself it listens on all of them."""

from __future__ import annotations

import socket
from datetime import timedelta

from torch.distributed import TCPStore


def open_store(host: str, port: int, timeout: timedelta, *, shared: bool = False) -> TCPStore:
    """A store that other processes reach at this address alone; port 0: any free one (`.port`).

    It asks for no key: whoever reaches it can change where the ranks look for each other, and they unpickle
    what they receive there. shared: other stores of this process may be clients of the same server.
    Raises OSError when the address is not this machine's, or the port is taken.
    """
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(socket.SOMAXCONN)
        return TCPStore(
            host, listener.getsockname()[1], is_master=True, wait_for_workers=False, timeout=timeout,
            multi_tenant=shared, master_listen_fd=listener.detach(),
        )  # fmt: skip
