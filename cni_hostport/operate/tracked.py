"""A connection that connection tracking knows though it never was: the one that a probe would have begun.

The probe is dropped before connection tracking remembers it, so that its answer would be one to nothing. Numbers and
layouts are those of linux/netfilter/nfnetlink_conntrack.h, nf_conntrack_common.h and nf_conntrack_tcp.h.
"""

from __future__ import annotations

import errno
import os
import struct
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cni_hostport.lookup import NETLINK_NETFILTER
from cni_hostport.netlink import NLM_F_CREATE, Netlink, attribute, nested
from cni_hostport.nf_tables import FAMILIES
from cni_hostport.operate.packet import PROTOCOLS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from ipaddress import IPv4Address, IPv6Address

    from cni_hostport.operate.packet import Packet
    from cni_hostport.operate.probe import Way

    End = tuple[IPv4Address | IPv6Address, int]

NLM_F_EXCL = 0x200
NEW, DELETE = 1 << 8 | 0, 1 << 8 | 2  # of NFNL_SUBSYS_CTNETLINK
ORIGINAL, REPLY, STATUS, PROTOINFO, NAT_SOURCE, TIMEOUT, MARK, NAT_DESTINATION, ZONE = 1, 2, 3, 4, 6, 7, 8, 13, 18
TUPLE_IP, TUPLE_PROTO = 1, 2
IP = {4: (1, 2), 6: (3, 4)}  # source, destination
NUMBER, SOURCE_PORT, DESTINATION_PORT = 1, 2, 3
NAT_IP = {4: (1, 2), 6: (4, 5)}  # lowest, highest
NAT_PROTO, LOWEST_PORT, HIGHEST_PORT = 3, 1, 2
PROTOINFO_TCP, TCP_STATE, TCP_FLAGS_ORIGINAL, TCP_FLAGS_REPLY = 1, 1, 4, 5
SYN_SENT = 1
ANY_WINDOW = b"\x08\x08"  # IP_CT_TCP_FLAG_BE_LIBERAL, and the same as the mask: no window is known
# a packet that belongs to it does not make it last longer
CONFIRMED, FIXED_TIMEOUT = 1 << 3, 1 << 10
SECONDS = 5  # it lasts if this process dies


@contextmanager
def connection(packet: Packet, way: Way) -> Iterator[None]:
    """Have connection tracking know, during the block, what a packet that went this way began, with its translation.

    Raises ``OSError`` if the kernel refuses that.
    """
    body = _named(packet, way)
    with Netlink(NETLINK_NETFILTER) as netlink:
        _ask(netlink, NEW, NLM_F_CREATE | NLM_F_EXCL, body + _begun(packet, way))
        try:
            yield
        finally:
            _ask(netlink, DELETE, 0, body, errno.ENOENT)


def _ask(netlink: Netlink, kind: int, flags: int, body: bytes, *harmless: int) -> None:
    [(error, _)] = netlink.ask([(kind, flags, body)])
    if error and error not in harmless:
        raise OSError(error, f"connection tracking does not take a connection: {os.strerror(error)}")


def _named(packet: Packet, way: Way) -> bytes:
    """Return what tells the connection from all others."""
    family = FAMILIES["ip" if packet.source.version == 4 else "ip6"]  # noqa: PLR2004 - IP version
    zone = way.tracked[1] if way.tracked else 0
    return (
        struct.pack(">BBH", family, 0, 0)
        + _tuple(ORIGINAL, packet.protocol, packet.client, packet.server)
        + (attribute(ZONE, struct.pack(">H", zone)) if zone else b"")
    )


def _begun(packet: Packet, way: Way) -> bytes:
    parts = [
        _tuple(REPLY, packet.protocol, packet.server, packet.client),
        attribute(STATUS, struct.pack(">I", CONFIRMED | FIXED_TIMEOUT)),
        attribute(TIMEOUT, struct.pack(">I", SECONDS)),
        attribute(MARK, struct.pack(">I", way.tracked[0] if way.tracked else 0)),
    ]
    if way.destination and way.destination != packet.server:
        parts.append(_translation(NAT_DESTINATION, way.destination))
    if way.source and way.source != packet.client:
        parts.append(_translation(NAT_SOURCE, way.source))
    if packet.protocol == "tcp":
        windows = [attribute(kind, ANY_WINDOW) for kind in (TCP_FLAGS_ORIGINAL, TCP_FLAGS_REPLY)]
        parts.append(nested(PROTOINFO, nested(PROTOINFO_TCP, attribute(TCP_STATE, bytes([SYN_SENT])), *windows)))
    return b"".join(parts)


def _tuple(kind: int, protocol: str, source: End, destination: End) -> bytes:
    ends = zip(IP[source[0].version], (source, destination), strict=True)
    ports = ((SOURCE_PORT, source), (DESTINATION_PORT, destination))
    return nested(
        kind,
        nested(TUPLE_IP, *(attribute(number, end[0].packed) for number, end in ends)),
        nested(
            TUPLE_PROTO,
            attribute(NUMBER, bytes([PROTOCOLS[protocol]])),
            *(attribute(number, struct.pack(">H", end[1])) for number, end in ports),
        ),
    )


def _translation(kind: int, to: End) -> bytes:
    address, port = to
    ports = [attribute(number, struct.pack(">H", port)) for number in (LOWEST_PORT, HIGHEST_PORT)]
    addresses = [attribute(number, address.packed) for number in NAT_IP[address.version]]
    return nested(kind, *addresses, nested(NAT_PROTO, *ports))
