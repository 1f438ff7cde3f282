"""torch's key-value store on one address of this machine: by itself it listens on all of them."""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore


class OneAddressStore(TCPStore):
    """torch's TCPStore. Where it is the server (is_master), others reach it at host_name's address alone.

    It asks for no key: whoever reaches it can change where the ranks look for each other, and they unpickle
    what they receive there.
    """

    def __init__(
        self,
        host_name: str,
        port: int,
        world_size: int | None = None,
        is_master: bool = False,
        *positional: Any,
        **options: Any,
    ) -> None:
        """As TCPStore's. port 0, of a server: any free one (`.port`).

        Raises OSError when the address is not this machine's, or the port is taken.
        """
        if is_master:
            family, kind, _, _, address = socket.getaddrinfo(host_name, port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind) as listener:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(address)
                listener.listen(socket.SOMAXCONN)
                port, options["master_listen_fd"] = listener.getsockname()[1], listener.detach()
        super().__init__(host_name, port, world_size, is_master, *positional, **options)


def open_store(host: str, port: int, timeout: timedelta) -> TCPStore:
    """A server on this address, and a client of it; others may come later, and several in this process."""
    return OneAddressStore(
        host, port, is_master=True, timeout=timeout, wait_for_workers=False, multi_tenant=True
    )
