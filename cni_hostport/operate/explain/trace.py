"""What nf_tables tells of a packet that is traced: every rule that it met, and what became of it.

Numbers are those of linux/netfilter/nf_tables.h (``nft_trace_attributes``), nfnetlink_compat.h and netfilter.h.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from cni_hostport.netlink import NETLINK_NETFILTER, attributes
from cni_hostport.nf_tables import NFNL_SUBSYS_NFTABLES

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, NFNLGRP_NFTRACE = 270, 1, 9
SO_RCVBUFFORCE, ROOM = 33, 1 << 25  # bytes; others may trace a lot at the same time
NFT_MSG_TRACE = NFNL_SUBSYS_NFTABLES << 8 | 17
TABLE, CHAIN, RULE_HANDLE, TYPE, VERDICT, ID, NETWORK_HEADER, TRANSPORT_HEADER, OIF, POLICY = (
    1, 2, 3, 4, 5, 6, 8, 9, 12, 16
)  # fmt: skip
VERDICT_CODE, VERDICT_CHAIN = 1, 2
TYPE_POLICY, TYPE_RETURN = 1, 2
FAMILIES = {1: "inet", 2: "ip", 3: "arp", 5: "netdev", 7: "bridge", 10: "ip6"}
VERDICTS = {
    0: "drop",
    1: "accept",
    2: "stolen",
    3: "queue",
    -1: "continue",
    -2: "break",
    -3: "jump",
    -4: "goto",
    -5: "return",
}
HEADER = struct.Struct("=LHHLL")
VERDICT_MASK = 0xFF  # the rest is the number of a queue, or an error number
QUIET = 0.5  # seconds; the kernel has done with a packet in far less
LARGEST = 1 << 16


@dataclass(frozen=True)
class Hop:
    """A rule that a packet met, or the policy of a chain, and the verdict: ``accept``, ``drop``, ``goto CHAIN``, ...

    ``handle`` is 0 for a policy. ``header`` and ``transport`` are how the packet begins there, where that is told, and
    ``oif`` the index of the interface on which it leaves, 0 before that is known.
    """

    family: str
    table: str
    chain: str
    handle: int
    verdict: str
    packet: int
    header: bytes = b""
    transport: bytes = b""
    oif: int = 0

    @property
    def place(self) -> str:
        """The chain, as nft names it."""
        return f"{self.family} {self.table} {self.chain}"


class Tracer:
    """Listens to the traces of a network namespace, the one in which it was made."""

    def __init__(self) -> None:
        """Open the socket; raises ``OSError`` if that is not allowed."""
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
        with suppress(PermissionError):
            self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, ROOM)
        self._socket.bind((0, 0))
        self._socket.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, NFNLGRP_NFTRACE)

    def __enter__(self) -> Self:
        """Begin to listen."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the socket."""
        self._socket.close()

    def follow(self, table: str, ends: Collection[str]) -> list[Hop]:
        """Return the hops of the packet that a rule of this table matches first of all.

        It is followed to a rule in one of the table's chains ``ends``, or until nothing is heard of it for a while.
        Raises ``OSError`` if the kernel had more to tell than there was room for.
        """
        hops, packets = list[Hop](), set[int]()
        deadline = time.monotonic() + QUIET
        while (left := deadline - time.monotonic()) > 0 and select.select([self._socket], [], [], left)[0]:
            for hop in self._received():
                own = hop.table == table and hop.handle  # the policy of its chains is for the packets of others
                if own:
                    packets.add(hop.packet)  # a packet that a sniffer gets a copy of goes on as another one
                if hop.packet in packets:
                    hops.append(hop)
                    deadline = time.monotonic() + QUIET
                if own and hop.chain in ends:
                    return hops
        return hops

    def _received(self) -> Iterator[Hop]:
        try:
            data = self._socket.recv(LARGEST)
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            raise OSError(error.errno, "so much else is traced at the same time that some of it was lost") from error
        while data:
            length, kind, *_ = HEADER.unpack_from(data)
            if kind == NFT_MSG_TRACE:
                yield parse(data[HEADER.size : length])
            data = data[(length + 3) & ~3 :]


def parse(message: bytes) -> Hop:
    """Read a message's body."""
    values = dict(attributes(message[4:]))
    kind = _number(values.get(TYPE))
    verdict = dict(attributes(values.get(VERDICT, b"")))
    code = values.get(POLICY) if kind == TYPE_POLICY else verdict.get(VERDICT_CODE)
    text = "return" if kind == TYPE_RETURN else _verdict(code)
    return Hop(
        FAMILIES.get(message[0], str(message[0])),
        _text(values.get(TABLE)),
        _text(values.get(CHAIN)),
        _number(values.get(RULE_HANDLE)),
        f"{text} {_text(verdict.get(VERDICT_CHAIN))}".strip(),
        _number(values.get(ID)),
        values.get(NETWORK_HEADER, b""),
        values.get(TRANSPORT_HEADER, b""),
        _number(values.get(OIF)),
    )


def _verdict(code: bytes | None) -> str:
    if code is None:
        return ""
    number = _number(code, signed=True)
    return VERDICTS.get(number if number < 0 else number & VERDICT_MASK, str(number))


def _number(value: bytes | None, *, signed: bool = False) -> int:
    return int.from_bytes(value or b"", signed=signed)


def _text(value: bytes | None) -> str:
    return os.fsdecode((value or b"").rstrip(b"\0"))
