"""The interfaces of this network namespace, by name and by index, as the kernel knows them.

The C library's ``if_nametoindex`` and ``if_indextoname`` do not tell an interface that is not there from a process that
has no descriptor left; and the first has the kernel look for a module of the name (net/core/dev_ioctl.c, ``dev_load``).
"""

from __future__ import annotations

import os
import struct
from errno import ENODEV
from sys import byteorder

from cni_hostport.netlink import NETLINK_ROUTE, Netlink, attribute, attributes

RTM_NEWLINK, RTM_GETLINK = 16, 18  # linux/rtnetlink.h
IFLA_IFNAME, IFLA_LINKINFO, IFLA_IFALIAS, IFLA_EXT_MASK, IFLA_INFO_KIND = 3, 18, 20, 29, 1  # linux/if_link.h
LONGEST_ALIAS = 255  # bytes: IFALIASZ of linux/if.h, with the final NUL
RTEXT_FILTER_SKIP_STATS = 1 << 3  # linux/rtnetlink.h
IFINFOMSG = struct.Struct("=BxHiII")  # linux/rtnetlink.h: family, type, index, flags, change


def index(name: str) -> int:
    """Return the index of an interface, 0 if there is none; raises ``OSError`` if the kernel cannot be asked."""
    return _index(_link(0, _named(name)))


def name(index: int) -> str:
    """Return the name of an interface, empty if there is none; raises ``OSError`` if the kernel cannot be asked."""
    found = _link(index)
    names = (value for kind, value in attributes(found[IFINFOMSG.size :]) if kind == IFLA_IFNAME)
    return os.fsdecode(next(names, b"").rstrip(b"\0"))


def kind(index: int) -> str:
    """Return the kind of an interface, as ``ip -d link`` shows it, such as ``bridge`` or ``veth``.

    It is empty for one without a kind, and if there is none. Raises ``OSError`` if the kernel cannot be asked.
    """
    described = dict(attributes(_link(index)[IFINFOMSG.size :]))
    about = dict(attributes(described.get(IFLA_LINKINFO, b"")))
    return about.get(IFLA_INFO_KIND, b"").rstrip(b"\0").decode()


def index_and_alias(name: str) -> tuple[int, str]:
    """Return the index of an interface, and the note that it carries, as ``ip link`` shows it, empty if there is none.

    0 if there is no such interface. Raises ``OSError`` if the kernel cannot be asked.
    """
    found = _link(0, _named(name))
    alias = dict(attributes(found[IFINFOMSG.size :])).get(IFLA_IFALIAS, b"").rstrip(b"\0").decode(errors="replace")
    return _index(found), alias


def set_alias(index: int, text: str) -> None:
    """Give an interface a note, of at most ``LONGEST_ALIAS`` bytes; raises ``OSError`` if the kernel refuses."""
    request = IFINFOMSG.pack(0, 0, index, 0, 0) + attribute(IFLA_IFALIAS, text.encode())
    with Netlink(NETLINK_ROUTE) as netlink:
        [(error, _)] = netlink.ask([(RTM_NEWLINK, 0, request)])
    if error:
        raise OSError(error, os.strerror(error))


def _named(name: str) -> bytes:
    return attribute(IFLA_IFNAME, os.fsencode(name) + b"\0")


def _index(link: bytes) -> int:
    return int(IFINFOMSG.unpack_from(link)[2]) if link else 0


def _link(index: int, *wanted: bytes) -> bytes:
    mask = attribute(IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS.to_bytes(4, byteorder))
    question = b"".join((IFINFOMSG.pack(0, 0, index, 0, 0), mask, *wanted))
    with Netlink(NETLINK_ROUTE) as netlink:
        [(error, answers)] = netlink.ask([(RTM_GETLINK, 0, question)])
    if error not in {0, ENODEV}:
        raise OSError(error, os.strerror(error))
    return answers[0] if answers else b""
