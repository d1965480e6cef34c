"""The netlink socket that libnftables has made, set up from outside: what it receives there."""

from __future__ import annotations

import struct
from _socket import AF_NETLINK, SOL_SOCKET, htons, socket
from contextlib import suppress

from cni_hostport.netlink import NETLINK_NETFILTER

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

SOL_NETLINK, NETLINK_CAP_ACK = 270, 10  # linux/socket.h, linux/netlink.h
SO_RCVBUFFORCE = 33  # asm-generic/socket.h
REFUSALS_BUFFER = 4 << 20  # bytes; a refusal takes about one thousand, a message holds hundreds of elements

SO_ATTACH_FILTER, SO_DETACH_FILTER = 26, 27  # asm-generic/socket.h
NEWCHAIN, NEWSET, NLM_F_MULTI = 0x0A03, 0x0A09, 0x2  # linux/netfilter/nf_tables.h, linux/netlink.h
LOAD_SHORT, JUMP_EQUAL, JUMP_SET, RETURN = 0x28, 0x15, 0x45, 0x06  # linux/bpf_common.h
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

        program = create_string_buffer(_program(kinds))
        # struct sock_fprog (linux/filter.h), with the number of instructions
        netlink.setsockopt(SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("@HP", len(kinds) + 6, addressof(program)))
    finally:
        netlink.detach()


def _program(kinds: Sequence[int]) -> bytes:
    # shorts are loaded from a place of the message in the order of the network
    return b"".join(
        SOCK_FILTER.pack(*instruction)
        for instruction in (
            (LOAD_SHORT, 0, 0, 4),  # nlmsg_type
            *(
                (JUMP_EQUAL, 1 + others, 0, htons(kind))
                for others, kind in zip(range(len(kinds))[::-1], kinds, strict=True)
            ),
            (RETURN, 0, 0, WHOLE),
            (LOAD_SHORT, 0, 0, 6),  # nlmsg_flags
            (JUMP_SET, 0, 1, htons(NLM_F_MULTI)),
            (RETURN, 0, 0, CUT),
            (RETURN, 0, 0, WHOLE),
        )
    )
