"""A connection that connection tracking knows though it never was: the one that a probe would have begun.

The probe is dropped before connection tracking remembers it, so that its answer would be one to nothing. Numbers and
layouts as in ``nf_conntrack``, and those of linux/netfilter/nf_conntrack_common.h and nf_conntrack_tcp.h.
"""

from __future__ import annotations

import errno
import os
import struct
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cni_hostport.kernel.nf_conntrack import (
    DELETE,
    IP_DST,
    IP_SRC,
    NFNL_SUBSYS_CTNETLINK,
    PROTO_DST_PORT,
    PROTO_NUM,
    PROTO_SRC_PORT,
    PROTOCOL_NUMBERS,
    PROTOINFO,
    PROTOINFO_STATE,
    STATUS,
    TUPLE_IP,
    TUPLE_ORIG,
    TUPLE_PROTO,
    TUPLE_REPLY,
    ZONE,
)
from cni_hostport.netlink import FAMILIES_BY_SIZE, NETLINK_NETFILTER, NLM_F_CREATE, Netlink, attribute, nested

if TYPE_CHECKING:
    from collections.abc import Iterator
    from ipaddress import IPv4Address, IPv6Address

    from cni_hostport.operate.explain.packet import Packet
    from cni_hostport.operate.explain.probe import Way

    End = tuple[IPv4Address | IPv6Address, int]

NLM_F_EXCL = 0x200
NEW = NFNL_SUBSYS_CTNETLINK << 8 | 0
NAT_SRC, TIMEOUT, MARK, NAT_DST = 6, 7, 8, 13
NAT_IP = {4: (1, 2), 6: (4, 5)}  # lowest, highest
NAT_PROTO, LOWEST_PORT, HIGHEST_PORT = 3, 1, 2
TCP_FLAGS_ORIGINAL, TCP_FLAGS_REPLY = 4, 5
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
    header = bytes([FAMILIES_BY_SIZE[len(packet.source.packed)], 0, 0, 0])
    zone = way.tracked[1] if way.tracked else 0
    in_zone = attribute(ZONE, struct.pack(">H", zone)) if zone else b""
    return header + _tuple(TUPLE_ORIG, packet.protocol, packet.client, packet.server) + in_zone


def _begun(packet: Packet, way: Way) -> bytes:
    parts = [
        _tuple(TUPLE_REPLY, packet.protocol, packet.server, packet.client),
        attribute(STATUS, struct.pack(">I", CONFIRMED | FIXED_TIMEOUT)),
        attribute(TIMEOUT, struct.pack(">I", SECONDS)),
        attribute(MARK, struct.pack(">I", way.tracked[0] if way.tracked else 0)),
    ]
    if way.destination and way.destination != packet.server:
        parts.append(_translation(NAT_DST, way.destination))
    if way.source and way.source != packet.client:
        parts.append(_translation(NAT_SRC, way.source))
    if packet.protocol == "tcp":
        of_tcp, state = PROTOINFO_STATE["tcp"]
        windows = [attribute(kind, ANY_WINDOW) for kind in (TCP_FLAGS_ORIGINAL, TCP_FLAGS_REPLY)]
        parts.append(nested(PROTOINFO, nested(of_tcp, attribute(state, bytes([SYN_SENT])), *windows)))
    return b"".join(parts)


def _tuple(direction: int, protocol: str, source: End, destination: End) -> bytes:
    ends = ((IP_SRC, PROTO_SRC_PORT, source), (IP_DST, PROTO_DST_PORT, destination))
    addresses = [attribute(kinds[len(of[0].packed)], of[0].packed) for kinds, _, of in ends]
    ports = [attribute(kind, struct.pack(">H", of[1])) for _, kind, of in ends]
    number = attribute(PROTO_NUM, bytes([PROTOCOL_NUMBERS[protocol]]))
    return nested(direction, nested(TUPLE_IP, *addresses), nested(TUPLE_PROTO, number, *ports))


def _translation(kind: int, to: End) -> bytes:
    address, port = to
    ports = [attribute(number, struct.pack(">H", port)) for number in (LOWEST_PORT, HIGHEST_PORT)]
    addresses = [attribute(number, address.packed) for number in NAT_IP[address.version]]
    return nested(kind, *addresses, nested(NAT_PROTO, *ports))
