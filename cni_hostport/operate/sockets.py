"""Who listens on a port, in the network namespace in which that is asked."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

import psutil

FAMILIES = {4: (socket.AF_INET, socket.AF_INET6), 6: (socket.AF_INET6,)}


@dataclass(frozen=True)
class Listener:
    """A socket that takes connections, and the process that has it, as far as that can be seen."""

    address: IPv4Address | IPv6Address
    process: str

    def serves(self, address: IPv4Address | IPv6Address) -> bool:
        """Tell whether connections to an address come to this socket."""
        return self.address.is_unspecified or self.address == address


def listeners(protocol: str, port: int, version: int) -> list[Listener]:
    """Return the TCP or UDP sockets on a port that can serve an IP version."""
    found = dict.fromkeys(
        Listener(_address(connection.laddr.ip), _process(connection.pid))
        for connection in psutil.net_connections(protocol)
        if connection.laddr
        and connection.laddr.port == port
        and connection.family in FAMILIES[version]
        and (connection.status == psutil.CONN_LISTEN or (protocol == "udp" and not connection.raddr))
    )
    # :: most often serves both
    return [of for of in found if of.address.version == version or of.address.is_unspecified]


def _address(text: str) -> IPv4Address | IPv6Address:
    address = ip_address(text)
    return getattr(address, "ipv4_mapped", None) or address


def _process(pid: int | None) -> str:
    try:
        return f"{psutil.Process(pid).name()} (process {pid})" if pid else "a process that cannot be seen"
    except psutil.Error:
        return f"process {pid}"
