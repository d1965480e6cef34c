"""Netlink sockets, messages and attributes: the kernel is asked in less time than a library for it takes to import.

Layouts are those of linux/netlink.h; numbers are in the machine's byte order unless the protocol says otherwise.
"""

from __future__ import annotations

import errno
import os
import struct
from _socket import (
    AF_INET,
    AF_INET6,
    AF_NETLINK,
    MSG_DONTWAIT,
    SOCK_RAW,
    socket,
)  # the module socket itself takes 2 ms to import

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Self

SOCK_CLOEXEC = 0o2000000
NETLINK_ROUTE, NETLINK_NETFILTER = 0, 12
NLM_F_REQUEST, NLM_F_MULTI, NLM_F_ACK, NLM_F_DUMP_INTR = 0x1, 0x2, 0x4, 0x10
NLM_F_DUMP, NLM_F_CREATE = 0x300, 0x400
NLMSG_ERROR, NLMSG_DONE = 2, 3
NLA_F_NESTED, NLA_TYPE_MASK = 0x8000, 0x3FFF
LARGEST_DATAGRAM = 0x10000  # bytes; the kernel makes them of at most 32 KiB
ADDRESS_FAMILIES = {4: AF_INET, 6: AF_INET6}  # by IP version
FAMILIES_BY_SIZE = {4: AF_INET, 16: AF_INET6}  # by the number of an address's bytes

_HEADER = struct.Struct("=LHHLL")  # length, type, flags, sequence number, port
_ATTRIBUTE = struct.Struct("=HH")  # length, type
_ERRNO = struct.Struct("=i")

Message = tuple[int, int, bytes]  # type, flags, body

# To close a socket of nf_tables takes 6 to 15 ms, for the kernel first frees what was deleted last, by anybody. What is
# in here stays open until the process ends, when the caller has its answer.
LEFT_OPEN: list[object] = []
SHARED: dict[tuple[int, int], Netlink] = {}  # open as long, by protocol and by the inode of the network namespace

# Functions that tell whoever waits for this process that its work gets on; called before each question to the kernel.
PROGRESS_REPORTS: list[Callable[[], None]] = []


def report_progress() -> None:
    """Tell whoever waits for this process that its work gets on."""
    for report in PROGRESS_REPORTS:
        report()


def leave_open(opened: object) -> None:
    """Leave what has a socket of nf_tables open until the process ends."""
    if opened not in LEFT_OPEN:
        LEFT_OPEN.append(opened)


def shared(protocol: int) -> Netlink:
    """Return the socket of a protocol in this network namespace that all share, and that stays open.

    Raises ``OSError`` where there can be none.
    """
    # no other namespace has this one's number while the socket is open
    place = protocol, os.stat("/proc/thread-self/ns/net").st_ino
    if place not in SHARED:
        SHARED[place] = Netlink(protocol)
    return SHARED[place]


def close_all() -> None:
    """Close what was left open, and the shared sockets."""
    LEFT_OPEN.clear()
    SHARED.clear()


class Netlink:
    """A netlink socket, bound for good to the network namespace in which it was made."""

    def __init__(self, protocol: int) -> None:
        """Open it; raises ``OSError`` where the kernel does not have the protocol."""
        self._socket = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, protocol)
        self._asked = 0  # messages so far: an answer to an earlier one, read late, is not taken for one to these

    def __enter__(self) -> Self:
        """Use it for a block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self._socket.close()

    def ask(self, messages: Sequence[Message], *, are_changes: bool = True) -> list[tuple[int, list[bytes]]]:
        """Send messages at once, and return for each its error number, 0 for success, and the bodies of the answers.

        Messages that are changes are acknowledged by the kernel; those that only ask for an object, or for a dump, need
        no more than that. The error number is ``EIO`` where the kernel did not answer, and ``EINTR`` where something
        changed during a dump. Raises ``OSError`` where nothing can be sent or received.
        """
        report_progress()
        request, first = b"", self._asked
        self._asked += len(messages)
        asking = NLM_F_REQUEST | NLM_F_ACK if are_changes else NLM_F_REQUEST
        for number, (kind, flags, body) in enumerate(messages, first):
            request += _HEADER.pack(_HEADER.size + len(body), kind, flags | asking, number, 0) + body
        if request:
            self._socket.send(request)
        errors, answers, interrupted = [errno.EIO] * len(messages), [list[bytes]() for _ in messages], set[int]()
        missing = set(range(len(messages)))
        # the kernel has answered before send() returns, and continues a dump before recv() does: nothing to wait for
        while missing and (data := self._received()):
            for kind, flags, sequence, body in messages_in(data):
                number = sequence - first
                if number < 0:
                    continue
                if flags & NLM_F_DUMP_INTR:
                    interrupted.add(number)
                if kind in {NLMSG_ERROR, NLMSG_DONE}:
                    errors[number] = errno.EINTR if number in interrupted else -_ERRNO.unpack_from(body)[0]
                    missing.discard(number)
                    continue
                answers[number].append(body)
                if not are_changes and not flags & NLM_F_MULTI:
                    errors[number] = 0
                    missing.discard(number)
        return list(zip(errors, answers, strict=True))

    def _received(self) -> bytes:
        """Return the next datagram, empty if there is none."""
        try:
            return self._socket.recv(LARGEST_DATAGRAM, MSG_DONTWAIT)
        except BlockingIOError:
            return b""


def messages_in(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Return type, flags, sequence number and body of each message in a datagram."""
    offset = 0
    while offset < len(data):
        length, kind, flags, number, _ = _HEADER.unpack_from(data, offset)
        yield kind, flags, number, data[offset + _HEADER.size : offset + length]
        offset += _aligned(length)


def attribute(kind: int, value: bytes) -> bytes:
    """Return one attribute, padded."""
    length = _ATTRIBUTE.size + len(value)
    return _ATTRIBUTE.pack(length, kind) + value.ljust(_aligned(len(value)), b"\0")


def nested(kind: int, *attributes: bytes) -> bytes:
    """Return an attribute that holds others."""
    return attribute(kind | NLA_F_NESTED, b"".join(attributes))


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Return type and value of each attribute."""
    offset, end, unpack = 0, len(data), _ATTRIBUTE.unpack_from
    while offset < end:
        length, kind = unpack(data, offset)
        yield kind & NLA_TYPE_MASK, data[offset + 4 : offset + length]
        offset += (length + 3) & ~3  # here tens of thousands pass, and each function called would be as long again


def _aligned(length: int) -> int:
    return (length + 3) & ~3
