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

RTM_GETLINK = 18  # linux/rtnetlink.h
IFLA_IFNAME, IFLA_LINKINFO, IFLA_EXT_MASK, IFLA_INFO_KIND = 3, 18, 29, 1  # linux/if_link.h
RTEXT_FILTER_SKIP_STATS = 1 << 3  # linux/rtnetlink.h
IFINFOMSG = struct.Struct("=BxHiII")  # linux/rtnetlink.h: family, type, index, flags, change


def index(name: str) -> int:
    """Return the index of an interface, 0 if there is none; raises ``OSError`` if the kernel cannot be asked."""
    found = _link(0, attribute(IFLA_IFNAME, os.fsencode(name) + b"\0"))
    return int(IFINFOMSG.unpack_from(found)[2]) if found else 0


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


def _link(index: int, *wanted: bytes) -> bytes:
    mask = attribute(IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS.to_bytes(4, byteorder))
    question = b"".join((IFINFOMSG.pack(0, 0, index, 0, 0), mask, *wanted))
    with Netlink(NETLINK_ROUTE) as netlink:
        [(error, answers)] = netlink.ask([(RTM_GETLINK, 0, question)])
    if error not in {0, ENODEV}:
        raise OSError(error, os.strerror(error))
    return answers[0] if answers else b""
