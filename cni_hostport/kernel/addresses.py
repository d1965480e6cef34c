"""The addresses of a network namespace, as the kernel lists them."""

from __future__ import annotations

import os
import time
from errno import EINTR
from ipaddress import IPv4Interface, IPv6Interface, ip_interface
from socket import AF_INET, AF_INET6
from struct import Struct
from typing import TYPE_CHECKING, NamedTuple

from cni_hostport.netlink import NLM_F_DUMP, attributes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cni_hostport.netlink import Netlink

RTM_GETADDR, RT_SCOPE_UNIVERSE = 22, 0  # linux/rtnetlink.h
IFA_ADDRESS, IFA_LOCAL = 1, 2  # linux/if_addr.h
IFADDRMSG = Struct("=BBBBL")  # linux/if_addr.h: family, prefix length, flags, scope, interface
# seconds before each attempt to list addresses; each but the last was spoiled by a change of one
PAUSES = (0, 0, 0, 0.003, 0.01, 0.03, 0.1, 0.3)


class Address(NamedTuple):
    """An address, the index of its interface, and whether it is meant for the whole world."""

    ip: IPv4Interface | IPv6Interface
    interface: int
    is_global: bool


def listed(netlink: Netlink, interface: int = 0) -> list[Address]:
    """Return the addresses of an interface, or all; raises ``OSError`` if the kernel does not tell them."""
    for pause in PAUSES:
        time.sleep(pause)
        [(error, answers)] = netlink.ask([(RTM_GETADDR, NLM_F_DUMP, IFADDRMSG.pack(0, 0, 0, 0, 0))])
        if error != EINTR:
            break
    if error:
        raise OSError(error, f"cannot list addresses: {os.strerror(error)}")
    wanted = (answer for answer in answers if interface in {0, IFADDRMSG.unpack_from(answer)[4]})
    return [address for answer in wanted for address in _address(answer)]


def _address(answer: bytes) -> Iterator[Address]:
    family, length, _, scope, interface = IFADDRMSG.unpack_from(answer)
    values = dict(attributes(answer[IFADDRMSG.size :]))
    # of a point-to-point link, IFA_ADDRESS is the peer's
    packed = values.get(IFA_LOCAL) or values.get(IFA_ADDRESS)
    if family in {AF_INET, AF_INET6} and packed:
        yield Address(ip_interface((packed, length)), interface, scope == RT_SCOPE_UNIVERSE)
