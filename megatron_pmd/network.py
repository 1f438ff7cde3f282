"""Which of this machine's addresses and network interfaces a run talks over."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import NamedTuple

import psutil

from megatron_pmd.errors import LaunchError

LOOPBACK = "127.0.0.1"


class Interface(NamedTuple):
    name: str
    address: str
    """IPv4."""


def address_towards(host: str) -> str:
    """This machine's address on the route to a host; raises OSError where there is none."""
    family, _, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)  # a datagram socket sends nothing here: the kernel only picks a route
        return probe.getsockname()[0]


def choose_interface(wanted: Sequence[str], peer: str) -> Interface:
    """The network interface that a node's control traffic takes.

    wanted: names in order of preference; empty: the interface of the route to `peer`. Raises LaunchError
    naming the interfaces tried and those there are.
    """
    there = _interfaces()
    for name in wanted:
        if name in there:
            return Interface(name, there[name])
    listed = ", ".join(f"{name} ({address})" for name, address in there.items())
    if wanted:
        raise LaunchError(
            f"none of the network interfaces {', '.join(wanted)} has an IPv4 address; there are {listed}: "
            "set network.socket_interfaces in the cluster profile"
        )
    try:
        address = address_towards(peer)
    except OSError as error:
        raise LaunchError(f"no route to node {peer}: {error}") from None
    for name, own in there.items():
        if own == address:
            return Interface(name, address)
    raise LaunchError(
        f"the route to node {peer} leaves from {address}, an address of no network interface; there are "
        f"{listed}: set network.socket_interfaces in the cluster profile"
    )


def loopback() -> Interface:
    """All that a run on one machine needs: nothing of it is reached from outside."""
    return next(
        (Interface(name, own) for name, own in _interfaces().items() if own == LOOPBACK),
        Interface("lo", LOOPBACK),
    )


def variables(interface: Interface) -> dict[str, str]:
    """What has gloo and NCCL listen on this interface alone, for the environment of ranks and engines."""
    # without the =, NCCL takes every interface whose name begins so
    return {"GLOO_SOCKET_IFNAME": interface.name, "NCCL_SOCKET_IFNAME": f"={interface.name}"}


def _interfaces() -> dict[str, str]:
    """IPv4 address by name."""
    return {
        name: address.address
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if address.family == socket.AF_INET
    }
