"""The kernel's connection tracking messages: questions for entries, and what the answers say. Pure.

Numbers and layouts are those of linux/netfilter/nfnetlink_conntrack.h, names those of its enums without the prefix. The
kernel's filters are in net/netfilter/nf_conntrack_netlink.c: ``ctnetlink_alloc_filter``, ``ctnetlink_filter_match``.
"""

from __future__ import annotations

import re
import struct
from functools import cache

from cni_hostport.names import PROTOCOL_NUMBERS, PROTOCOLS
from cni_hostport.netlink import FAMILIES_BY_SIZE, NLM_F_DUMP, attribute, attributes, nested

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cni_hostport.netlink import Message

    End = tuple[bytes, int]  # packed address, port

NFNL_SUBSYS_CTNETLINK = 1
GET, DELETE, GET_STATS = (NFNL_SUBSYS_CTNETLINK << 8 | number for number in (1, 2, 5))

TUPLE_ORIG, TUPLE_REPLY, STATUS, PROTOINFO, ID, ZONE, FILTER, STATUS_MASK = 1, 2, 3, 4, 12, 18, 25, 26
TUPLE_IP, TUPLE_PROTO, TUPLE_ZONE = 1, 2, 3
IP_SRC, IP_DST = {4: 1, 16: 3}, {4: 2, 16: 4}
PROTO_NUM, PROTO_SRC_PORT, PROTO_DST_PORT = 1, 2, 3
FILTER_FLAGS = {TUPLE_ORIG: 1, TUPLE_REPLY: 2}
COMPARES_PROTO_NUM, COMPARES_DST_PORT = 1 << 3, 1 << 5  # net/netfilter/nf_internals.h
IPS_ASSURED = 1 << 2  # linux/netfilter/nf_conntrack_common.h
PROTOINFO_STATE = {"tcp": (1, 1), "sctp": (3, 1)}  # the protocol's attribute, and the state in it
STATS_GLOBAL_ENTRIES = 1


def count() -> Message:
    """Ask how many entries the network namespace has."""
    return GET_STATS, 0, bytes(4)


def entries(answer: bytes) -> int:
    """Return the number of entries from the answer."""
    return int.from_bytes(dict(attributes(answer[4:]))[STATS_GLOBAL_ENTRIES])


def everything() -> Message:
    """Ask for all entries."""
    return GET, NLM_F_DUMP, bytes(4)


def with_port(address_size: int, protocol: str, direction: int, port: int) -> Message:
    """Ask for the entries of one direction's destination port, ``TUPLE_ORIG`` or ``TUPLE_REPLY``.

    Not by addresses: the kernel compares those of IPv6 the wrong way round.
    """
    number = attribute(PROTO_NUM, bytes([PROTOCOL_NUMBERS[protocol]]))
    tuple_proto = nested(TUPLE_PROTO, number, attribute(PROTO_DST_PORT, port.to_bytes(2)))
    return _dump(address_size, direction, tuple_proto, COMPARES_PROTO_NUM | COMPARES_DST_PORT)


def of_protocol(address_size: int, protocol: str, *, beginning: bool = False) -> Message:
    """Ask for all entries of a protocol, or for those of connections whose beginning is not yet complete.

    A kernel that does not filter by status answers with more.
    """
    tuple_proto = nested(TUPLE_PROTO, attribute(PROTO_NUM, bytes([PROTOCOL_NUMBERS[protocol]])))
    status = attribute(STATUS, bytes(4)) + attribute(STATUS_MASK, IPS_ASSURED.to_bytes(4)) if beginning else b""
    return _dump(address_size, TUPLE_ORIG, tuple_proto, COMPARES_PROTO_NUM, status)


def _dump(address_size: int, direction: int, tuple_proto: bytes, flags: int, status: bytes = b"") -> Message:
    header = bytes([FAMILIES_BY_SIZE[address_size], 0, 0, 0])
    compared = nested(FILTER, attribute(FILTER_FLAGS[direction], struct.pack("=L", flags)))
    return GET, NLM_F_DUMP, header + nested(direction, tuple_proto) + compared + status


def has_port(answer: bytes, ports: set[bytes]) -> bool:
    """Tell, in less time than it takes to read the entry, whether one of these ports may be a destination in it."""
    return not ports.isdisjoint(_port_pattern().findall(answer))


@cache
def _port_pattern() -> re.Pattern[bytes]:
    """Match whatever may be a destination port; made where there is an entry, since it takes as long as an import."""
    return re.compile(b"(?=" + re.escape(attribute(PROTO_DST_PORT, b"\0\0")[:4]) + b"(..))", re.DOTALL)


class Flow:
    """A connection tracking entry: both ends of what the client sends, and those of what it expects as an answer."""

    __slots__ = (
        "deletion",
        "destination",
        "in_a_zone",
        "protocol",
        "reply_destination",
        "reply_source",
        "source",
        "state",
    )

    def __init__(self, answer: bytes) -> None:
        """Read the answer for an entry."""
        entry = dict(attributes(answer[4:]))
        original, reply = (dict(attributes(entry[direction])) for direction in (TUPLE_ORIG, TUPLE_REPLY))
        number, self.source, self.destination = _ends(original)
        _, self.reply_source, self.reply_destination = _ends(reply)
        self.protocol = PROTOCOLS.get(number, "")
        self.in_a_zone = ZONE in entry or TUPLE_ZONE in original or TUPLE_ZONE in reply
        self.state = _state(entry.get(PROTOINFO, b""), self.protocol)
        # the identity tells the entry from a later one of the same ends
        identity = attribute(ID, entry[ID])
        self.deletion: Message = DELETE, 0, answer[:4] + nested(TUPLE_ORIG, entry[TUPLE_ORIG]) + identity

    @property
    def is_redirected(self) -> bool:
        """Tell whether somebody else answers than the client sends to."""
        return self.reply_source[0] != self.destination[0]

    @property
    def is_masqueraded(self) -> bool:
        """Tell whether the answer is sent to somebody else than the client."""
        return self.reply_destination[0] != self.source[0]


def _ends(parts: dict[int, bytes]) -> tuple[int, End, End]:
    """Return the protocol's number, the source and the destination of one direction."""
    addresses, proto = dict(attributes(parts[TUPLE_IP])), dict(attributes(parts[TUPLE_PROTO]))
    size = len(next(iter(addresses.values())))
    source, destination = (int.from_bytes(proto.get(kind, b"")) for kind in (PROTO_SRC_PORT, PROTO_DST_PORT))
    return proto[PROTO_NUM][0], (addresses[IP_SRC[size]], source), (addresses[IP_DST[size]], destination)


def _state(protoinfo: bytes, protocol: str) -> int:
    """Return the protocol's state of a connection, 0 where it has none."""
    kind, state = PROTOINFO_STATE.get(protocol, (0, 0))
    of_protocol = dict(attributes(protoinfo)).get(kind, b"")
    return int.from_bytes(dict(attributes(of_protocol)).get(state, b""))
