"""The sockets that listen on a port in this network namespace, and the processes that have them."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import TYPE_CHECKING

import psutil

from cni_hostport.names import PROTOCOL_NUMBERS

if TYPE_CHECKING:
    from collections.abc import Collection

# include/net/tcp_states.h: TCP_LISTEN; TCP_CLOSE, which is all that UDP has
LISTENING_STATES = {"tcp": 1 << 10, "udp": 1 << 7}
MAX_NAME_LENGTH = 64  # characters of a process's name, which it can make as long as it likes
ANY_IPV6 = IPv6Address("::")


@dataclass(frozen=True)
class Listener:
    """A socket that takes connections, and the process that has it, as far as that can be seen."""

    address: IPv4Address | IPv6Address
    process: str

    def __lt__(self, other: Listener) -> bool:
        """Put them in the order of addresses, those of IPv4 first."""
        return (self.address.version, int(self.address)) < (other.address.version, int(other.address))

    def serves(self, address: IPv4Address | IPv6Address) -> bool:
        """Tell whether connections to an address come to this socket."""
        return self.address.is_unspecified or self.address == address


def listeners(protocol: str, port: int, version: int) -> list[Listener]:
    """Return the TCP or UDP sockets on a port that can serve an IP version; to be called in the main thread."""
    return listeners_by_port({(protocol, port)}).get((protocol, port, version), [])


def listeners_by_port(ports: Collection[tuple[str, int]]) -> dict[tuple[str, int, int], list[Listener]]:
    """Return the sockets on ports, given with their protocols, by protocol, port and IP version that they can serve.

    All of them are looked up at once. To be called in the main thread.
    """
    found: dict[tuple[str, int, int], dict[Listener, None]] = {}
    on_any_ipv6: list[tuple[str, int, Listener]] = []
    for connection in psutil.net_connections("inet"):
        protocol = "tcp" if connection.type == socket.SOCK_STREAM else "udp"
        is_listening = connection.status == psutil.CONN_LISTEN or (protocol == "udp" and not connection.raddr)
        if not is_listening or not connection.laddr or (protocol, connection.laddr.port) not in ports:
            continue
        listener = Listener(_address(connection.laddr.ip), _process(connection.pid))
        found.setdefault((protocol, connection.laddr.port, listener.address.version), {})[listener] = None
        if listener.address == ANY_IPV6:
            on_any_ipv6.append((protocol, connection.laddr.port, listener))
    dual_stack = {protocol: _dual_stack_ports(protocol) for protocol in {protocol for protocol, _, _ in on_any_ipv6}}
    for protocol, port, listener in on_any_ipv6:
        dual_stack_ports = dual_stack[protocol]
        if dual_stack_ports is None or port in dual_stack_ports:
            found.setdefault((protocol, port, 4), {})[listener] = None
    return {key: list(sockets) for key, sockets in found.items()}


def _dual_stack_ports(protocol: str) -> set[int] | None:
    """Return the ports on which a socket on ``::`` takes IPv4 as well: most do, unless IPV6_V6ONLY is set.

    ``None`` if that cannot be told.
    """
    from pyroute2 import DiagSocket  # takes longer to import than most of what is done with sockets
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        with DiagSocket() as netlink:
            return {
                message["idiag_sport"]
                for message in netlink.get_sock_stats(
                    socket.AF_INET6, LISTENING_STATES[protocol], PROTOCOL_NUMBERS[protocol]
                )
                if not message.get_attr("INET_DIAG_SKV6ONLY") and ip_address(message["idiag_src"]) == ANY_IPV6
            }
    except (OSError, NetlinkError):
        return None


def _address(text: str) -> IPv4Address | IPv6Address:
    address = ip_address(text)
    return getattr(address, "ipv4_mapped", None) or address


def _process(pid: int | None) -> str:
    try:
        name = psutil.Process(pid).name() if pid else ""
    except psutil.Error:
        return f"process {pid}"
    return f"{name[:MAX_NAME_LENGTH]} (process {pid})" if pid else "a process that cannot be seen"
