"""The netlink socket that libnftables has made, set up from outside: what it receives there."""

from __future__ import annotations

import struct
from _socket import AF_NETLINK, SOL_SOCKET, htons, socket
from contextlib import suppress

from cni_hostport.netlink import NETLINK_NETFILTER, NLM_F_MULTI, NLMSG_DONE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

SOL_NETLINK, NETLINK_CAP_ACK = 270, 10  # linux/socket.h, linux/netlink.h
SO_RCVBUFFORCE = 33  # asm-generic/socket.h
REFUSALS_BUFFER = 4 << 20  # bytes; a refusal takes about one thousand, a message holds hundreds of elements

SO_ATTACH_FILTER, SO_DETACH_FILTER = 26, 27  # asm-generic/socket.h
NEWCHAIN, NEWSET = 0x0A03, 0x0A09  # linux/netfilter/nf_tables.h
# linux/bpf_common.h
LOAD_SHORT, LOAD_SHORT_AT_INDEX, LOAD_LENGTH, TO_INDEX = 0x28, 0x48, 0x80, 0x07
SUBTRACT, JUMP_EQUAL, JUMP_SET, RETURN = 0x14, 0x15, 0x45, 0x06
DONE_SIZE = 20  # bytes of a message NLMSG_DONE: the header, and an error number
CUT, WHOLE = 4, 0xFFFFFFFF  # bytes of a datagram that are left: less than a message has, which libmnl then passes over
# struct sock_filter (linux/filter.h): what to do, how many to pass over if so and if not, with which number
SOCK_FILTER = struct.Struct("=HBBI")


def make_room_for_refusals(descriptor: int) -> bool:
    """Let libnftables' socket, which has this descriptor, hold what the kernel says of a refused transaction.

    That is an answer for each message that is refused, of up to 64 KiB since it repeats the message; libnftables makes
    room for one KiB a command (mnl_batch_talk of its src/mnl.c) and, where that is too little, knows no reason. Returns
    whether the descriptor is that of such a socket.
    """
    with suppress(OSError):
        netlink = socket(fileno=descriptor)
        try:
            if (netlink.family, netlink.proto) == (AF_NETLINK, NETLINK_NETFILTER):
                netlink.setsockopt(SOL_NETLINK, NETLINK_CAP_ACK, 1)
                netlink.setsockopt(SOL_SOCKET, SO_RCVBUFFORCE, REFUSALS_BUFFER)
                return True
        finally:
            netlink.detach()
    return False


def leave_out(descriptor: int, kinds: Sequence[int]) -> None:
    """Have the kernel cut off listings of all objects of these kinds, such as ``NEWSET``, and of no others.

    They are those for libnftables' socket, which has this descriptor. Raises ``OSError`` where it has no socket yet.
    """
    netlink = socket(fileno=descriptor)
    try:
        if not kinds:
            netlink.setsockopt(SOL_SOCKET, SO_DETACH_FILTER, 0)
            return
        from ctypes import addressof, create_string_buffer

        program = _program(kinds)
        instructions = create_string_buffer(program, len(program))
        # struct sock_fprog (linux/filter.h)
        fprog = struct.pack("@HP", len(program) // SOCK_FILTER.size, addressof(instructions))
        netlink.setsockopt(SOL_SOCKET, SO_ATTACH_FILTER, fprog)
    finally:
        netlink.detach()


def _program(kinds: Sequence[int]) -> bytes:
    # shorts are loaded from a place of the message in the order of the network. This kernel ends a listing with a
    # datagram of its own; where the end stands in the last one of the listing, that is left whole
    return b"".join(
        SOCK_FILTER.pack(*instruction)
        for instruction in (
            (LOAD_SHORT, 0, 0, 4),  # nlmsg_type
            *((JUMP_EQUAL, len(kinds) - place, 0, htons(kind)) for place, kind in enumerate(kinds)),
            (RETURN, 0, 0, WHOLE),
            (LOAD_SHORT, 0, 0, 6),  # nlmsg_flags
            (JUMP_SET, 0, 6, htons(NLM_F_MULTI)),
            (LOAD_LENGTH, 0, 0, 0),
            (SUBTRACT, 0, 0, DONE_SIZE),
            (TO_INDEX, 0, 0, 0),
            (LOAD_SHORT_AT_INDEX, 0, 0, 4),  # nlmsg_type of the last message, if that is the end
            (JUMP_EQUAL, 1, 0, htons(NLMSG_DONE)),
            (RETURN, 0, 0, CUT),
            (RETURN, 0, 0, WHOLE),
        )
    )
