"""Netlink messages and attributes, for what is asked more quickly than a library for it can be imported.

Layouts are those of linux/netlink.h; numbers are in the machine's byte order unless the protocol says otherwise.
"""

from __future__ import annotations

import errno
import os
import struct
from _socket import AF_NETLINK, MSG_DONTWAIT, SOCK_RAW, socket  # the module socket itself takes 2 ms to import

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Self

SOCK_CLOEXEC = 0o2000000
NETLINK_ROUTE, NETLINK_NETFILTER = 0, 12
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP_INTR, NLM_F_DUMP, NLM_F_CREATE = 0x1, 0x4, 0x10, 0x300, 0x400
NLMSG_ERROR, NLMSG_DONE = 2, 3
NLA_F_NESTED, NLA_TYPE_MASK = 0x8000, 0x3FFF
LARGEST_DATAGRAM = 0x10000  # the kernel makes them of at most 32 KiB

_HEADER = struct.Struct("=LHHLL")  # length, type, flags, sequence number, port
_ATTRIBUTE = struct.Struct("=HH")  # length, type
_ERRNO = struct.Struct("=i")

Message = tuple[int, int, bytes]  # type, flags, body

# Whoever closes a socket of nf_tables waits, 6 to 15 ms, until the kernel has freed what was deleted last, by whomever.
# Those in here stay open until the process ends, when the caller has its answer.
KEPT: list[object] = []
MOST_KEPT = 64  # by those who may be called many times in one process

# What those who are asked something of the kernel's tell first, to show that the work gets on.
PROGRESS: list[Callable[[], None]] = []


def report_progress() -> None:
    """Tell whoever waits for the end of this process's work that it gets on."""
    for report in PROGRESS:
        report()


def keep(opened: object) -> None:
    """Leave a socket of nf_tables open until the process ends, unless there are many of them already."""
    if len(KEPT) < MOST_KEPT:
        KEPT.append(opened)


class Netlink:
    """A netlink socket, bound for good to the network namespace in which it was made."""

    def __init__(self, protocol: int) -> None:
        """Open it; raises ``OSError`` where the kernel does not have the protocol."""
        self._socket = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, protocol)
        self._asked = 0  # messages so far: what is left of the answers to earlier ones is not taken for an answer
        self.kind: tuple[int, int] | None = None  # of one that is ``kept``: protocol, and inode of the namespace

    def __enter__(self) -> Self:
        """Use it for a block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self._socket.close()

    def ask(self, messages: Sequence[Message]) -> list[tuple[int, list[bytes]]]:
        """Send messages at once, and return for each its error number, 0 for success, and the bodies of the answers.

        Every message asks for an acknowledgement; the error number of one that did not get any is ``EIO``,
        that of a dump during which something was changed ``EINTR``.
        """
        report_progress()
        request, first = b"", self._asked
        self._asked += len(messages)
        for number, (kind, flags, body) in enumerate(messages, first):
            asking = flags | NLM_F_REQUEST | NLM_F_ACK
            request += _HEADER.pack(_HEADER.size + len(body), kind, asking, number, 0) + body
        if request:
            self._socket.send(request)
        errors, answers, interrupted = [errno.EIO] * len(messages), [list[bytes]() for _ in messages], set[int]()
        # the kernel has answered before send() returns, and continues a dump before recv() does: nothing to wait for
        for kind, flags, sequence, body in self._received():
            number = sequence - first
            if number < 0:
                continue
            if flags & NLM_F_DUMP_INTR:
                interrupted.add(number)
            if kind in {NLMSG_ERROR, NLMSG_DONE}:
                errors[number] = errno.EINTR if number in interrupted else -_ERRNO.unpack_from(body)[0]
            else:
                answers[number].append(body)
        return list(zip(errors, answers, strict=True))

    def _received(self) -> Iterator[tuple[int, int, int, bytes]]:
        while True:
            try:
                data = self._socket.recv(LARGEST_DATAGRAM, MSG_DONTWAIT)
            except BlockingIOError:
                return
            offset = 0
            while offset < len(data):
                length, kind, flags, number, _ = _HEADER.unpack_from(data, offset)
                yield kind, flags, number, data[offset + _HEADER.size : offset + length]
                offset += _aligned(length)


def kept(protocol: int) -> Netlink:
    """Return the socket of a protocol, in this network namespace, that stays open until the process ends.

    Raises ``OSError`` where there can be none.
    """
    namespace = os.stat("/proc/thread-self/ns/net").st_ino  # whose number is that of no other while the socket is open
    for opened in KEPT:
        if isinstance(opened, Netlink) and opened.kind == (protocol, namespace):
            return opened
    made = Netlink(protocol)
    made.kind = protocol, namespace
    KEPT.append(made)
    return made


def attribute(kind: int, value: bytes) -> bytes:
    """Return one attribute, padded."""
    length = _ATTRIBUTE.size + len(value)
    return _ATTRIBUTE.pack(length, kind) + value.ljust(_aligned(len(value)), b"\0")


def nested(kind: int, *attributes: bytes) -> bytes:
    """Return an attribute that holds others."""
    return attribute(kind | NLA_F_NESTED, b"".join(attributes))


def attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Return type and value of each attribute."""
    offset = 0
    while offset < len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        yield kind & NLA_TYPE_MASK, data[offset + _ATTRIBUTE.size : offset + length]
        offset += _aligned(length)


def _aligned(length: int) -> int:
    return (length + 3) & ~3
