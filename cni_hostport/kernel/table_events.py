"""What the kernel reports of nf_tables: that somebody deleted this plugin's table, as ``nft flush ruleset`` does."""

from __future__ import annotations

from _socket import AF_NETLINK, MSG_DONTWAIT, SOCK_RAW, SOL_SOCKET, socket
from contextlib import suppress
from errno import ENOBUFS, ENOENT

from cni_hostport import netlink
from cni_hostport.names import TABLE
from cni_hostport.netlink import NETLINK_NETFILTER, SOCK_CLOEXEC
from cni_hostport.nf_tables import get_table

# linux/netfilter/nfnetlink.h, linux/netfilter/nf_tables.h
NFNLGRP_NFTABLES = 7
NFT_MSG_DELTABLE = 10 << 8 | 2  # the subsystem comes first
NFTA_TABLE_NAME = 1
NFPROTO_INET = 1
SO_RCVBUFFORCE = 33  # asm-generic/socket.h
RECEIVE_BUFFER = 1 << 24  # bytes: the reports of some ten thousand elements
BODY = 4  # bytes of struct nfgenmsg, whose first is the family


class TableEvents:
    """The deletions of the table in the network namespace in which this was made."""

    def __init__(self) -> None:
        """Begin to listen; raises ``OSError``."""
        self._socket = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_NETFILTER)
        with suppress(PermissionError):
            self._socket.setsockopt(SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER)
        self._socket.bind((0, 1 << NFNLGRP_NFTABLES - 1))

    def fileno(self) -> int:
        """Return a descriptor that can be read when something happened."""
        return self._socket.fileno()

    def close(self) -> None:
        """Listen no longer."""
        self._socket.close()

    def is_deleted(self) -> bool:
        """Read all that was reported, and tell whether the table was deleted.

        Where reports were lost, tell whether there is none.
        """
        found = lost = False
        while True:
            try:
                data = self._socket.recv(netlink.LARGEST_DATAGRAM, MSG_DONTWAIT)
            except BlockingIOError:
                return found or (lost and self._is_absent())
            except OSError as error:
                if error.errno != ENOBUFS:
                    raise
                lost = True  # there were more than the socket holds
            else:
                found |= any(_deletes(kind, body) for kind, _, _, body in netlink.messages_in(data))

    def _is_absent(self) -> bool:
        [(error, _)] = netlink.shared(NETLINK_NETFILTER).ask([get_table()], are_changes=False)
        return error == ENOENT


def _deletes(kind: int, body: bytes) -> bool:
    if kind != NFT_MSG_DELTABLE or body[0] != NFPROTO_INET:
        return False
    return dict(netlink.attributes(body[BODY:])).get(NFTA_TABLE_NAME) == f"{TABLE}\0".encode()
