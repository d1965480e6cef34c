"""A probe: one packet, as a client would send it, that is traced through the node and dropped before it leaves it.

It comes in on the interface on which the client's would: a tap device of its own takes the packet, and a traffic
control filter redirects it to that interface. A client on the node itself needs no more than a raw socket. Table and
device are gone when their descriptors are closed, however this process ends.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import socket
import struct
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import TYPE_CHECKING

from cni_hostport.nft import Nft
from cni_hostport.operate.packet import Packet
from cni_hostport.operate.trace import Hop, Tracer

if TYPE_CHECKING:
    from collections.abc import Iterator

TABLE = "hostport-probe"
# before all that others do, and after it, but before connection tracking remembers the connection
RULES = """
add table inet {table} {{ flags owner; }}
add chain inet {table} prerouting {{ type filter hook prerouting priority -2000; }}
add chain inet {table} output {{ type filter hook output priority -2000; }}
add chain inet {table} input {{ type filter hook input priority 2000; }}
add chain inet {table} postrouting {{ type filter hook postrouting priority 2000; }}
add rule inet {table} prerouting {match} meta nftrace set 1
add rule inet {table} output {match} meta nftrace set 1
add rule inet {table} input {match} drop
add rule inet {table} postrouting {match} drop
"""
ENDS = {"input", "postrouting"}
TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x2, 0x1000  # linux/if_tun.h
INGRESS, CLASS, EVERYTHING, ETH_P_ALL = 0xFFFF0000, 0x10000, "0x0/0x0+0", 0x0003
FIRST_EPHEMERAL, EPHEMERAL = 32768, 28232  # net.ipv4.ip_local_port_range, as the kernel has it by default


@dataclass(frozen=True)
class Way:
    """The way of a probe: the hops it was traced at, and where it ended.

    ``end`` is ``postrouting`` if it would have left the node, to ``destination`` on ``interface``; ``input`` if a
    process of the node would have got it; and empty if it did not come to either.
    """

    hops: tuple[Hop, ...]
    end: str
    destination: tuple[IPv4Address | IPv6Address, int] | None
    interface: str


def send(packet: Packet, interface: str) -> Way:
    """Send a packet, which comes in on an interface or, if that is empty, from the node itself; and follow it.

    Raises ``OSError`` if there can be no such packet, and ``NFTError`` if it cannot be traced.
    """
    nft = Nft()
    nft.run(RULES.format(table=TABLE, match=packet.match).strip().splitlines())
    try:
        with Tracer() as tracer:
            if interface:
                with _tap(interface) as (tap, mac):
                    os.write(tap, packet.frame(mac))
                    hops = tracer.hops(TABLE)
            else:
                _send_raw(packet)
                hops = tracer.hops(TABLE)
    finally:
        nft.run([f"delete table inet {TABLE}"])
    last = next((hop for hop in hops if hop.table == TABLE and hop.chain in ENDS), None)
    others = tuple(hop for hop in hops if hop.table != TABLE)
    if last is None:
        return Way(others, "", None, "")
    return Way(others, last.chain, _destination(last), _name(last.oif))


def make(protocol: str, source: IPv4Address | IPv6Address, destination: IPv4Address | IPv6Address, port: int) -> Packet:
    """Return a packet like the first of a connection, that no other is mistaken for."""
    source_port = FIRST_EPHEMERAL + secrets.randbelow(EPHEMERAL)
    return Packet(protocol, source, source_port, destination, port, secrets.randbits(32))


def _send_raw(packet: Packet) -> None:
    family = socket.AF_INET if packet.source.version == 4 else socket.AF_INET6  # noqa: PLR2004 - IP version
    with (
        socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw,
        suppress(PermissionError),  # it is told that its packet was dropped
    ):
        raw.sendto(bytes(packet), (str(packet.destination), 0))


@contextmanager
def _tap(interface: str) -> Iterator[tuple[int, bytes]]:
    """Have a device on which what is written comes in on an interface; gives its descriptor and its MAC address."""
    from pyroute2 import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", TABLE.encode(), IFF_TAP | IFF_NO_PI))
        with suppress(OSError):  # what it says for itself is no harm
            Path("/proc/sys/net/ipv6/conf", TABLE, "disable_ipv6").write_text("1")
        with IPRoute() as route:
            [index] = route.link_lookup(ifname=TABLE)
            towards = socket.if_nametoindex(interface)
            redirect = {"kind": "mirred", "direction": "ingress", "action": "redirect", "ifindex": towards}
            try:
                route.link("set", index=index, state="up")
                route.tc("add", "ingress", index)
                route.tc(
                    "add-filter",
                    "u32",
                    index,
                    parent=INGRESS,
                    protocol=ETH_P_ALL,
                    target=CLASS,
                    keys=[EVERYTHING],
                    action=redirect,
                )
                mac = next(iter(route.link("get", index=index))).get_attr("IFLA_ADDRESS")
            except NetlinkError as error:
                raise OSError(error.code, os.strerror(error.code)) from error
        yield tap, bytes.fromhex(mac.replace(":", ""))
    finally:
        os.close(tap)


def _destination(hop: Hop) -> tuple[IPv4Address | IPv6Address, int] | None:
    if not hop.header or not hop.transport:
        return None
    address = hop.header[16:20] if hop.header[0] >> 4 == 4 else hop.header[24:40]  # noqa: PLR2004 - IP version
    return ip_address(address), int.from_bytes(hop.transport[2:4])


def _name(index: int) -> str:
    try:
        return socket.if_indextoname(index)
    except OSError:
        return ""
