"""What the kernel reports of nf_tables: that this plugin's table was deleted, that dynamic host ports changed hands."""

from __future__ import annotations

from _socket import AF_NETLINK, MSG_DONTWAIT, SOCK_RAW, SOL_SOCKET, socket
from contextlib import suppress
from errno import ENOBUFS, ENOENT
from typing import TYPE_CHECKING

from cni_hostport import netlink
from cni_hostport.names import DYNAMIC, FAMILY, TABLE
from cni_hostport.netlink import NETLINK_NETFILTER, SOCK_CLOEXEC
from cni_hostport.nf_tables import (
    DELSETELEM,
    DELTABLE,
    FAMILIES,
    NEWSETELEM,
    OBJECT_TABLE,
    SET_ELEM_LIST_SET,
    TABLE_NAME,
    c_string,
    get_table,
)

if TYPE_CHECKING:
    from typing import Self

NFNLGRP_NFTABLES = 7  # linux/netfilter/nfnetlink.h
SO_RCVBUFFORCE = 33  # asm-generic/socket.h
RECEIVE_BUFFER = 1 << 24  # bytes: the reports of some ten thousand elements
BODY = 4  # bytes of struct nfgenmsg, whose first is the family


class _Events:
    """Reports from the network namespace in which this was made, of those changes that match."""

    kinds: tuple[int, ...] = ()  # of the messages that matter
    names: tuple[tuple[int, str], ...] = ()  # what they have to be about, by the number of the attribute

    def __init__(self) -> None:
        """Begin to listen; raises ``OSError``."""
        self._socket = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_NETFILTER)
        with suppress(PermissionError):
            self._socket.setsockopt(SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER)
        self._socket.bind((0, 1 << NFNLGRP_NFTABLES - 1))

    def __enter__(self) -> Self:
        """Listen for a block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Listen no longer."""
        self.close()

    def fileno(self) -> int:
        """Return a descriptor that can be read when something happened."""
        return self._socket.fileno()

    def close(self) -> None:
        """Listen no longer."""
        self._socket.close()

    def _read(self) -> tuple[bool, bool]:
        """Read all that was reported; tell whether some of it matters, and whether reports were lost."""
        found = lost = False
        while True:
            try:
                data = self._socket.recv(netlink.LARGEST_DATAGRAM, MSG_DONTWAIT)
            except BlockingIOError:
                return found, lost
            except OSError as error:
                if error.errno != ENOBUFS:
                    raise
                lost = True  # there were more than the socket holds
            else:
                found = found or any(self._matters(kind, body) for kind, _, _, body in netlink.messages_in(data))

    def _matters(self, kind: int, body: bytes) -> bool:
        if kind not in self.kinds or body[0] != FAMILIES[FAMILY]:
            return False
        values = dict(netlink.attributes(body[BODY:]))
        return all(values.get(number) == c_string(name) for number, name in self.names)


class TableEvents(_Events):
    """The deletions of the table, as by ``nft flush ruleset``."""

    kinds, names = (DELTABLE,), ((TABLE_NAME, TABLE),)

    def is_deleted(self) -> bool:
        """Tell whether the table was deleted since the last time.

        Where reports were lost, tell whether there is none.
        """
        found, lost = self._read()
        return found or (lost and self._is_absent())

    def _is_absent(self) -> bool:
        [(error, _)] = netlink.shared(NETLINK_NETFILTER).ask([get_table()], are_changes=False)
        return error == ENOENT


class DynamicPortEvents(_Events):
    """The assignments of dynamic host ports, and their ends: a pod's next sandbox can have been there before that."""

    kinds, names = (NEWSETELEM, DELSETELEM), ((OBJECT_TABLE, TABLE), (SET_ELEM_LIST_SET, DYNAMIC))

    def have_come(self) -> bool:
        """Tell whether there may have been some since the last time."""
        return any(self._read())
