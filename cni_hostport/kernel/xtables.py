"""What legacy iptables has in the kernel, asked without its programs, which take longer and may not be installed.

Source: linux/netfilter_ipv4/ip_tables.h and linux/netfilter_ipv6/ip6_tables.h, alike but for the level of the option.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from errno import EAGAIN, ENOENT
from socket import AF_INET, AF_INET6, IPPROTO_IP, IPPROTO_IPV6, SOCK_DGRAM, socket
from sys import byteorder

from cni_hostport.foreign_rules import LEGACY_TABLE_NAMES

SOCKETS = {"ip": (AF_INET, IPPROTO_IP), "ip6": (AF_INET6, IPPROTO_IPV6)}
GET_INFO, GET_ENTRIES = 64, 65
NAME_LENGTH, INFO_LENGTH, HEAD_LENGTH = 32, 84, 40  # of a table's name; ipt_getinfo, its last four bytes the size;
# and of what stands before the entries in ipt_get_entries: the name, the size, padding
ATTEMPTS = 12


def table_names(family: str) -> list[str]:
    """Return the tables of a family, ``ip`` or ``ip6``, that are in use; raises ``OSError`` if that cannot be read."""
    with suppress(FileNotFoundError), open(LEGACY_TABLE_NAMES.format(family)) as names:  # else it is not in use
        return names.read().split()
    return []


def mentions(family: str, table: str, text: str) -> bool:
    """Tell whether a text stands in a table that is in use: as a chain's name or in a comment.

    Where the kernel does not tell, it may.
    """
    for _ in range(ATTEMPTS):
        try:
            return text.encode() in _entries(family, table)
        except OSError as error:
            if error.errno == ENOENT:
                return False
            if error.errno != EAGAIN:  # that is: changed since its size was asked for
                break
    return True


def _entries(family: str, table: str) -> bytes:
    domain, level = SOCKETS[family]
    name = table.encode().ljust(NAME_LENGTH, b"\0")
    with socket(domain, SOCK_DGRAM) as asking:
        info = _option(asking.fileno(), level, GET_INFO, name.ljust(INFO_LENGTH, b"\0"))
        size = int.from_bytes(info[-4:], byteorder)
        head = (name + info[-4:]).ljust(HEAD_LENGTH, b"\0")
        return _option(asking.fileno(), level, GET_ENTRIES, head.ljust(HEAD_LENGTH + size, b"\0"))


def _option(descriptor: int, level: int, option: int, question: bytes) -> bytes:
    buffer, length = ctypes.create_string_buffer(question, len(question)), ctypes.c_uint(len(question))
    if ctypes.CDLL(None, use_errno=True).getsockopt(descriptor, level, option, buffer, ctypes.byref(length)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return buffer.raw
