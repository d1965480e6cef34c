"""The trace of a packet: every rule that it met, and the verdict, as nf_tables tells them by netlink.

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
from cni_hostport.nf_tables import FAMILIES, NFNL_SUBSYS_NFTABLES

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from cni_hostport.operate.explain.packet import Endpoint

SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, NFNLGRP_NFTRACE = 270, 1, 9
SO_RCVBUFFORCE, RECEIVE_BUFFER = 33, 1 << 25  # bytes; others may trace a lot at the same time
NFT_MSG_TRACE = NFNL_SUBSYS_NFTABLES << 8 | 17
TABLE, CHAIN, RULE_HANDLE, TYPE, VERDICT, ID, NETWORK_HEADER, TRANSPORT_HEADER, OIF, POLICY = (
    1, 2, 3, 4, 5, 6, 8, 9, 12, 16
)  # fmt: skip
VERDICT_CODE, VERDICT_CHAIN = 1, 2
TYPE_POLICY, TYPE_RETURN = 1, 2
FAMILY_NAMES = {number: name for name, number in FAMILIES.items()}
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
MESSAGE_HEADER = struct.Struct("=LHHLL")  # struct nlmsghdr
VERDICT_MASK = 0xFF  # the rest is the number of a queue, or an error number
QUIET_SECONDS = 0.5  # the kernel has done with a packet in far less
MAX_DATAGRAM = 1 << 16  # bytes


@dataclass(frozen=True)
class Hop:
    """A rule that a packet met, or the policy of a chain, and the verdict: ``accept``, ``drop``, ``goto CHAIN``, ...

    ``handle`` is the rule's, 0 for a policy. ``network_header`` and ``transport_header`` are the first bytes of the
    packet's headers there, where the kernel tells them. ``oif`` is the index of the interface on which the packet
    leaves, 0 before that is known.
    """

    family: str
    table: str
    chain: str
    handle: int
    verdict: str
    packet_id: int
    network_header: bytes = b""
    transport_header: bytes = b""
    oif: int = 0

    @property
    def place(self) -> str:
        """The chain, as nft names it."""
        return f"{self.family} {self.table} {self.chain}"


@dataclass(frozen=True)
class Trace:
    """The path of a probe through the node: the rules that it met, and where it ended.

    ``end`` is the last of the probe's own chains that saw the packet; rules of these are not among the ``hops``.
    ``postrouting`` means that the packet would have left the node on ``interface``, from ``source`` to
    ``destination``, as they were translated by then. ``input`` means that a process of the node would have got it. Any
    other chain means that something stopped it after that. ``end`` is empty if no chain saw the packet at all.
    ``mark_and_zone`` are those of the connection, ``None`` if connection tracking does not have it.
    """

    hops: tuple[Hop, ...]
    end: str
    destination: Endpoint | None
    interface: str
    source: Endpoint | None = None
    mark_and_zone: tuple[int, int] | None = None


class Tracer:
    """Listens to the traces of a network namespace, the one in which it was made."""

    def __init__(self) -> None:
        """Open the socket; raises ``OSError`` if that is not allowed."""
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_NETFILTER)
        with suppress(PermissionError):
            self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER)
        self._socket.bind((0, 0))
        self._socket.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, NFNLGRP_NFTRACE)

    def __enter__(self) -> Self:
        """Begin to listen."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the socket."""
        self._socket.close()

    def follow(self, table: str, last_chains: Collection[str]) -> list[Hop]:
        """Return the hops of one packet: of the first packet that a rule of ``table`` matches.

        The last hop is a rule in one of ``last_chains`` of that table. If the packet comes to none of these, this waits
        until the kernel has told nothing of it for ``QUIET_SECONDS``. Raises ``OSError`` if the kernel had more to tell
        than there was room for.
        """
        hops, packet_ids = list[Hop](), set[int]()
        deadline = time.monotonic() + QUIET_SECONDS
        while (remaining := deadline - time.monotonic()) > 0 and select.select([self._socket], [], [], remaining)[0]:
            for hop in self._received_hops():
                is_match = hop.table == table and hop.handle  # the policy of its chains is for the packets of others
                if is_match:
                    packet_ids.add(hop.packet_id)  # a packet that a sniffer gets a copy of goes on as another one
                if hop.packet_id in packet_ids:
                    hops.append(hop)
                    deadline = time.monotonic() + QUIET_SECONDS
                if is_match and hop.chain in last_chains:
                    return hops
        return hops

    def _received_hops(self) -> Iterator[Hop]:
        try:
            data = self._socket.recv(MAX_DATAGRAM)
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            raise OSError(error.errno, "so much else is traced at the same time that some of it was lost") from error
        while data:
            length, kind, *_ = MESSAGE_HEADER.unpack_from(data)
            if kind == NFT_MSG_TRACE:
                yield parse(data[MESSAGE_HEADER.size : length])
            data = data[(length + 3) & ~3 :]


def parse(message: bytes) -> Hop:
    """Read the body of a message about a trace."""
    values = dict(attributes(message[4:]))
    kind = _number(values.get(TYPE))
    verdict = dict(attributes(values.get(VERDICT, b"")))
    code = values.get(POLICY) if kind == TYPE_POLICY else verdict.get(VERDICT_CODE)
    text = "return" if kind == TYPE_RETURN else _verdict(code)
    return Hop(
        FAMILY_NAMES.get(message[0], str(message[0])),
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
