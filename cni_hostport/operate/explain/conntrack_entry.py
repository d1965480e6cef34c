"""An entry of connection tracking for the connection that a probe would have begun.

The probe is dropped before connection tracking remembers its connection. An answer would then belong to no connection
and would not be translated back. So this makes the entry that the kernel would have made. Numbers and layouts as in
``nf_conntrack``, and those of linux/netfilter/nf_conntrack_common.h and nf_conntrack_tcp.h.
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
    PROTOINFO,
    PROTOINFO_STATE,
    STATUS,
    TUPLE_IP,
    TUPLE_ORIG,
    TUPLE_PROTO,
    TUPLE_REPLY,
    ZONE,
)
from cni_hostport.names import PROTOCOL_NUMBERS
from cni_hostport.netlink import ADDRESS_FAMILIES, NETLINK_NETFILTER, NLM_F_CREATE, Netlink, attribute, nested

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cni_hostport.operate.explain.packet import Endpoint, Packet
    from cni_hostport.operate.explain.trace import Trace

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
LIFETIME = 5  # seconds that it lasts if this process dies


@contextmanager
def temporary_entry(packet: Packet, trace: Trace) -> Iterator[None]:
    """Have connection tracking know the connection of ``packet`` during the block, translated as in its trace.

    Raises ``OSError`` if the kernel refuses that.
    """
    identity = _identity(packet, trace)
    with Netlink(NETLINK_NETFILTER) as netlink:
        _ask(netlink, NEW, NLM_F_CREATE | NLM_F_EXCL, identity + _state(packet, trace))
        try:
            yield
        finally:
            _ask(netlink, DELETE, 0, identity, errno.ENOENT)


def _ask(netlink: Netlink, kind: int, flags: int, body: bytes, *harmless: int) -> None:
    """Send one message; raises ``OSError`` for every error that is not one of the ``harmless`` numbers."""
    [(error, _)] = netlink.ask([(kind, flags, body)])
    if error and error not in harmless:
        raise OSError(error, f"connection tracking does not take a connection: {os.strerror(error)}")


def _identity(packet: Packet, trace: Trace) -> bytes:
    """Return the part of the message that tells the connection from all others: addresses, ports and zone."""
    header = bytes([ADDRESS_FAMILIES[packet.source.version], 0, 0, 0])
    zone = trace.mark_and_zone[1] if trace.mark_and_zone else 0
    zone_attribute = attribute(ZONE, struct.pack(">H", zone)) if zone else b""
    return header + _tuple(TUPLE_ORIG, packet.protocol, packet.client, packet.server) + zone_attribute


def _state(packet: Packet, trace: Trace) -> bytes:
    """Return the rest of the message: the connection after its first packet, with its translations."""
    mark = trace.mark_and_zone[0] if trace.mark_and_zone else 0
    parts = [
        _tuple(TUPLE_REPLY, packet.protocol, packet.server, packet.client),
        attribute(STATUS, struct.pack(">I", CONFIRMED | FIXED_TIMEOUT)),
        attribute(TIMEOUT, struct.pack(">I", LIFETIME)),
        attribute(MARK, struct.pack(">I", mark)),
    ]
    if trace.destination and trace.destination != packet.server:
        parts.append(_translation(NAT_DST, trace.destination))
    if trace.source and trace.source != packet.client:
        parts.append(_translation(NAT_SRC, trace.source))
    if packet.protocol == "tcp":
        tcp, state = PROTOINFO_STATE["tcp"]
        windows = [attribute(kind, ANY_WINDOW) for kind in (TCP_FLAGS_ORIGINAL, TCP_FLAGS_REPLY)]
        parts.append(nested(PROTOINFO, nested(tcp, attribute(state, bytes([SYN_SENT])), *windows)))
    return b"".join(parts)


def _tuple(direction: int, protocol: str, source: Endpoint, destination: Endpoint) -> bytes:
    addresses = [
        attribute(kinds[len(address.packed)], address.packed)
        for kinds, (address, _) in ((IP_SRC, source), (IP_DST, destination))
    ]
    ports = [
        attribute(kind, struct.pack(">H", port))
        for kind, (_, port) in ((PROTO_SRC_PORT, source), (PROTO_DST_PORT, destination))
    ]
    number = attribute(PROTO_NUM, bytes([PROTOCOL_NUMBERS[protocol]]))
    return nested(direction, nested(TUPLE_IP, *addresses), nested(TUPLE_PROTO, number, *ports))


def _translation(kind: int, endpoint: Endpoint) -> bytes:
    address, port = endpoint
    ports = [attribute(number, struct.pack(">H", port)) for number in (LOWEST_PORT, HIGHEST_PORT)]
    addresses = [attribute(number, address.packed) for number in NAT_IP[address.version]]
    return nested(kind, *addresses, nested(NAT_PROTO, *ports))
