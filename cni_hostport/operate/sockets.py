"""Who listens on a port, in the network namespace in which that is asked."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

import psutil
from pyroute2 import DiagSocket
from pyroute2.netlink.exceptions import NetlinkError

FAMILIES = {4: (socket.AF_INET, socket.AF_INET6), 6: (socket.AF_INET6,)}
NUMBERS = {"tcp": socket.IPPROTO_TCP, "udp": socket.IPPROTO_UDP}
STATES = {"tcp": 1 << 10, "udp": 1 << 7}  # include/net/tcp_states.h: TCP_LISTEN; TCP_CLOSE, which is all that UDP has
ANY = IPv6Address("::")


@dataclass(frozen=True)
class Listener:
    """A socket that takes connections, and the process that has it, as far as that can be seen."""

    address: IPv4Address | IPv6Address
    process: str

    def serves(self, address: IPv4Address | IPv6Address) -> bool:
        """Tell whether connections to an address come to this socket."""
        return self.address.is_unspecified or self.address == address


def listeners(protocol: str, port: int, version: int) -> list[Listener]:
    """Return the TCP or UDP sockets on a port that can serve an IP version; to be called in the main thread."""
    found = dict.fromkeys(
        Listener(_address(connection.laddr.ip), _process(connection.pid))
        for connection in psutil.net_connections(protocol)
        if connection.laddr
        and connection.laddr.port == port
        and connection.family in FAMILIES[version]
        and (connection.status == psutil.CONN_LISTEN or (protocol == "udp" and not connection.raddr))
    )
    serving = [of for of in found if of.address.version == version]
    if len(serving) < len(found) and _takes_both(protocol, port):
        serving += [of for of in found if of.address == ANY]
    return serving


def _takes_both(protocol: str, port: int) -> bool:
    """Tell whether a socket on ``::`` takes IPv4 as well: most do, unless IPV6_V6ONLY is set."""
    try:
        with DiagSocket() as diag:
            return any(
                not of.get_attr("INET_DIAG_SKV6ONLY")
                for of in diag.get_sock_stats(socket.AF_INET6, STATES[protocol], NUMBERS[protocol])
                if of["idiag_sport"] == port and ip_address(of["idiag_src"]) == ANY
            )
    except (OSError, NetlinkError):
        return True


def _address(text: str) -> IPv4Address | IPv6Address:
    address = ip_address(text)
    return getattr(address, "ipv4_mapped", None) or address


def _process(pid: int | None) -> str:
    try:
        return f"{psutil.Process(pid).name()} (process {pid})" if pid else "a process that cannot be seen"
    except psutil.Error:
        return f"process {pid}"
